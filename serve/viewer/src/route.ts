/** The address of the page: which slide, where on it, and what is shown beside it. */

import { signal } from "@preact/signals";

/** Where a viewer looks: centre and width of the view in level-0 px, and degrees clockwise. */
export interface Place {
  x: number;
  y: number;
  w: number;
  rot: number;
}

export const PANELS = ["slide", "search", "where", "ask", "draw"] as const;
export type PanelName = (typeof PANELS)[number];

export const LEVELS = ["region", "slide", "patch"] as const;
export type Level = (typeof LEVELS)[number];
export const MODES = ["vector", "text", "hybrid"] as const;
export type Mode = (typeof MODES)[number];
export const MAX_RESULTS = 100;
export const MAX_LABELS = 8;

/** Whether a text is `name=value`, both of which are something. */
export function isLabel(text: string): boolean {
  return /^\s*[^=\s][^=]*=\s*\S/.test(text);
}

/** How is searched. A patient is no part of it: patients' ids are not written into addresses. */
export interface SearchOptions {
  level: Level;
  mode: Mode;
  /** Number of results. */
  k: number;
  split: string;
  /** Each `name=value`; those that are half written do nothing. */
  labels: string[];
  /** What is left out of what is like a region or slide: nothing, its slide, or all of its patient's. */
  without: "" | "slide" | "patient";
}

export const USUAL_SEARCH: SearchOptions = { level: "region", mode: "vector", k: 12, split: "", labels: [], without: "" };

/** How the slide's own pixels are shown; 1 leaves them as they are. */
export interface Adjustment {
  brightness: number;
  contrast: number;
  gamma: number;
}

export const PLAIN: Adjustment = { brightness: 1, contrast: 1, gamma: 1 };

export interface ArchiveRoute {
  page: "archive";
  q: string;
  label: string;
  status: string;
}

export interface SlideRoute {
  page: "slide";
  id: string;
  place: Place | null;
  /** What is searched for. */
  q: string;
  /** Id of the region or slide whose like was searched for last; empty: none. */
  like: string;
  search: SearchOptions;
  /** Sentences whose heat is shown. */
  layers: string[];
  /** How each of them is drawn, as layers.ts writes it; empty: as usual. */
  looks: string[];
  picture: Adjustment;
  /** Null: closed. */
  panel: PanelName | null;
}

export interface CompareRoute {
  page: "compare";
  left: string;
  right: string;
  sync: boolean;
  /** Where each side looks; null: all of it. */
  places: [Place | null, Place | null];
}

export type Route = ArchiveRoute | SlideRoute | CompareRoute;

/** A number with as many digits as it takes to come back the same to a hundredth of a pixel. */
function short(value: number): string {
  return String(Math.round(value * 100) / 100);
}

function placeOf(query: URLSearchParams, suffix = ""): Place | null {
  const [x, y, w] = ["x", "y", "w"].map((name) => Number.parseFloat(query.get(name + suffix) ?? ""));
  if (x === undefined || y === undefined || w === undefined) return null;
  if (!Number.isFinite(x + y + w) || w <= 0) return null;
  const rot = Number.parseFloat(query.get(`rot${suffix}`) ?? "0");
  return { x, y, w, rot: Number.isFinite(rot) ? ((rot % 360) + 360) % 360 : 0 };
}

function writePlace(query: URLSearchParams, place: Place | null, suffix = ""): void {
  if (!place) return;
  query.set(`x${suffix}`, short(place.x));
  query.set(`y${suffix}`, short(place.y));
  query.set(`w${suffix}`, short(place.w));
  if (place.rot) query.set(`rot${suffix}`, short(place.rot));
}

function searchOf(query: URLSearchParams): SearchOptions {
  const k = Math.round(Number(query.get("k")));
  const without = query.get("without");
  return {
    level: LEVELS.find((one) => one === query.get("find")) ?? USUAL_SEARCH.level,
    mode: MODES.find((one) => one === query.get("by")) ?? USUAL_SEARCH.mode,
    k: k >= 1 && k <= MAX_RESULTS ? k : USUAL_SEARCH.k,
    split: query.get("split") ?? "",
    labels: query.getAll("label").filter(isLabel).slice(0, MAX_LABELS),
    without: without === "slide" || without === "patient" ? without : "",
  };
}

function writeSearch(query: URLSearchParams, { level, mode, k, split, labels, without }: SearchOptions): void {
  if (level !== USUAL_SEARCH.level) query.set("find", level);
  if (mode !== USUAL_SEARCH.mode) query.set("by", mode);
  if (k !== USUAL_SEARCH.k) query.set("k", String(k));
  if (split) query.set("split", split);
  for (const label of labels.filter(isLabel)) query.append("label", label);
  if (without) query.set("without", without);
}

/** Brightness, contrast and gamma of an address, within what the page offers. */
function pictureOf(query: URLSearchParams): Adjustment {
  const values = (query.get("picture") ?? "").split(",").map(Number);
  const [brightness, contrast, gamma] = values.map((value) => Math.min(3, Math.max(0.3, value)));
  if (values.length !== 3 || !values.every(Number.isFinite)) return PLAIN;
  return { brightness: brightness!, contrast: contrast!, gamma: gamma! };
}

function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/** The route of an address's fragment; what is not understood is the archive. */
export function parse(hash: string): Route {
  const [path = "", search = ""] = hash.replace(/^#/, "").split(/\?(.*)/s);
  const query = new URLSearchParams(search);
  const [, kind, first, second] = path.split("/");
  if (kind === "slide" && first) {
    const panel = query.get("panel") ?? "slide";
    const layers = query.getAll("layers").filter(Boolean).slice(0, 8);
    return {
      page: "slide",
      id: decoded(first),
      place: placeOf(query),
      q: query.get("q") ?? "",
      like: query.get("like") ?? "",
      search: searchOf(query),
      layers,
      looks: layers.map((_, i) => query.getAll("looks")[i] ?? ""),
      picture: pictureOf(query),
      panel: PANELS.find((name) => name === panel) ?? null,
    };
  }
  if (kind === "compare" && first && second) {
    return {
      page: "compare",
      left: decoded(first),
      right: decoded(second),
      sync: query.get("sync") !== "0",
      places: [placeOf(query), placeOf(query, "2")],
    };
  }
  return {
    page: "archive",
    q: query.get("q") ?? "",
    label: query.get("label") ?? "",
    status: query.get("status") ?? "ready",
  };
}

/** The fragment of a route; `parse` of it is the route again. */
export function format(route: Route): string {
  const query = new URLSearchParams();
  let path = "/";
  if (route.page === "slide") {
    path = `/slide/${encodeURIComponent(route.id)}`;
    writePlace(query, route.place);
    if (route.q) query.set("q", route.q);
    if (route.like) query.set("like", route.like);
    writeSearch(query, route.search);
    for (const layer of route.layers) query.append("layers", layer);
    if (route.looks.some(Boolean)) for (const look of route.looks) query.append("looks", look);
    const { brightness, contrast, gamma } = route.picture;
    if (brightness !== 1 || contrast !== 1 || gamma !== 1) query.set("picture", [brightness, contrast, gamma].map(short).join());
    if (route.panel !== "slide") query.set("panel", route.panel ?? "none");
  } else if (route.page === "compare") {
    path = `/compare/${encodeURIComponent(route.left)}/${encodeURIComponent(route.right)}`;
    query.set("sync", route.sync ? "1" : "0");
    writePlace(query, route.places[0]);
    writePlace(query, route.places[1], "2");
  } else {
    if (route.q) query.set("q", route.q);
    if (route.label) query.set("label", route.label);
    if (route.status !== "ready") query.set("status", route.status);
  }
  const search = query.toString();
  return `#${path}${search ? `?${search}` : ""}`;
}

/** A slide's route with nothing else said. */
export function slideRoute(id: string, more: Partial<SlideRoute> = {}): SlideRoute {
  const usual = { q: "", like: "", search: USUAL_SEARCH, layers: [], looks: [], picture: PLAIN, panel: "slide" as const };
  return { page: "slide", id, place: null, ...usual, ...more };
}

/** The route shown. It changes by {@link go} and by the browser's back and forward. */
export const route = signal<Route>(parse(typeof location === "undefined" ? "" : location.hash));

/** Goes to a route; "back" returns to the one before. */
export function go(to: Route): void {
  const hash = format(to);
  if (hash !== location.hash) history.pushState(null, "", hash);
  route.value = to;
}

/** Notes in the address what has changed, without a step in the browser's history. */
export function note(now: Route): void {
  const hash = format(now);
  if (hash !== location.hash) history.replaceState(null, "", hash);
}

/** Keeps the address as it is as a step that "back" returns to. */
export function remember(): void {
  history.pushState(null, "", location.hash);
}

/** Follow the browser's back, forward and typed addresses. */
export function listen(): void {
  addEventListener("popstate", () => {
    route.value = parse(location.hash);
  });
}
