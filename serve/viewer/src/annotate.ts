/**
 * Annotations as QuPath's GeoJSON, as shapes that can be drawn and edited, and their measures.
 *
 * Everything is in level-0 px, which are the image pixels of the viewer too.
 */

import type { Box, Point } from "./api.ts";
import { areaUm2 } from "./measure.ts";

export type Geometry =
  | { type: "Point"; coordinates: Point }
  | { type: "MultiPoint"; coordinates: Point[] }
  | { type: "LineString"; coordinates: Point[] }
  | { type: "MultiLineString"; coordinates: Point[][] }
  | { type: "Polygon"; coordinates: Point[][] }
  | { type: "MultiPolygon"; coordinates: Point[][][] };

export interface Classification {
  name: string;
  /** Red, green and blue, 0 to 255. */
  color?: [number, number, number];
}

export interface Properties {
  objectType?: string;
  name?: string | null;
  classification?: Classification | null;
  /** Colour of what has no class. */
  color?: [number, number, number];
  author?: string;
  updated?: string;
  revision?: number;
  [more: string]: unknown;
}

export interface Feature {
  type: "Feature";
  id: string;
  geometry: Geometry;
  properties: Properties;
}

export interface FeatureCollection {
  type: "FeatureCollection";
  features: Feature[];
}

interface Bounds {
  minX: number;
  minY: number;
  maxX: number;
  maxY: number;
}

/** Shapes as Annotorious draws them. */
export type Shape =
  | {
      type: "RECTANGLE";
      /** `rot` turns it about its middle, in radians. */
      geometry: { bounds: Bounds; x: number; y: number; w: number; h: number; rot?: number };
    }
  | { type: "POLYGON"; geometry: { bounds: Bounds; points: Point[] } }
  | {
      type: "MULTIPOLYGON";
      geometry: { bounds: Bounds; polygons: { bounds: Bounds; rings: { points: Point[] }[] }[] };
    };

/** Classes offered first, with the colours that QuPath gives them. */
export const CLASSES: readonly Required<Classification>[] = [
  { name: "Tumor", color: [200, 0, 0] },
  { name: "Stroma", color: [150, 200, 150] },
  { name: "Immune cells", color: [160, 90, 160] },
  { name: "Necrosis", color: [50, 50, 50] },
  { name: "Region of interest", color: [0, 114, 178] },
  { name: "Ignore*", color: [180, 180, 180] },
];

/** Colour of what has no class, as in QuPath. */
export const NO_CLASS: [number, number, number] = [255, 0, 0];

/** The class of a name: one that is offered or in use, or a new one with a colour of its own. */
export function classOf(name: string, used: readonly Feature[] = []): Required<Classification> | null {
  const wanted = name.trim();
  if (!wanted) return null;
  const known = [...used.map((feature) => feature.properties.classification), ...CLASSES].find(
    (one) => one?.color && one.name === wanted,
  );
  if (known?.color) return { name: wanted, color: known.color };
  // As far from each other as hues of names are: the golden angle spreads them.
  let sum = 0;
  for (const letter of wanted) sum = (sum * 31 + letter.codePointAt(0)!) % 360;
  return { name: wanted, color: fromHue((sum * 137.508) % 360) };
}

function fromHue(hue: number): [number, number, number] {
  const channel = (shift: number) => {
    const at = (shift + hue / 30) % 12;
    return Math.round(255 * (0.45 - 0.4 * Math.max(-1, Math.min(at - 3, 9 - at, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}

export function colourOf(feature: Feature): string {
  const { classification, color } = feature.properties;
  const [red, green, blue] = classification?.color ?? color ?? NO_CLASS;
  return `#${[red, green, blue].map((value) => value.toString(16).padStart(2, "0")).join("")}`;
}

// -- shapes ----------------------------------------------------------------------------------------

/** The geometry of a shape, level-0 px to a hundredth, as pathflip writes them. */
export function toGeometry(shape: Shape): Geometry {
  if (shape.type === "RECTANGLE") {
    const { x, y, w, h, rot = 0 } = shape.geometry;
    const [sin, cos] = [Math.sin(rot), Math.cos(rot)];
    const corners = ([[-1, -1], [1, -1], [1, 1], [-1, 1]] as const).map(([right, down]): Point => {
      const [dx, dy] = [(right * w) / 2, (down * h) / 2];
      return [x + w / 2 + dx * cos - dy * sin, y + h / 2 + dx * sin + dy * cos];
    });
    return { type: "Polygon", coordinates: [ring(corners)] };
  }
  if (shape.type === "POLYGON") return { type: "Polygon", coordinates: [ring(shape.geometry.points)] };
  const polygons = shape.geometry.polygons.map((one) => one.rings.map((each) => ring(each.points)));
  if (polygons.length === 1) return { type: "Polygon", coordinates: polygons[0]! };
  return { type: "MultiPolygon", coordinates: polygons };
}

/** A shape to draw and edit; null for points and lines. */
export function toShape(geometry: Geometry): Shape | null {
  if (geometry.type !== "Polygon" && geometry.type !== "MultiPolygon") return null;
  const polygons = geometry.type === "Polygon" ? [geometry.coordinates] : geometry.coordinates;
  const [outer, ...holes] = polygons[0] ?? [];
  if (!outer) return null;
  if (polygons.length > 1 || holes.length > 0) {
    const parts = polygons.map((rings) => ({
      bounds: toBounds(rings.flat()),
      rings: rings.map((one) => ({ points: open(one) })),
    }));
    return { type: "MULTIPOLYGON", geometry: { bounds: toBounds(polygons.flat(2)), polygons: parts } };
  }
  const points = open(outer);
  const bounds = toBounds(points);
  const { minX: x, minY: y, maxX, maxY } = bounds;
  if (isRectangle(points))
    return { type: "RECTANGLE", geometry: { bounds, x, y, w: maxX - x, h: maxY - y } };
  return { type: "POLYGON", geometry: { bounds, points } };
}

/** Whether points are the corners of an upright rectangle, in turn. */
function isRectangle(points: readonly Point[]): boolean {
  if (points.length !== 4) return false;
  return points.every(([x, y], i) => {
    const [nextX, nextY] = points[(i + 1) % 4]!;
    const [thirdX, thirdY] = points[(i + 2) % 4]!;
    return (x === nextX) !== (y === nextY) && x !== thirdX && y !== thirdY;
  });
}

function ring(points: readonly Point[]): Point[] {
  const short = (value: number) => Math.round(value * 100) / 100;
  const rounded = open(points).map(([x, y]): Point => [short(x), short(y)]);
  return [...rounded, [...rounded[0]!]];
}

/** A ring without its last point, which in GeoJSON is the first one again. */
function open(points: readonly Point[]): Point[] {
  const [first, last] = [points[0]!, points[points.length - 1]!];
  const closed = points.length > 1 && first[0] === last[0] && first[1] === last[1];
  return points.slice(0, closed ? -1 : undefined).map(([x, y]) => [x, y]);
}

function toBounds(points: readonly Point[]): Bounds {
  let [minX, minY, maxX, maxY] = [Infinity, Infinity, -Infinity, -Infinity];
  for (const [x, y] of points) {
    minX = Math.min(minX, x);
    maxX = Math.max(maxX, x);
    minY = Math.min(minY, y);
    maxY = Math.max(maxY, y);
  }
  return { minX, minY, maxX, maxY };
}

// -- measures --------------------------------------------------------------------------------------

function allPoints(geometry: Geometry): Point[] {
  switch (geometry.type) {
    case "Point":
      return [geometry.coordinates];
    case "MultiPoint":
    case "LineString":
      return geometry.coordinates;
    case "Polygon":
    case "MultiLineString":
      return geometry.coordinates.flat();
    case "MultiPolygon":
      return geometry.coordinates.flat(2);
  }
}

/** The rectangle around a geometry. */
export function bounds(geometry: Geometry): Box {
  const { minX, minY, maxX, maxY } = toBounds(allPoints(geometry));
  return { x0: minX, y0: minY, w0: maxX - minX, h0: maxY - minY };
}

/** Area in level-0 px², holes left out; 0 for points and lines. */
export function area(geometry: Geometry): number {
  if (geometry.type !== "Polygon" && geometry.type !== "MultiPolygon") return 0;
  const polygons = geometry.type === "Polygon" ? [geometry.coordinates] : geometry.coordinates;
  const size = (points: readonly Point[]) => areaUm2(points, 1);
  return polygons.reduce((total, [outer, ...holes]) => {
    const rings = holes.reduce((sum, hole) => sum - size(hole), size(outer ?? []));
    return total + rings;
  }, 0);
}

// -- files -----------------------------------------------------------------------------------------

/** Most objects of a file, as the service takes them. */
export const MAX_FEATURES = 2000;

/**
 * The objects of a file that QuPath wrote: a collection, an array of features, or one feature.
 *
 * @throws Error with a sentence for the reader.
 */
export function readCollection(text: string): { type: "FeatureCollection"; features: unknown[] } {
  let document: unknown;
  try {
    document = JSON.parse(text.replace(/^\uFEFF/, ""));
  } catch {
    throw new Error("This file is not GeoJSON. Export it from QuPath with File, Export objects as GeoJSON.");
  }
  let features: unknown = document;
  if (isObject(document)) {
    features = document["type"] === "FeatureCollection" ? document["features"] : [document];
  }
  if (!Array.isArray(features) || !features.every((one) => isObject(one) && one["type"] === "Feature"))
    throw new Error("This file holds no objects of QuPath. It must be a collection of GeoJSON features.");
  if (features.length > MAX_FEATURES)
    throw new Error(`This file has ${features.length} objects. At most ${MAX_FEATURES} are taken at once.`);
  return { type: "FeatureCollection", features };
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** A new annotation of a shape, which is not saved yet. */
export function newFeature(id: string, shape: Shape): Feature {
  return {
    type: "Feature",
    id,
    geometry: toGeometry(shape),
    properties: { objectType: "annotation", name: "", revision: 0 },
  };
}
