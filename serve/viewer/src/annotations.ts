/** Annotations of the open slide: loaded, changed, saved one by one, imported. */

import { signal } from "@preact/signals";
import { classOf, readCollection } from "./annotate.ts";
import type { Feature, FeatureCollection, Geometry, Properties } from "./annotate.ts";
import { api, Problem, slidePath } from "./api.ts";
import { notice, report, session, slide, tell } from "./state.ts";

export const features = signal<Feature[]>([]);
export const selected = signal<string | null>(null);
export const failed = signal<{ text: string; then: "load" | "save" | null } | null>(null);
/** Saves that have no answer yet. */
export const saving = signal(0);
/** Annotations of other bytes of this slide, which are not shown. */
export const outdated = signal(0);
/** Annotations with a change that could not be saved. */
export const unsaved = signal<ReadonlySet<string>>(new Set());

/** Class that was given last: the next annotation has it too. */
let lastClass = "";
let loads = 0;
/** What was drawn, changed or deleted since the annotations were asked for last: it is newer than the answer. */
const touched = new Set<string>();

/** Whether this client may change a feature: its own, and with the scope `admin` everybody's. */
export function editable({ properties: { author } }: Feature): boolean {
  const who = session.value;
  if (!who?.can.annotate) return false;
  return who.scopes.includes("admin") || author === undefined || author === who.name;
}

/** Begin with a slide's annotations; returns what ends it. */
export function begin(slideId: string): () => void {
  features.value = [];
  selected.value = failed.value = null;
  outdated.value = 0;
  unsaved.value = new Set();
  void load(slideId);
  const stay = (event: BeforeUnloadEvent) => {
    if (unsaved.value.size || saving.value) event.preventDefault();
  };
  addEventListener("beforeunload", stay);
  return () => {
    removeEventListener("beforeunload", stay);
    const lost = unsaved.value.size;
    if (!lost) return;
    const what = lost === 1 ? "One annotation" : `${lost} annotations`;
    notice.value = { kind: "error", text: `${what} of ${slideId} could not be saved, and the change is lost.` };
  };
}

/** Say what went wrong with a slide, and offer to load again, or to save again what is not saved. */
function fail(slideId: string, error: unknown, doing: string, then: "load" | "save" | null): void {
  if (slide.value?.slide_id !== slideId) return report(error);
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

export async function load(slideId: string): Promise<void> {
  const mine = ++loads;
  failed.value = null;
  touched.clear();
  try {
    const found = await api.get<FeatureCollection & { outdated?: number }>(slidePath(slideId, "annotations"));
    if (mine !== loads) return;
    const kept = features.value.filter((one) => touched.has(one.id));
    features.value = [...found.features.filter((one) => !touched.has(one.id)), ...kept];
    outdated.value = found.outdated ?? 0;
    unsaved.value = new Set([...unsaved.value].filter((one) => touched.has(one)));
  } catch (error) {
    if (mine === loads) fail(slideId, error, "Loading the annotations", "load");
  }
}

/** Take a new annotation, with the class that was given last, and save it. */
export async function add(slideId: string, feature: Feature): Promise<void> {
  const classification = classOf(lastClass, features.value);
  const properties = { ...feature.properties, ...(classification && { classification }) };
  touched.add(feature.id);
  features.value = [...features.value, { ...feature, properties }];
  selected.value = feature.id;
  await put(slideId, feature.id);
}

/** Give an annotation another shape, which is not saved yet. */
export function move(id: string, geometry: Geometry): void {
  touched.add(id);
  features.value = features.value.map((one) => (one.id === id ? { ...one, geometry } : one));
}

export async function edit(slideId: string, id: string, more: Partial<Properties>, geometry?: Geometry): Promise<void> {
  touched.add(id);
  features.value = features.value.map((one) =>
    one.id === id
      ? { ...one, geometry: geometry ?? one.geometry, properties: { ...one.properties, ...more } }
      : one,
  );
  await put(slideId, id);
}

/** Give an annotation a class, and the next one too. */
export function classify(slideId: string, id: string, name: string): Promise<void> {
  lastClass = name;
  return edit(slideId, id, { classification: classOf(name, features.value) });
}

/** Saves of one annotation, one after the other: each needs the revision that the one before made. */
const queues = new Map<string, Promise<void>>();

export function put(slideId: string, id: string): Promise<void> {
  const next = (queues.get(id) ?? Promise.resolve())
    .then(() => putNow(slideId, id))
    .finally(() => {
      if (queues.get(id) === next) queues.delete(id);
    });
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
    if (!unsaved.value.size && failed.value?.then === "save") failed.value = null;
  } catch (error) {
    if (slide.value?.slide_id === slideId) mark(id, true);
    fail(slideId, error, "Saving", "save");
  } finally {
    saving.value--;
  }
}

function mark(id: string, lost: boolean): void {
  if (unsaved.value.has(id) === lost) return;
  const others = [...unsaved.value].filter((one) => one !== id);
  unsaved.value = new Set(lost ? [...others, id] : others);
}

export async function remove(slideId: string, feature: Feature): Promise<void> {
  touched.add(feature.id);
  await queues.get(feature.id);
  try {
    await api.del(slidePath(slideId, "annotations", feature.id));
  } catch (error) {
    // What could not be saved at first is not there to be deleted.
    if (!(error instanceof Problem && error.status === 404 && unsaved.value.has(feature.id)))
      return fail(slideId, error, "Deleting", null);
  }
  features.value = features.value.filter((one) => one.id !== feature.id);
  mark(feature.id, false);
  if (selected.value === feature.id) selected.value = null;
  tell("The annotation is deleted.");
}

/** The annotations as QuPath takes them, which crops slides that state bounds. */
export async function exported(slideId: string): Promise<object | null> {
  try {
    return await api.get<object>(`${slidePath(slideId, "annotations")}?qupath=true`);
  } catch (error) {
    fail(slideId, error, "Saving the file", null);
    return null;
  }
}

/** Take the annotations of a file of QuPath. */
export async function take(slideId: string, file: File): Promise<void> {
  failed.value = null;
  try {
    if (file.size > 9_000_000) throw new Problem("This file is larger than the 9 MB that are taken at once.", "large", 0);
    const path = `${slidePath(slideId, "annotations", "import")}?qupath=true`;
    const { imported } = await api.post<{ imported: number }>(path, readCollection(await file.text()));
    if (slide.value?.slide_id === slideId) await load(slideId);
    tell(`${imported} ${imported === 1 ? "annotation was" : "annotations were"} loaded.`);
  } catch (error) {
    if (error instanceof Problem || !(error instanceof Error)) fail(slideId, error, "Loading the file", null);
    else failed.value = { text: error.message, then: null }; // of readCollection: a sentence
  }
}
