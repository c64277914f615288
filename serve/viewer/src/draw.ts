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
  private editable: (feature: Feature) => boolean;

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
      events.drawn(feature);
    });
    this.annotator.on("updateAnnotation", (now, before) => {
      const geometry = toGeometry(now.target.selector as unknown as Shape);
      const old = toGeometry(before.target.selector as unknown as Shape);
      if (JSON.stringify(geometry) !== JSON.stringify(old)) events.moved(now.id, geometry);
    });
    this.annotator.on("selectionChanged", ([first]) => events.selected(first?.id ?? null));
  }

  /** Show these features and no others. */
  show(features: readonly Feature[]): void {
    const before = this.features;
    this.features = new Map(features.map((one) => [one.id, one]));
    const gone = [...before.keys()].filter((id) => !this.features.has(id));
    for (const id of gone) this.annotator.removeAnnotation(id);
    for (const feature of features) {
      if (before.get(feature.id) === feature) continue;
      const shape = toShape(feature.geometry);
      if (!shape) continue;
      const known = this.annotator.getAnnotationById(feature.id);
      const annotation = toAnnotation(feature, shape);
      if (!known) this.annotator.addAnnotation(annotation);
      else if (JSON.stringify(toGeometry(known.target.selector as unknown as Shape)) !== JSON.stringify(feature.geometry))
        this.annotator.updateAnnotation(annotation);
    }
    this.annotator.setStyle(this.style()); // classes, and so colours, may be others
  }

  private style(): DrawingStyleExpression<ImageAnnotation> {
    return (annotation, state) => {
      const feature = this.features.get(annotation.id);
      const colour = (feature ? colourOf(feature) : "#ff0000") as `#${string}`;
      const fillOpacity = state?.selected ? 0.25 : state?.hovered ? 0.2 : 0.1;
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

  destroy(): void {
    this.annotator.destroy();
  }
}

function noUndo(event: KeyboardEvent): void {
  if ((event.ctrlKey || event.metaKey) && ["z", "y"].includes(event.key.toLowerCase())) event.stopPropagation();
}

function toAnnotation(feature: Feature, shape: Shape): ImageAnnotation {
  const selector = shape as unknown as ImageAnnotation["target"]["selector"];
  return { id: feature.id, bodies: [], target: { annotation: feature.id, selector } };
}
