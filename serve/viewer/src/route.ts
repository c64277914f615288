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
  /** Sentences whose heat is shown. */
  layers: string[];
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
    return {
      page: "slide",
      id: decoded(first),
      place: placeOf(query),
      q: query.get("q") ?? "",
      layers: query.getAll("layers").filter(Boolean).slice(0, 8),
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
    for (const layer of route.layers) query.append("layers", layer);
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
  return { page: "slide", id, place: null, q: "", layers: [], panel: "slide", ...more };
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
