/**
 * Areas drawn on a slide: painted as far as they are in view, with no more corners than a screen shows,
 * and found under the pointer.
 */

import { area, bounds, colourOf } from "./annotate.ts";
import type { Feature, Geometry } from "./annotate.ts";
import type { Box, Point } from "./api.ts";

/** Corners as x, y, x, y, … in level-0 px. */
export type Flat = Float64Array;

interface Area {
  id: string;
  geometry: Geometry;
  colour: string;
  box: Box;
  size: number;
  rings: Flat[];
  /** The rings as they were drawn last. */
  drawn: { tolerance: number; rings: Flat[] };
}

/** From level-0 px to the screen: x' = a x - b y + left, y' = b x + a y + top. */
export interface Turn {
  a: number;
  b: number;
  left: number;
  top: number;
}

/** How areas are painted that are not like the others. */
export interface Marked {
  /** Not painted: it is drawn by who edits it. */
  edited: string | null;
  selected: string | null;
  hovered: string | null;
}

/** Screen px below which an area is a dot. */
const DOT = 2;

export class Areas {
  /** Large ones first, so that small ones lie on them. */
  private areas: Area[] = [];

  /** Hold the areas of these features and no others. */
  show(features: readonly Feature[]): void {
    const before = new Map(this.areas.map((one) => [one.geometry, one]));
    const now = features.flatMap((feature) => {
      const { id, geometry } = feature;
      const known = before.get(geometry);
      const own = { id, colour: colourOf(feature) };
      return known ? [{ ...known, ...own }] : toArea(geometry, own);
    });
    this.areas = now.sort((one, other) => other.size - one.size);
  }

  /** The smallest area at a place, or whose outline is at most `reach` away; null: none. */
  at([x, y]: Point, reach: number): string | null {
    for (let i = this.areas.length - 1; i >= 0; i--) {
      const { id, box, rings } = this.areas[i]!;
      if (x < box.x0 - reach || y < box.y0 - reach || x > box.x0 + box.w0 + reach || y > box.y0 + box.h0 + reach) continue;
      if (isInside(rings, x, y) || rings.some((ring) => isNear(ring, x, y, reach))) return id;
    }
    return null;
  }

  /** Paint what is in `view`, level-0 px; returns how many areas that are. */
  paint(context: CanvasRenderingContext2D, view: Box, turn: Turn, { edited, selected, hovered }: Marked): number {
    const scale = Math.hypot(turn.a, turn.b); // screen px per level-0 px
    const tolerance = 2 ** Math.floor(Math.log2(0.5 / scale));
    const margin = 3 / scale;
    let count = 0;
    context.lineJoin = "bevel";
    for (const one of this.areas) {
      const { x0, y0, w0, h0 } = one.box;
      if (one.id === edited || x0 > view.x0 + view.w0 + margin || y0 > view.y0 + view.h0 + margin) continue;
      if (x0 + w0 < view.x0 - margin || y0 + h0 < view.y0 - margin) continue;
      count++;
      context.fillStyle = one.colour;
      if (Math.max(w0, h0) * scale < DOT) {
        const [x, y] = turned(turn, x0 + w0 / 2, y0 + h0 / 2);
        context.fillRect(x - DOT / 2, y - DOT / 2, DOT, DOT);
        continue;
      }
      if (one.drawn.tolerance !== tolerance)
        one.drawn = { tolerance, rings: one.rings.map((ring) => simplified(ring, tolerance)) };
      const strong = one.id === selected || one.id === hovered;
      context.globalAlpha = strong ? 0.25 : 0.1;
      context.beginPath();
      trace(context, one.drawn.rings, turn);
      context.fill("evenodd");
      context.globalAlpha = 1;
      context.strokeStyle = one.colour;
      context.lineWidth = one.id === selected ? 4 : 2;
      context.stroke();
    }
    return count;
  }
}

function toArea(geometry: Geometry, own: { id: string; colour: string }): Area[] {
  if (geometry.type !== "Polygon" && geometry.type !== "MultiPolygon") return [];
  const polygons = geometry.type === "Polygon" ? [geometry.coordinates] : geometry.coordinates;
  const rings = polygons.flat().map((ring) => Float64Array.from(ring.flat()));
  const drawn = { tolerance: 0, rings };
  return [{ ...own, geometry, box: bounds(geometry), size: area(geometry), rings, drawn }];
}

function turned({ a, b, left, top }: Turn, x: number, y: number): Point {
  return [a * x - b * y + left, b * x + a * y + top];
}

function trace(path: CanvasRenderingContext2D, rings: readonly Flat[], { a, b, left, top }: Turn): void {
  for (const ring of rings) {
    for (let i = 0; i < ring.length; i += 2) {
      const [x, y] = [ring[i]!, ring[i + 1]!];
      if (i) path.lineTo(a * x - b * y + left, b * x + a * y + top);
      else path.moveTo(a * x - b * y + left, b * x + a * y + top);
    }
    path.closePath();
  }
}

/** A ring without the corners that lie within `tolerance` of the one kept before them. */
export function simplified(ring: Flat, tolerance: number): Flat {
  const kept = new Float64Array(ring.length);
  let count = 0;
  for (let i = 0; i < ring.length; i += 2) {
    const [x, y] = [ring[i]!, ring[i + 1]!];
    if (count && Math.hypot(x - kept[count - 2]!, y - kept[count - 1]!) < tolerance) continue;
    kept[count++] = x;
    kept[count++] = y;
  }
  return kept.slice(0, count);
}

/** Whether a place lies inside rings, holes left out. */
function isInside(rings: readonly Flat[], x: number, y: number): boolean {
  let inside = false;
  for (const ring of rings) {
    for (let i = 0, j = ring.length - 2; i < ring.length; j = i, i += 2) {
      const [xi, yi, xj, yj] = [ring[i]!, ring[i + 1]!, ring[j]!, ring[j + 1]!];
      if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) inside = !inside;
    }
  }
  return inside;
}

/** Whether a place is at most `reach` away from the outline of a ring. */
function isNear(ring: Flat, x: number, y: number, reach: number): boolean {
  for (let i = 0, j = ring.length - 2; i < ring.length; j = i, i += 2) {
    const [xi, yi, xj, yj] = [ring[i]!, ring[i + 1]!, ring[j]!, ring[j + 1]!];
    const [dx, dy] = [xj - xi, yj - yi];
    const along = Math.min(1, Math.max(0, ((x - xi) * dx + (y - yi) * dy) / (dx * dx + dy * dy || 1)));
    if (Math.hypot(x - xi - along * dx, y - yi - along * dy) <= reach) return true;
  }
  return false;
}
