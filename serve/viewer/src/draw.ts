/** Drawing on a slide with Annotorious: areas as shapes that can be selected and edited. */

import { createOSDAnnotator, UserSelectAction } from "@annotorious/openseadragon";
import type { DrawingStyleExpression, ImageAnnotation, OpenSeadragonAnnotator } from "@annotorious/openseadragon";
import "@annotorious/openseadragon/annotorious-openseadragon.css";
import { colourOf, newFeature, toGeometry, toShape } from "./annotate.ts";
import type { Feature, Geometry, Shape } from "./annotate.ts";
import type { SlideView } from "./slide.ts";

export type DrawTool = "rectangle" | "polygon";

interface Events {
  /** Something was drawn. */
  drawn: (feature: Feature) => void;
  /** A shape was given other corners. */
  moved: (id: string, geometry: Geometry) => void;
  selected: (id: string | null) => void;
}

/** The shapes on one view. Points and lines are not among them: they are no areas. */
export class Drawing {
  private readonly annotator: OpenSeadragonAnnotator;
  private features = new Map<string, Feature>();
  /** Geometry of each shape as it was told to this page or by it, to notice one that comes from elsewhere. */
  private told = new Map<string, string>();
  private dragging = false;
  private readonly stops: () => void;
  private readonly editable: (feature: Feature) => boolean;

  constructor(view: SlideView, editable: (feature: Feature) => boolean, events: Events) {
    this.editable = editable;
    this.annotator = createOSDAnnotator(view.osd, {
      drawingEnabled: false,
      autoSave: true,
      style: this.style(),
      userSelectAction: (annotation) => {
        const feature = this.features.get(annotation.id); // none: it is being drawn
        return !feature || this.editable(feature) ? UserSelectAction.EDIT : UserSelectAction.SELECT;
      },
    });
    // Its undo would take back shapes without the service, which has saved them.
    view.osd.element.addEventListener("keydown", noUndo, true);
    this.annotator.on("createAnnotation", (made) => {
      this.stop();
      const feature = newFeature(made.id, made.target.selector as unknown as Shape);
      this.features.set(feature.id, feature);
      this.told.set(feature.id, JSON.stringify(feature.geometry));
      events.drawn(feature);
    });
    // Annotorious tells of changes while a corner is dragged, too: one drag is one change here.
    const changed = (now: ImageAnnotation | undefined) => {
      if (!now || this.dragging) return;
      const geometry = toGeometry(now.target.selector as unknown as Shape);
      const text = JSON.stringify(geometry);
      if (!this.features.has(now.id) || text === this.told.get(now.id)) return;
      this.told.set(now.id, text);
      events.moved(now.id, geometry);
    };
    const down = () => (this.dragging = true);
    const up = () => {
      this.dragging = false;
      setTimeout(() => changed(this.annotator.getSelected()[0]));
    };
    view.osd.element.addEventListener("pointerdown", down, true);
    addEventListener("pointerup", up);
    addEventListener("pointercancel", up);
    const named = new MutationObserver(() => nameHandles(view.osd.canvas));
    named.observe(view.osd.canvas, { childList: true, subtree: true });
    this.stops = () => {
      named.disconnect();
      removeEventListener("pointerup", up);
      removeEventListener("pointercancel", up);
    };
    this.annotator.on("updateAnnotation", changed);
    this.annotator.on("selectionChanged", ([first]) => events.selected(first?.id ?? null));
  }

  /** Show these features and no others. */
  show(features: readonly Feature[]): void {
    const before = this.features;
    this.features = new Map(features.map((one) => [one.id, one]));
    for (const id of before.keys()) {
      if (!this.features.has(id) && this.told.delete(id)) this.annotator.removeAnnotation(id);
    }
    const added: ImageAnnotation[] = [];
    for (const feature of features) {
      if (before.get(feature.id)?.geometry === feature.geometry) continue;
      const shape = toShape(feature.geometry);
      const text = JSON.stringify(feature.geometry);
      // While somebody drags a corner, an answer about the corner before must not move it back.
      if (!shape || this.told.get(feature.id) === text) continue;
      if (this.told.has(feature.id)) this.annotator.updateAnnotation(toAnnotation(feature, shape));
      else added.push(toAnnotation(feature, shape));
      this.told.set(feature.id, text);
    }
    if (added.length) this.annotator.setAnnotations(added, false); // all at once: each draws all anew
    const recoloured = features.some((one) => {
      const old = before.get(one.id);
      return old !== undefined && colourOf(old) !== colourOf(one);
    });
    if (recoloured) this.annotator.setStyle(this.style()); // it draws all anew
  }

  private style(): DrawingStyleExpression<ImageAnnotation> {
    return (annotation, state) => {
      const feature = this.features.get(annotation.id);
      const colour = (feature ? colourOf(feature) : "#ff0000") as `#${string}`;
      const fillOpacity = state?.hovered && !state.selected ? 0.2 : 0.1;
      return { fill: colour, fillOpacity, stroke: colour, strokeOpacity: 1, strokeWidth: 2 };
    };
  }

  select(id: string | null): void {
    const feature = id === null ? undefined : this.features.get(id);
    if (!feature || !toShape(feature.geometry)) return this.annotator.cancelSelected();
    const { selected } = this.annotator.state.selection;
    const editable = this.editable(feature);
    if (selected.length !== 1 || selected[0]!.id !== id || Boolean(selected[0]!.editable) !== editable)
      this.annotator.setSelected(feature.id, editable);
  }

  start(tool: DrawTool): void {
    this.annotator.cancelSelected();
    this.annotator.setDrawingTool(tool);
    this.annotator.setDrawingMode(tool === "rectangle" ? "drag" : "click");
    this.annotator.setDrawingEnabled(true);
  }

  /** End drawing; what is begun is dropped. */
  stop(): void {
    this.annotator.cancelDrawing();
    this.annotator.setDrawingEnabled(false);
  }

  /** Forget the view, which is going. */
  leave(): void {
    this.stops();
  }
}

/** Handles are buttons, and Annotorious gives them no names. */
function nameHandles(canvas: HTMLElement): void {
  for (const handle of canvas.querySelectorAll('[role="button"]:not([aria-label])'))
    handle.setAttribute("aria-label", "Handle of the selected annotation");
}

function noUndo(event: KeyboardEvent): void {
  if ((event.ctrlKey || event.metaKey) && ["z", "y"].includes(event.key.toLowerCase())) event.stopPropagation();
}

function toAnnotation(feature: Feature, shape: Shape): ImageAnnotation {
  const selector = shape as unknown as ImageAnnotation["target"]["selector"];
  return { id: feature.id, bodies: [], target: { annotation: feature.id, selector } };
}
