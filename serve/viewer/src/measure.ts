/** Lengths and areas on a slide, drawn point by point. */

import { signal } from "@preact/signals";
import type { Point } from "./api.ts";
import { areaLabel, lengthLabel, round } from "./scalebar.ts";
import type { SlideView } from "./slide.ts";

export type Kind = "length" | "area";

export interface Measure {
  id: number;
  kind: Kind;
  points: Point[];
  /** Its length or its area. */
  label: string;
}

/** Length of a line through points, µm. */
export function lengthUm(points: Point[], mpp: number): number {
  let sum = 0;
  for (let i = 1; i < points.length; i++) {
    const [a, b] = [points[i - 1]!, points[i]!];
    sum += Math.hypot(b[0] - a[0], b[1] - a[1]);
  }
  return sum * mpp;
}

/** Area of a polygon that does not cross itself, µm² (the shoelace formula). */
export function areaUm2(points: readonly Point[], mpp: number): number {
  const [ox, oy] = points[0] ?? [0, 0]; // from the first point: no loss of digits far from the origin
  let twice = 0;
  for (let i = 0; i < points.length; i++) {
    const [a, b] = [points[i]!, points[(i + 1) % points.length]!];
    twice += (a[0] - ox) * (b[1] - oy) - (b[0] - ox) * (a[1] - oy);
  }
  return (Math.abs(twice) / 2) * mpp ** 2;
}

/** A length or an area in words; in pixels on a slide whose scale nothing says. */
export function measured(kind: Kind, points: Point[], mpp: number | null): string {
  const value = (kind === "length" ? lengthUm : areaUm2)(points, mpp ?? 1);
  if (mpp === null) return `${round(value, 4)} px${kind === "length" ? "" : "²"}`;
  return kind === "length" ? lengthLabel(value) : areaLabel(value);
}

/** Whether two sides of a polygon cross, so that its area means nothing. */
export function crossesItself(points: Point[]): boolean {
  const n = points.length;
  const turn = (a: Point, b: Point, c: Point) =>
    Math.sign((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]));
  for (let i = 0; i < n; i++) {
    for (let j = i + 2; j < n; j++) {
      if (i === 0 && j === n - 1) continue; // neighbours
      const [a, b, c, d] = [points[i]!, points[i + 1]!, points[j]!, points[(j + 1) % n]!];
      if (turn(a, b, c) * turn(a, b, d) < 0 && turn(c, d, a) * turn(c, d, b) < 0) return true;
    }
  }
  return false;
}

let made = 0;

/** Measuring on one view, for as long as it is there: takes its clicks while a kind is chosen. */
export class Ruler {
  /** The kind being measured; null: none. */
  readonly kind = signal<Kind | null>(null);
  readonly points = signal<Point[]>([]);
  readonly done = signal<Measure[]>([]);
  private hover: Point | null = null;
  private readonly view: SlideView;
  private readonly refuse: (sentence: string) => void;

  /** `refuse` tells the reader why nothing was measured. */
  constructor(view: SlideView, refuse: (sentence: string) => void) {
    this.view = view;
    this.refuse = refuse;
    view.onClick((place) => {
      if (!this.kind.value) return false;
      this.add(place);
      return true;
    }, true);
    view.onDoubleClick(() => {
      if (!this.kind.value) return false;
      this.finish();
      return true;
    });
    view.onPointer((place) => {
      if (!this.kind.value) return;
      this.hover = place;
      view.redraw();
    });
    view.paint((context) => this.draw(context));
  }

  /** Measure this kind from now on; null: stop. What is begun is dropped. */
  start(kind: Kind | null): void {
    this.kind.value = kind;
    this.points.value = [];
    this.hover = null;
    this.view.redraw();
  }

  add(place: Point): void {
    const last = this.points.value.at(-1);
    // The second click of a double click falls on the first.
    if (last && Math.hypot(last[0] - place[0], last[1] - place[1]) < 2 * this.view.level0PerPixel()) return;
    if (this.points.value.length < 1000) this.points.value = [...this.points.value, place];
    this.view.redraw();
  }

  /** Set a point in the middle of the view, for the keyboard. */
  addMiddle(): void {
    const { x, y } = this.view.place();
    this.add([x, y]);
  }

  undo(): void {
    this.points.value = this.points.value.slice(0, -1);
    this.view.redraw();
  }

  finish(): void {
    const kind = this.kind.value;
    const points = this.points.value;
    if (!kind) return;
    if (points.length < (kind === "length" ? 2 : 3)) return this.refuse("Set more points first.");
    if (kind === "area" && crossesItself(points))
      return this.refuse("The outline crosses itself, so it has no area. Take back a point with Backspace.");
    const label = measured(kind, points, this.view.info.mpp);
    this.done.value = [...this.done.value, { id: ++made, kind, points, label }];
    this.points.value = [];
    this.hover = null;
    this.view.redraw();
  }

  remove(id: number): void {
    this.done.value = this.done.value.filter((measure) => measure.id !== id);
    this.view.redraw();
  }

  /** The value of what is being drawn, with the pointer as its next point. */
  label(): string {
    const points = this.hover ? [...this.points.value, this.hover] : this.points.value;
    return measured(this.kind.value ?? "length", points, this.view.info.mpp);
  }

  private draw(context: CanvasRenderingContext2D): void {
    for (const measure of this.done.value) {
      this.line(context, measure.points, measure.kind === "area");
      this.view.write(context, String(this.done.value.indexOf(measure) + 1), measure.points[0]!, "#ffdd00");
    }
    if (!this.kind.value) return;
    const points = this.hover ? [...this.points.value, this.hover] : this.points.value;
    this.line(context, points, this.kind.value === "area" && points.length > 2);
    this.view.cross(context);
  }

  private line(context: CanvasRenderingContext2D, points: Point[], closed: boolean): void {
    if (!points.length) return;
    const path = new Path2D();
    for (const [i, [x0, y0]] of points.entries()) {
      const [x, y] = this.view.toScreen(x0, y0);
      if (i) path.lineTo(x, y);
      else path.moveTo(x, y);
    }
    if (closed) path.closePath();
    if (closed) {
      context.fillStyle = "rgb(255 221 0 / 15%)";
      context.fill(path);
    }
    context.lineJoin = "round";
    for (const [width, colour] of [[4, "rgb(0 0 0 / 70%)"], [2, "#ffdd00"]] as const) {
      context.lineWidth = width;
      context.strokeStyle = colour;
      context.stroke(path);
    }
    for (const [x0, y0] of points) {
      const [x, y] = this.view.toScreen(x0, y0);
      context.beginPath();
      context.arc(x, y, 3.5, 0, 2 * Math.PI);
      context.fillStyle = "#ffdd00";
      context.fill();
      context.lineWidth = 1;
      context.strokeStyle = "#000";
      context.stroke();
    }
  }
}
