/** Draw: areas and points on a slide, named, classed, saved as they change. */

import { signal } from "@preact/signals";
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { bounds, area, CLASSES, colourOf, newFeature, toShape } from "../annotate.ts";
import type { Feature, Geometry } from "../annotate.ts";
import {
  add, begin, classify, edit, editable, exported, failed, features, load, move, outdated, put, remove, saving, selected,
  take, unsaved,
} from "../annotations.ts"; // prettier-ignore
import type { Point } from "../api.ts";
import { Areas } from "../areas.ts";
import type { Drawing, DrawTool } from "../draw.ts";
import { areaLabel } from "../scalebar.ts";
import type { Drag, SlideView } from "../slide.ts";
import { session, slide } from "../state.ts";
import { download, Failed, fileName, focusSoon, Swatch } from "./parts.tsx";

/** Rows of the list that are made at first, and with each press of the button below. */
const ROWS = 100;

const DOUBLE_MS = 600;

/** How near the pointer must come, CSS px: to points, and to outlines of areas. */
const REACH = { point: 12, area: 3 };

const tool = signal<DrawTool | "point" | "cross" | null>(null);
const corners = signal<Point[]>([]);
/** What lies under the pointer. */
const hovered = signal<string | null>(null);
/** When something was drawn last. */
let drawnAt = 0;

export function Annotations({ view }: { view: SlideView | null }) {
  /** The part that draws, which is large, so it is fetched when somebody comes to draw. */
  const [Maker, setMaker] = useState<typeof Drawing | null>(null);
  const drawing = useRef<Drawing | null>(null);
  const areas = useMemo(() => new Areas(), [view]);
  const can = session.value?.can.annotate ?? false;
  const id = slide.value?.slide_id;
  const now = features.value.find((one) => one.id === selected.value) ?? null;
  /** What Annotorious draws, with handles. */
  const edited = Maker && now && toShape(now.geometry) && editable(now) ? now : null;
  const kind = tool.value === "rectangle" || tool.value === "polygon" ? tool.value : null;
  const busy = edited !== null || kind !== null;

  useEffect(() => {
    if (!view || id === undefined) return;
    const end = begin(id);
    return () => {
      tool.value = hovered.value = null;
      corners.value = [];
      end();
    };
  }, [view, id]);
  useEffect(() => {
    if (can) import("../draw.ts").then((part) => setMaker(() => part.Drawing), cannotDraw);
  }, [can]);

  // Before the next click, which may already draw.
  useLayoutEffect(() => {
    if (!view || !id || !Maker || !busy) return;
    try {
      drawing.current = new Maker(view, {
        drawn: (feature) => drawn(id, feature),
        moved: (one, geometry) => void edit(id, one, {}, geometry),
        left: (one) => selected.value === one && (selected.value = null),
      });
    } catch (error) {
      tool.value = null;
      setMaker(null);
      cannotDraw(error);
    }
    return () => {
      drawing.current?.destroy();
      drawing.current = null;
    };
  }, [view, id, Maker, busy]);
  useLayoutEffect(() => drawing.current?.edit(edited), [edited]);
  useLayoutEffect(() => {
    if (kind) drawing.current?.start(kind);
    else drawing.current?.stop();
  }, [kind]);

  useEffect(() => {
    areas.show(features.value);
    view?.redraw();
  }, [areas, features.value]);
  useEffect(() => {
    if (!view) return;
    return view.paint((context) => {
      const marked = { edited: edited?.id ?? null, selected: selected.value, hovered: hovered.value };
      areas.paint(context, view.box(), view.turn(), marked);
      paintMarks(context, view);
    });
  }, [view, areas, edited?.id]);
  useEffect(() => view?.redraw(), [view, corners.value, tool.value, selected.value, hovered.value, edited?.id]);
  useEffect(() => {
    if (!view || !id) return;
    const under = (place: Point) =>
      markAt(view, place)?.id ?? areas.at(place, REACH.area * view.level0PerPixel());
    const stops = [
      view.onClick((place) => {
        if (tool.value === "point") drawn(id, point(place));
        else if (tool.value === "cross") corners.value = [...corners.value, place];
        else if (tool.value === null) {
          const found = under(place);
          // Whether an area that is edited is left, Annotorious knows better: its handles stand out.
          if (found || selected.value !== edited?.id) selected.value = found;
          return found !== null;
        } else return false;
        return true;
      }, true),
      // A double click ends a polygon: it does not zoom as well.
      view.onDoubleClick(() => tool.value !== null || performance.now() - drawnAt < DOUBLE_MS),
      view.onDrag((place) => (tool.value === null ? dragOf(id, markAt(view, place), place) : null)),
      view.onPointer((place) => {
        hovered.value = tool.value === null ? under(place) : null;
        view.element.classList.toggle("over-mark", hovered.value !== null);
      }),
    ];
    return () => {
      for (const stop of stops) stop();
      view.element.classList.remove("over-mark");
    };
  }, [view, id, areas, edited?.id]);

  if (!view || !id) return <p class="hint">Opening the slide…</p>;
  return (
    <div class="panel-part">
      {can ? (
        <Tools view={view} areas={Maker !== null} slideId={id} />
      ) : (
        <p class="hint">
          You can look at annotations here. Drawing needs a token with the scope “annotate”.
        </p>
      )}
      <p role="status" class="hint">
        {saving.value > 0 ? "Saving…" : status()}
      </p>
      {outdated.value > 0 && (
        <p class="hint">
          {outdated.value} {outdated.value === 1 ? "annotation was" : "annotations were"} drawn on another file of this
          slide. They are not shown, as their places would not be true.
        </p>
      )}
      <Failed text={failed.value?.text ?? null}>
        {failed.value?.then === "load" && (
          <button type="button" class="small" onClick={() => void load(id)}>
            Load the annotations again
          </button>
        )}
        {failed.value?.then === "save" && (
          <button type="button" class="small" onClick={() => unsaved.value.forEach((one) => void put(id, one))}>
            Save again
          </button>
        )}
      </Failed>
      <List view={view} slideId={id} />
      <Files slideId={id} />
    </div>
  );
}

function cannotDraw(error: unknown): void {
  console.error(error);
  failed.value = { text: "Areas cannot be drawn by mouse here: this needs WebGL. Points, and “By keys”, work.", then: null };
}

function status(): string {
  const count = features.value.length;
  if (!count) {
    const all = session.value?.scopes.includes("admin");
    return all ? "Nothing is drawn on this slide yet." : "You have drawn nothing on this slide yet.";
  }
  const lost = unsaved.value.size;
  const told = lost === 0 ? "all saved" : lost === 1 ? "one not saved" : `${lost} not saved`;
  return `${count} ${count === 1 ? "annotation" : "annotations"}, ${told}.`;
}

// -- drawing ---------------------------------------------------------------------------------------

interface ToolsProps {
  view: SlideView;
  /** Whether areas can be drawn with the pointer. */
  areas: boolean;
  slideId: string;
}

function Tools({ view, areas, slideId }: ToolsProps) {
  const choose = (wanted: typeof tool.value) => {
    const next = tool.value === wanted ? null : wanted;
    corners.value = [];
    tool.value = next;
    if (next) selected.value = null;
  };
  useEffect(() => {
    const escape = (event: KeyboardEvent) => {
      if (event.key === "Escape" && tool.value) choose(null);
    };
    addEventListener("keydown", escape);
    return () => removeEventListener("keydown", escape);
  }, []);
  return (
    <>
      <div class="tools-of-draw" role="group" aria-label="Draw">
        {TOOLS.map(({ name, label, area: isArea }) => (
          <button
            key={name}
            type="button"
            aria-pressed={tool.value === name}
            disabled={isArea && !areas}
            onClick={() => choose(name)}
          >
            {label}
          </button>
        ))}
      </div>
      <p class="hint">{HELP[tool.value ?? "none"]}</p>
      {tool.value === "cross" && <Cross view={view} slideId={slideId} onEnd={() => choose(null)} />}
    </>
  );
}

/** The tools; those of areas need Annotorious. */
const TOOLS = [
  { name: "rectangle", label: "Rectangle", area: true },
  { name: "polygon", label: "Polygon", area: true },
  { name: "point", label: "Point", area: false },
  { name: "cross", label: "By keys", area: false },
] as const;

const HELP = {
  none: "Choose what to draw, or click an annotation to change it.",
  rectangle: "Drag from one corner to the other. Escape ends drawing.",
  polygon: "Click corner by corner; click the first one again, or double-click, to end.",
  point: "Click where the point shall be.",
  cross: "Move the slide with the arrow keys until a corner lies under the cross, then set it.",
};

/** Drawing without a pointer: corners are set in the middle of the view. */
function Cross({ view, slideId, onEnd }: { view: SlideView; slideId: string; onEnd: () => void }) {
  const count = corners.value.length;
  const set = () => (corners.value = [...corners.value, middle(view)]);
  const finish = () => {
    const points = corners.value;
    onEnd();
    drawn(slideId, count === 1 ? point(points[0]!) : polygon(points));
    focusSoon("draw-name");
  };
  return (
    <div class="row">
      <button type="button" onClick={set}>
        Set corner {count + 1}
      </button>
      <button type="button" disabled={!count} onClick={() => (corners.value = corners.value.slice(0, -1))}>
        Take back
      </button>
      <button type="button" class="primary" disabled={count === 0 || count === 2} onClick={finish}>
        {count === 1 ? "Save as a point" : "Finish"}
      </button>
    </div>
  );
}

/** Take what was drawn, and put the tool away. */
function drawn(slideId: string, feature: Feature): void {
  drawnAt = performance.now();
  tool.value = null;
  void add(slideId, feature);
}

function point([x, y]: Point): Feature {
  const geometry: Geometry = { type: "Point", coordinates: [short(x), short(y)] };
  const properties = { objectType: "annotation", name: "", revision: 0 };
  return { type: "Feature", id: crypto.randomUUID(), geometry, properties };
}

function middle(view: SlideView): Point {
  const { x, y } = view.place();
  return [x, y];
}

/** A coordinate as pathflip writes it. */
function short(value: number): number {
  return Math.round(value * 100) / 100;
}

function polygon(points: Point[]): Feature {
  return newFeature(crypto.randomUUID(), toShape({ type: "Polygon", coordinates: [points] })!);
}

/** The point under the pointer, the one last drawn first. */
function markAt(view: SlideView, place: Point): Feature | undefined {
  const reach = REACH.point * view.level0PerPixel();
  const near = ([x, y]: Point) => Math.hypot(x - place[0], y - place[1]) <= reach;
  return features.value.findLast(({ geometry }) => {
    if (geometry.type === "Point") return near(geometry.coordinates);
    return geometry.type === "MultiPoint" && geometry.coordinates.some(near);
  });
}

/** Drag a point that one may change: it is saved where it is let go. */
function dragOf(slideId: string, feature: Feature | undefined, from: Point): Drag | null {
  if (feature?.geometry.type !== "Point" || !editable(feature)) return null;
  const { id, geometry } = feature;
  const [right, down] = [geometry.coordinates[0] - from[0], geometry.coordinates[1] - from[1]];
  let to: Geometry | null = null;
  return {
    move: ([x, y]) => {
      selected.value = id;
      move(id, (to = { type: "Point", coordinates: [short(x + right), short(y + down)] }));
    },
    end: () => to && void edit(slideId, id, {}, to),
  };
}

/** Paint what is no area, and what is being drawn with keys. */
function paintMarks(context: CanvasRenderingContext2D, view: SlideView): void {
  const line = (points: Point[], colour: string) => {
    for (const [width, stroke] of [[4, "rgb(255 255 255 / 80%)"], [2, colour]] as const) {
      context.beginPath();
      points.forEach((at, i) => context[i ? "lineTo" : "moveTo"](...view.toScreen(...at)));
      context.lineWidth = width;
      context.strokeStyle = stroke;
      context.stroke();
    }
  };
  const dot = (at: Point, colour: string, radius: number) => {
    context.beginPath();
    context.arc(...view.toScreen(...at), radius, 0, 2 * Math.PI);
    context.fillStyle = colour;
    context.fill();
    context.lineWidth = 2;
    context.strokeStyle = "#fff";
    context.stroke();
  };
  for (const feature of features.value) {
    const { geometry } = feature;
    const colour = colourOf(feature);
    const radius = feature.id === selected.value ? 8 : 6;
    if (geometry.type === "Point") dot(geometry.coordinates, colour, radius);
    if (geometry.type === "MultiPoint") geometry.coordinates.forEach((at) => dot(at, colour, radius));
    if (geometry.type === "LineString") line(geometry.coordinates, colour);
    if (geometry.type === "MultiLineString") geometry.coordinates.forEach((one) => line(one, colour));
  }
  if (tool.value !== "cross") return;
  if (corners.value.length) line([...corners.value, middle(view), corners.value[0]!], "#1a5fd0");
  for (const at of corners.value) dot(at, "#1a5fd0", 4);
  view.cross(context);
}

// -- the list --------------------------------------------------------------------------------------

function List({ view, slideId }: { view: SlideView; slideId: string }) {
  const [rows, setRows] = useState(ROWS);
  if (!features.value.length) return null;
  const shown = features.value.slice(0, rows);
  const others = features.value.find((one) => one.id === selected.value && !shown.includes(one));
  return (
    <>
      <ul class="drawn" aria-label="Annotations">
        {[...shown, ...(others ? [others] : [])].map((feature) => (
          <li key={feature.id}>
            <Row feature={feature} view={view} />
            {feature.id === selected.value && <Editor key={feature.id} feature={feature} slideId={slideId} view={view} />}
          </li>
        ))}
      </ul>
      {features.value.length > rows && (
        <button type="button" onClick={() => setRows(rows + ROWS)}>
          Show more of {features.value.length}
        </button>
      )}
    </>
  );
}

function Row({ feature, view }: { feature: Feature; view: SlideView }) {
  const { name, classification, author } = feature.properties;
  const mine = author === undefined || author === session.value?.name;
  const mpp = slide.value?.mpp ?? 0;
  const size = area(feature.geometry);
  const measure = size > 0 ? areaLabel(size * mpp * mpp, 3) : KINDS[feature.geometry.type];
  return (
    <button
      type="button"
      class="plain"
      aria-current={feature.id === selected.value ? "true" : undefined}
      aria-expanded={feature.id === selected.value}
      onClick={() => {
        if (feature.id === selected.value) return void (selected.value = null);
        selected.value = feature.id;
        flyTo(view, feature);
      }}
    >
      <Swatch colour={colourOf(feature)} />
      <span>{name || classification?.name || "Unnamed"}</span>
      <span class="sub">
        {name && classification ? `${classification.name}, ` : ""}
        {measure}
        {mine ? "" : `, by ${author}`}
      </span>
    </button>
  );
}

const KINDS: Record<Geometry["type"], string> = {
  Point: "point",
  MultiPoint: "points",
  LineString: "line",
  MultiLineString: "lines",
  Polygon: "area",
  MultiPolygon: "areas",
};

/** Show a feature with some of what is around it; of a point, 200 µm. */
function flyTo(view: SlideView, feature: Feature): void {
  const { x0, y0, w0, h0 } = bounds(feature.geometry);
  const margin = Math.max(0.25 * Math.max(w0, h0), 100 / (slide.value?.mpp || 1));
  view.fly(x0 - margin, y0 - margin, w0 + 2 * margin, h0 + 2 * margin);
}

function Editor({ feature, slideId, view }: { feature: Feature; slideId: string; view: SlideView }) {
  const { name, classification, author, updated } = feature.properties;
  const [sure, setSure] = useState(false);
  if (!editable(feature))
    return (
      <div class="editor">
        <p class="hint">
          Drawn by {author ?? "nobody known"}
          {updated ? `, ${dateText(updated)}` : ""}.
        </p>
      </div>
    );
  const names = new Set([...CLASSES, ...features.value.map((one) => one.properties.classification)].map((one) => one?.name));
  return (
    <div class="editor">
      <Field
        id="draw-name"
        label="Name"
        most={500}
        value={name ?? ""}
        set={(value) => void edit(slideId, feature.id, { name: value })}
      />
      <Field
        id="draw-class"
        label="Class"
        most={200}
        list="draw-classes"
        value={classification?.name ?? ""}
        set={(value) => void classify(slideId, feature.id, value)}
      />
      <datalist id="draw-classes">
        {[...names].map((one) => one && <option key={one} value={one} />)}
      </datalist>
      {feature.geometry.type === "Point" && (
        <p class="row">
          <button type="button" onClick={() => void edit(slideId, feature.id, {}, point(middle(view)).geometry)}>
            Move to the middle of the view
          </button>
          <span class="hint">or drag it</span>
        </p>
      )}
      <div class="row">
        {sure ? (
          <>
            <button type="button" onClick={() => void remove(slideId, feature).then(() => focusSoon("tab-draw"))}>
              Delete for good
            </button>
            <button type="button" id="draw-keep" onClick={() => (setSure(false), focusSoon("draw-delete"))}>
              Keep it
            </button>
          </>
        ) : (
          <button type="button" id="draw-delete" onClick={() => (setSure(true), focusSoon("draw-keep"))}>
            Delete
          </button>
        )}
        {updated && <span class="hint">Saved {dateText(updated)}</span>}
      </div>
    </div>
  );
}

interface FieldProps {
  id: string;
  label: string;
  most: number;
  value: string;
  list?: string;
  set: (value: string) => void;
}

/** A text that is saved when it is left; what is typed stays while something else is saved. */
function Field({ id, label, most, value, list, set }: FieldProps) {
  const [draft, setDraft] = useState<string | null>(null);
  return (
    <>
      <label for={id}>{label}</label>
      <input
        id={id}
        type="text"
        maxLength={most}
        list={list}
        value={draft ?? value}
        onInput={(event) => setDraft(event.currentTarget.value)}
        onBlur={() => {
          if (draft !== null && draft.trim() !== value) set(draft.trim());
          setDraft(null);
        }}
        onKeyDown={(event) => {
          if (event.key === "Enter") event.currentTarget.blur();
        }}
      />
    </>
  );
}

function dateText(iso: string): string {
  const at = new Date(iso);
  if (Number.isNaN(at.getTime())) return iso;
  return at.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

// -- files -----------------------------------------------------------------------------------------

function Files({ slideId }: { slideId: string }) {
  const input = useRef<HTMLInputElement>(null);
  return (
    <div class="row">
      <button type="button" disabled={!features.value.length} onClick={() => void save(slideId)}>
        Save for QuPath
      </button>
      {session.value?.can.annotate && (
        <>
          <button type="button" onClick={() => input.current?.click()}>
            Load from QuPath
          </button>
          <input
            ref={input}
            type="file"
            hidden
            aria-label="GeoJSON file of QuPath"
            accept=".geojson,.json,application/geo+json,application/json"
            onChange={(event) => {
              const file = event.currentTarget.files?.[0];
              event.currentTarget.value = "";
              if (file) void take(slideId, file);
            }}
          />
        </>
      )}
    </div>
  );
}

async function save(slideId: string): Promise<void> {
  const objects = await exported(slideId);
  if (objects) download(`${fileName(slideId, "annotations")}.geojson`, objects);
}
