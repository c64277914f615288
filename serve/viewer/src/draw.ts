/** Drawing and editing areas with Annotorious, one at a time: the others are painted by areas.ts. */

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
  /** The area was given other corners. */
  moved: (id: string, geometry: Geometry) => void;
  /** The pointer left the area for something else. */
  left: (id: string) => void;
}

/**
 * The area being drawn or edited on one view. It costs a WebGL context and pictures of all that is in
 * view, so it is there for as long as something is drawn or edited.
 */
export class Drawing {
  private readonly annotator: OpenSeadragonAnnotator;
  /** What is edited, and its geometry as it was told to this page or by it. */
  private now: { feature: Feature; told: string } | null = null;
  private dragging = false;
  private gone = false;
  private readonly stops: () => void;

  constructor(view: SlideView, events: Events) {
    this.annotator = createOSDAnnotator(view.osd, {
      drawingEnabled: false,
      autoSave: true,
      style: this.style(),
      userSelectAction: UserSelectAction.EDIT,
    });
    // Its undo would take back shapes without the service, which has saved them.
    this.annotator.on("createAnnotation", (made) => {
      if (this.gone) return;
      this.stop();
      const feature = newFeature(made.id, made.target.selector as unknown as Shape);
      this.now = { feature, told: JSON.stringify(feature.geometry) };
      events.drawn(feature);
    });
    // Annotorious tells of changes while a corner is dragged, too: one drag is one change here.
    const changed = (edited: ImageAnnotation | undefined) => {
      if (!edited || this.gone || this.dragging || this.now?.feature.id !== edited.id) return;
      const geometry = toGeometry(edited.target.selector as unknown as Shape);
      const text = JSON.stringify(geometry);
      if (text === this.now.told) return;
      this.now.told = text;
      events.moved(edited.id, geometry);
    };
    const down = () => (this.dragging = true);
    const up = () => {
      this.dragging = false;
      setTimeout(() => this.gone || changed(this.annotator.getSelected()[0]));
    };
    const { element, canvas } = view.osd;
    element.addEventListener("keydown", noUndo, true);
    element.addEventListener("pointerdown", down, true);
    addEventListener("pointerup", up);
    addEventListener("pointercancel", up);
    const named = new MutationObserver(() => nameHandles(canvas));
    named.observe(canvas, { childList: true, subtree: true });
    this.stops = () => {
      named.disconnect();
      element.removeEventListener("keydown", noUndo, true);
      element.removeEventListener("pointerdown", down, true);
      removeEventListener("pointerup", up);
      removeEventListener("pointercancel", up);
    };
    this.annotator.on("updateAnnotation", changed);
    // It tells a moment later: by then something else may have been selected.
    this.annotator.on("selectionChanged", () => {
      if (this.now && !this.gone && !this.annotator.getSelected().length) events.left(this.now.feature.id);
    });
  }

  /** Edit an area; null: none. */
  edit(feature: Feature | null): void {
    const shape = feature && toShape(feature.geometry);
    if (!feature || !shape) {
      if (!this.now) return;
      const { id } = this.now.feature;
      this.now = null;
      this.annotator.cancelSelected();
      this.annotator.removeAnnotation(id);
      return;
    }
    const text = JSON.stringify(feature.geometry);
    const before = this.now;
    this.now = { feature, told: text };
    if (before?.feature.id !== feature.id) {
      this.annotator.cancelSelected();
      this.annotator.setAnnotations([toAnnotation(feature, shape)], true);
    } else if (before.told !== text && !this.dragging) {
      // While somebody drags a corner, an answer about the corner before must not move it back.
      this.annotator.updateAnnotation(toAnnotation(feature, shape));
    } else this.now.told = before.told;
    if (this.annotator.getSelected()[0]?.id !== feature.id) this.annotator.setSelected(feature.id, true);
    if (before && colourOf(before.feature) !== colourOf(feature)) this.annotator.setStyle(this.style());
  }

  private style(): DrawingStyleExpression<ImageAnnotation> {
    return () => {
      const colour = (this.now ? colourOf(this.now.feature) : "#ff0000") as `#${string}`;
      return { fill: colour, fillOpacity: 0.1, stroke: colour, strokeOpacity: 1, strokeWidth: 2 };
    };
  }

  start(tool: DrawTool): void {
    this.edit(null);
    this.annotator.setDrawingTool(tool);
    this.annotator.setDrawingMode(tool === "rectangle" ? "drag" : "click");
    this.annotator.setDrawingEnabled(true);
  }

  /** End drawing; what is begun is dropped. */
  stop(): void {
    this.annotator.cancelDrawing();
    this.annotator.setDrawingEnabled(false);
  }

  /** Leave the view. */
  destroy(): void {
    this.gone = true;
    this.stops();
    this.annotator.destroy();
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
