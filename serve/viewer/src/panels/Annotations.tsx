/** Draw: areas and points on a slide, named, classed, saved as they change. */

import { signal } from "@preact/signals";
import { useEffect, useRef, useState } from "preact/hooks";
import { bounds, area, classOf, CLASSES, colourOf, newFeature, readCollection, toShape } from "../annotate.ts";
import type { Feature, FeatureCollection, Geometry, Point, Properties } from "../annotate.ts";
import { api, Problem, slidePath } from "../api.ts";
import type { Drawing, DrawTool } from "../draw.ts";
import { areaLabel } from "../scalebar.ts";
import type { SlideView } from "../slide.ts";
import { session, slide, tell } from "../state.ts";
import { download, Failed, fileName, Swatch } from "./parts.tsx";

/** Rows of the list that are made at first, and with each press of the button below. */
const ROWS = 100;

const DOUBLE_MS = 600;

const features = signal<Feature[]>([]);
const selected = signal<string | null>(null);
const tool = signal<DrawTool | "point" | "cross" | null>(null);
const corners = signal<Point[]>([]);
const failed = signal<{ text: string; then: "load" | "save" | null } | null>(null);
const saving = signal(0);
/** Annotations of other bytes of this slide, which are not shown. */
const outdated = signal(0);
/** Annotations with a change that could not be saved. */
const unsaved = signal<ReadonlySet<string>>(new Set());
/** Class that was given last: the next annotation has it too. */
const lastClass = signal("");
/** When something was drawn last. */
let drawnAt = 0;

export function Annotations({ view }: { view: SlideView | null }) {
  const [drawing, setDrawing] = useState<Drawing | null>(null);
  const can = session.value?.can.annotate ?? false;
  const id = slide.value?.slide_id;

  useEffect(() => {
    if (!view || id === undefined) return;
    features.value = [];
    selected.value = tool.value = failed.value = null;
    unsaved.value = new Set();
    corners.value = [];
    let made: Drawing | null = null;
    let ended = false;
    void load(id);
    // The part that draws is large, so it is fetched when somebody comes to draw.
    void import("../draw.ts").then(
      ({ Drawing: Made }) => {
        if (ended) return;
        made = new Made(view, editable, {
          drawn: (feature) => void drawn(id, feature),
          moved: (one, geometry) => void edit(id, one, {}, geometry),
          selected: (one) => (selected.value = one ?? (isMark(selected.value) ? selected.value : null)),
        });
        setDrawing(made);
      },
      (error: unknown) => {
        console.error(error);
        failed.value = { text: "Drawing needs WebGL, which this browser does not offer. Points can be set.", then: null };
      },
    );
    return () => {
      ended = true;
      made?.leave();
      setDrawing(null);
      tool.value = null;
    };
  }, [view, id]);

  useEffect(() => drawing?.show(features.value), [drawing, features.value]);
  useEffect(() => drawing?.select(selected.value), [drawing, selected.value]);
  useEffect(() => (view ? view.paint((context) => paintMarks(context, view)) : undefined), [view]);
  useEffect(() => view?.redraw(), [features.value, corners.value, tool.value, selected.value]);
  useEffect(() => {
    if (!view || !id) return;
    const clicks = view.onClick((place) => {
      if (tool.value === "point") void drawn(id, point(place));
      else if (tool.value === "cross") corners.value = [...corners.value, place];
      else if (tool.value === null) return selectMark(view, place);
      else return false;
      return true;
    }, true);
    // A double click ends a polygon: it does not zoom as well.
    const doubles = view.onDoubleClick(() => tool.value !== null || performance.now() - drawnAt < DOUBLE_MS);
    return () => {
      clicks();
      doubles();
    };
  }, [view, id]);

  if (!view || !id) return <p class="hint">Opening the slide…</p>;
  return (
    <div class="panel-part">
      {can ? (
        <Tools view={view} drawing={drawing} slideId={id} />
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

/** Whether this client may change a feature: its own, and with the scope `admin` everybody's. */
function editable(feature: Feature): boolean {
  const who = session.value;
  if (!who?.can.annotate) return false;
  if (who.scopes.includes("admin")) return true;
  return feature.properties.author === undefined || feature.properties.author === who.name;
}

// -- drawing ---------------------------------------------------------------------------------------

interface ToolsProps {
  view: SlideView;
  drawing: Drawing | null;
  slideId: string;
}

function Tools({ view, drawing, slideId }: ToolsProps) {
  const choose = (wanted: typeof tool.value) => {
    const next = tool.value === wanted ? null : wanted;
    drawing?.stop();
    corners.value = [];
    tool.value = next;
    if (next === "rectangle" || next === "polygon") drawing?.start(next);
    if (next) selected.value = null;
  };
  useEffect(() => {
    const escape = (event: KeyboardEvent) => {
      if (event.key === "Escape" && tool.value) choose(null);
    };
    addEventListener("keydown", escape);
    return () => removeEventListener("keydown", escape);
  }, [drawing]);
  const Tool = ({ name, label, off }: { name: NonNullable<typeof tool.value>; label: string; off?: boolean }) => (
    <button type="button" aria-pressed={tool.value === name} disabled={off} onClick={() => choose(name)}>
      {label}
    </button>
  );
  return (
    <>
      <div class="tools-of-draw" role="group" aria-label="Draw">
        <Tool name="rectangle" label="Rectangle" off={!drawing} />
        <Tool name="polygon" label="Polygon" off={!drawing} />
        <Tool name="point" label="Point" />
        <Tool name="cross" label="By keys" />
      </div>
      <p class="hint">{HELP[tool.value ?? "none"]}</p>
      {tool.value === "cross" && <Cross view={view} slideId={slideId} onEnd={() => choose(null)} />}
    </>
  );
}

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
  const set = () => {
    const { x, y } = view.place();
    corners.value = [...corners.value, [x, y]];
  };
  const finish = () => {
    const points = corners.value;
    onEnd();
    void drawn(slideId, count === 1 ? point(points[0]!) : polygon(points));
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

function point([x, y]: Point): Feature {
  const short = (value: number) => Math.round(value * 100) / 100;
  const geometry: Geometry = { type: "Point", coordinates: [short(x), short(y)] };
  const properties = { objectType: "annotation", name: "", revision: 0 };
  return { type: "Feature", id: crypto.randomUUID(), geometry, properties };
}

function polygon(points: Point[]): Feature {
  return newFeature(crypto.randomUUID(), toShape({ type: "Polygon", coordinates: [points] })!);
}

function isMark(id: string | null): boolean {
  const feature = features.value.find((one) => one.id === id);
  return feature !== undefined && toShape(feature.geometry) === null;
}

/** Select the point that was clicked at; areas are Annotorious's. */
function selectMark(view: SlideView, place: Point): boolean {
  const reach = 9 * view.level0PerPixel();
  const near = ([x, y]: Point) => Math.hypot(x - place[0], y - place[1]) <= reach;
  const found = features.value.find(({ geometry }) => {
    if (geometry.type === "Point") return near(geometry.coordinates);
    return geometry.type === "MultiPoint" && geometry.coordinates.some(near);
  });
  if (found) selected.value = found.id;
  else if (isMark(selected.value)) selected.value = null;
  return found !== undefined;
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
  const { x, y } = view.place();
  if (corners.value.length) line([...corners.value, [x, y], corners.value[0]!], "#1a5fd0");
  for (const at of corners.value) dot(at, "#1a5fd0", 4);
  const [left, top] = view.toScreen(x, y);
  for (const [width, stroke] of [[4, "rgb(0 0 0 / 60%)"], [1.5, "#fff"]] as const) {
    context.beginPath();
    context.moveTo(left - 10, top);
    context.lineTo(left + 10, top);
    context.moveTo(left, top - 10);
    context.lineTo(left, top + 10);
    context.lineWidth = width;
    context.strokeStyle = stroke;
    context.stroke();
  }
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
            {feature.id === selected.value && <Editor key={feature.id} feature={feature} slideId={slideId} />}
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

function Editor({ feature, slideId }: { feature: Feature; slideId: string }) {
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
        set={(value) => {
          lastClass.value = value;
          void edit(slideId, feature.id, { classification: classOf(value, features.value) });
        }}
      />
      <datalist id="draw-classes">
        {[...names].map((one) => one && <option key={one} value={one} />)}
      </datalist>
      <div class="row">
        {sure ? (
          <>
            <button type="button" onClick={() => void remove(slideId, feature)}>
              Delete for good
            </button>
            <button type="button" onClick={() => setSure(false)}>
              Keep it
            </button>
          </>
        ) : (
          <button type="button" onClick={() => setSure(true)}>
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

// -- the service -----------------------------------------------------------------------------------

/** Say what went wrong, and offer to load again, or to save again what is not saved. */
function report(error: unknown, doing: string, then: "load" | "save" | null): void {
  if (!(error instanceof Problem)) {
    console.error(error);
    failed.value = { text: `${doing} failed.`, then };
  } else if (error.code === "stale") {
    const text =
      "This annotation has been changed elsewhere since you loaded it, so your change is not saved. " +
      "Load the annotations again, then change it anew.";
    failed.value = { text, then: "load" };
  } else failed.value = { text: error.message, then };
}

async function load(slideId: string): Promise<void> {
  failed.value = null;
  try {
    const found = await api.get<FeatureCollection & { outdated?: number }>(slidePath(slideId, "annotations"));
    if (slide.value?.slide_id !== slideId) return;
    features.value = found.features;
    outdated.value = found.outdated ?? 0;
    unsaved.value = new Set();
  } catch (error) {
    report(error, "Loading the annotations", "load");
  }
}

async function drawn(slideId: string, feature: Feature): Promise<void> {
  const classification = classOf(lastClass.value, features.value);
  const properties = { ...feature.properties, ...(classification && { classification }) };
  const made = { ...feature, properties };
  drawnAt = performance.now();
  features.value = [...features.value, made];
  tool.value = null;
  selected.value = made.id;
  await put(slideId, made.id);
}

async function edit(slideId: string, id: string, more: Partial<Properties>, geometry?: Geometry): Promise<void> {
  features.value = features.value.map((one) =>
    one.id === id
      ? { ...one, geometry: geometry ?? one.geometry, properties: { ...one.properties, ...more } }
      : one,
  );
  await put(slideId, id);
}

/** Saves of one annotation, one after the other: each needs the revision that the one before made. */
const queues = new Map<string, Promise<void>>();

function put(slideId: string, id: string): Promise<void> {
  const next = (queues.get(id) ?? Promise.resolve()).then(() => putNow(slideId, id));
  queues.set(id, next);
  return next;
}

async function putNow(slideId: string, id: string): Promise<void> {
  const feature = features.value.find((one) => one.id === id);
  if (!feature || slide.value?.slide_id !== slideId) return;
  saving.value++;
  try {
    const stored = await api.put<Feature>(slidePath(slideId, "annotations", id), feature);
    // What was changed meanwhile stays; the next save needs the new revision.
    features.value = features.value.map((one) => {
      if (one.id !== id) return one;
      if (one === feature) return stored;
      const { author, revision, updated } = stored.properties;
      const known = { ...(author && { author }), ...(revision !== undefined && { revision }), ...(updated && { updated }) };
      return { ...one, properties: { ...one.properties, ...known } };
    });
    mark(id, false);
    if (!unsaved.value.size) failed.value = null;
  } catch (error) {
    mark(id, true);
    report(error, "Saving", "save");
  } finally {
    saving.value--;
  }
}

function mark(id: string, lost: boolean): void {
  if (unsaved.value.has(id) === lost) return;
  const others = [...unsaved.value].filter((one) => one !== id);
  unsaved.value = new Set(lost ? [...others, id] : others);
}

async function remove(slideId: string, feature: Feature): Promise<void> {
  await queues.get(feature.id);
  try {
    await api.del(slidePath(slideId, "annotations", feature.id));
    features.value = features.value.filter((one) => one.id !== feature.id);
    mark(feature.id, false);
    if (selected.value === feature.id) selected.value = null;
    tell("The annotation is deleted.");
  } catch (error) {
    report(error, "Deleting", null);
  }
}

async function save(slideId: string): Promise<void> {
  try {
    // QuPath crops slides that state bounds, so its files count from there.
    const objects = await api.get<object>(`${slidePath(slideId, "annotations")}?qupath=true`);
    download(`${fileName(slideId, "annotations")}.geojson`, objects);
  } catch (error) {
    report(error, "Saving the file", null);
  }
}

async function take(slideId: string, file: File): Promise<void> {
  failed.value = null;
  try {
    if (file.size > 9_000_000) throw new Problem("This file is larger than the 9 MB that are taken at once.", "large", 0);
    const path = `${slidePath(slideId, "annotations", "import")}?qupath=true`;
    const { imported } = await api.post<{ imported: number }>(path, readCollection(await file.text()));
    await load(slideId);
    tell(`${imported} ${imported === 1 ? "annotation was" : "annotations were"} loaded.`);
  } catch (error) {
    if (error instanceof Problem) report(error, "Loading the file", null);
    else failed.value = { text: error instanceof Error ? error.message : "The file could not be read.", then: null };
  }
}
