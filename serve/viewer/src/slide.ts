/** A slide on the screen: OpenSeadragon, with everything else in level-0 pixels. */

import OpenSeadragon from "openseadragon";
import { api, slidePath } from "./api.ts";
import type { Box, Point, Problem, Ring, TileInfo } from "./api.ts";
import type { Turn } from "./areas.ts";
import type { Adjustment, Place } from "./route.ts";

/** Outlines to draw: polygons as rings of level-0 px, or boxes. */
export type Shape = Ring[] | Box;

export interface OutlineStyle {
  label?: string;
  /** Any CSS colour. */
  colour?: string;
  /** Line width, CSS px. */
  width?: number;
  dashed?: boolean;
}

interface Layer {
  canvas: CanvasImageSource;
  box: Box;
  opacity: number;
}

interface Outline extends OutlineStyle {
  /** In level-0 px less `from`, so that single floats suffice. */
  path: Path2D;
  from: Point;
  labelAt: Point;
}

/** What follows a drag of something that lies over the slide. */
export interface Drag {
  move: (place: Point) => void;
  end: () => void;
}

type Click = (place: Point, event: PointerEvent | MouseEvent) => boolean | void;

/** Font of what is written over a slide. */
const LABEL_FONT = '600 13px "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif';

/** Bytes of decoded tiles that are kept: some screens full. */
const MOST_CACHE = 256 << 20;

/** How far in one can go: CSS px per level-0 px. */
const MOST_ZOOM = 8;

/**
 * Stand where OpenSeadragon looks for a style sheet of its own before it writes one into the page, which
 * the page's policy refuses. An element of no known kind does nothing.
 */
function sparePolicy(): void {
  const mark = "data-openseadragon-mobile-css";
  if (document.querySelector(`style[${mark}]`)) return;
  const stand = document.createElementNS("urn:pathflip", "style");
  stand.setAttribute(mark, "true");
  document.head.append(stand);
}

/** Whether WebGL is made by a graphics card; done by the processor it is slower than a plain canvas. */
function hasGraphicsCard(): boolean {
  const context = document.createElement("canvas").getContext("webgl2", { failIfMajorPerformanceCaveat: true });
  const names = context?.getExtension("WEBGL_debug_renderer_info");
  const name = String((names && context?.getParameter(names.UNMASKED_RENDERER_WEBGL)) ?? "");
  context?.getExtension("WEBGL_lose_context")?.loseContext();
  return context !== null && !/swiftshader|llvmpipe|software|basic render/i.test(name);
}

/** One slide in one element. Positions are level-0 px; screen positions are CSS px in the element. */
export class SlideView {
  readonly osd: OpenSeadragon.Viewer;
  readonly element: HTMLElement;
  readonly info: TileInfo;
  private readonly canvas: HTMLCanvasElement;
  private readonly hasCard = hasGraphicsCard();
  private readonly navigator: HTMLElement | null;
  private readonly layers = new Map<string, Layer>();
  private readonly outlines = new Map<string, Outline>();
  private readonly painters = new Set<(context: CanvasRenderingContext2D) => void>();
  private readonly clicks: Click[] = [];
  private readonly doubleClicks: Click[] = [];
  private readonly grips = new Set<(place: Point) => Drag | null>();
  private drag: Drag | null = null;
  private readonly pointers = new Set<(place: Point) => void>();
  private readonly moves = new Set<() => void>();
  private readonly flights = new Set<() => void>();
  private readonly losses = new Set<(path: string) => void>();
  private readonly sizes: ResizeObserver;
  private drawing = 0;
  private drawn = "";
  private gone = false;

  /** `element` is where the slide goes, and must have a size; `navigator` is the minimap's. */
  constructor(element: HTMLElement, info: TileInfo, navigator: HTMLElement | null = null) {
    this.element = element;
    this.info = info;
    this.navigator = navigator;
    sparePolicy();
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.osd = new OpenSeadragon.Viewer({
      element,
      prefixUrl: "",
      showNavigationControl: false,
      showNavigator: navigator !== null,
      ...(navigator && { navigatorId: navigator.id, navigatorAutoFade: false, navigatorOpacity: 1, navigatorRotate: true, navigatorDisplayRegionColor: "#8e3fb0" }),
      animationTime: still ? 0 : 0.35,
      springStiffness: 10,
      blendTime: 0,
      immediateRender: false,
      drawer: this.hasCard ? "webgl" : "canvas",
      imageLoaderLimit: 8,
      tileRetryMax: 8, // a service with much to do refuses, and asks to be asked again
      tileRetryDelay: 1000,
      maxTilesPerFrame: 8, // one, as is usual, makes a slow machine slower still
      maxImageCacheCount: Math.ceil(MOST_CACHE / (4 * info.tile_w * info.tile_h)),
      minZoomImageRatio: 0.5,
      maxZoomPixelRatio: MOST_ZOOM,
      visibilityRatio: 0.1,
      constrainDuringPan: false,
      preserveImageSizeOnResize: true,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: false },
      gestureSettingsTouch: { clickToZoom: false, dblClickToZoom: false, pinchRotate: false },
      gestureSettingsPen: { clickToZoom: false, dblClickToZoom: false },
    });
    this.osd.canvas.removeAttribute("tabindex"); // the element itself takes the keyboard, and has a name
    element.tabIndex = 0;
    element.setAttribute("role", "application");
    element.setAttribute("aria-label", `Slide ${info.slide_id}`);
    element.setAttribute("aria-busy", "true");
    element.addEventListener("pointerdown", () => element.focus({ preventScroll: true }));
    this.canvas = document.createElement("canvas");
    this.canvas.className = "slide-layers";
    this.canvas.setAttribute("aria-hidden", "true");
    this.osd.canvas.append(this.canvas);
    this.listen();
    this.sizes = new ResizeObserver(() => this.redraw());
    this.sizes.observe(element);
  }

  // -- opening and moving -------------------------------------------------------------------------

  /** Show the slide, at a place or as a whole. */
  open(at: Place | null = null): Promise<void> {
    const { info } = this;
    const source = {
      width: info.width,
      height: info.height,
      tileWidth: info.tile_w,
      tileHeight: info.tile_h,
      tileOverlap: 0,
      minLevel: info.min_level,
      maxLevel: info.max_level,
      // The version makes another file another address, so no stale tile is shown.
      getTileUrl: (level: number, x: number, y: number) =>
        `${slidePath(info.slide_id, "tiles", String(level))}/${x}_${y}.jpg?v=${encodeURIComponent(info.version)}`,
    };
    return new Promise((resolve, reject) => {
      this.osd.addOnceHandler("open", () => {
        this.moveTo(at ?? this.whole());
        this.fitNavigator();
        resolve();
      });
      this.osd.addOnceHandler("open-failed", (event) => reject(new Error(String(event.message))));
      this.osd.open({ tileSource: source } as unknown as OpenSeadragon.TileSourceSpecifier);
    });
  }

  /** Give the minimap the shape of the slide. */
  private fitNavigator(): void {
    const navigator = this.osd.navigator as (OpenSeadragon.Navigator & { updateSize(): void }) | undefined;
    if (!this.navigator || !navigator) return;
    this.navigator.style.setProperty("--aspect", String(this.info.width / this.info.height));
    navigator.updateSize();
    navigator.update(this.osd.viewport);
  }

  /** The place that shows the whole slide, turned by `rot` degrees. */
  whole(rot = 0): Place {
    const { width, height } = this.info;
    return { x: width / 2, y: height / 2, w: this.widthFor(width, height, rot) * 1.04, rot };
  }

  /** Width of the view, level-0 px, in which a rectangle is seen as a whole. */
  private widthFor(w0: number, h0: number, rot: number): number {
    const { clientWidth, clientHeight } = this.element;
    const [sin, cos] = [Math.abs(Math.sin(rad(rot))), Math.abs(Math.cos(rad(rot)))];
    const [w, h] = [w0 * cos + h0 * sin, w0 * sin + h0 * cos];
    return Math.max(w, (h * clientWidth) / Math.max(1, clientHeight));
  }

  /** Where the view is: a permalink's numbers. */
  place(): Place {
    const viewport = this.osd.viewport;
    const scale = this.info.width;
    const centre = viewport.getCenter(false);
    const rot = ((viewport.getRotation() % 360) + 360) % 360;
    return { x: centre.x * scale, y: centre.y * scale, w: scale / viewport.getZoom(false), rot };
  }

  /** Where a view in motion is at this moment. */
  placeNow(): Place {
    const viewport = this.osd.viewport;
    const scale = this.info.width;
    const centre = viewport.getCenter(true);
    return { x: centre.x * scale, y: centre.y * scale, w: scale / viewport.getZoom(true), rot: viewport.getRotation(true) };
  }

  /** Show exactly this place, at once or in motion. */
  moveTo(place: Place, immediately = true): void {
    const viewport = this.osd.viewport;
    const scale = this.info.width;
    viewport.setRotation(place.rot, true);
    viewport.zoomTo(scale / place.w, undefined, immediately);
    viewport.panTo(new OpenSeadragon.Point(place.x / scale, place.y / scale), immediately);
  }

  /** Fly to a rectangle of level-0 px; all of it will be in view. */
  fly(x0: number, y0: number, w0: number, h0: number): void {
    for (const then of this.flights) then();
    const { rot } = this.place();
    const width = Math.max(this.widthFor(w0, h0, rot), this.element.clientWidth / MOST_ZOOM);
    this.moveTo({ x: x0 + w0 / 2, y: y0 + h0 / 2, w: width * 1.1, rot }, false);
  }

  /** Multiply the zoom about the middle. */
  zoomBy(factor: number): void {
    this.osd.viewport.zoomBy(factor);
    this.osd.viewport.applyConstraints();
  }

  /** Move by parts of the screen, as seen (right and down are positive). */
  panBy(right: number, down: number): void {
    const viewport = this.osd.viewport;
    const { clientWidth, clientHeight } = this.element;
    const by = viewport.deltaPointsFromPixels(new OpenSeadragon.Point(right * clientWidth, down * clientHeight));
    viewport.panBy(by);
    viewport.applyConstraints();
  }

  turnTo(degrees: number): void {
    this.osd.viewport.setRotation(((degrees % 360) + 360) % 360, true);
  }

  /** What is in view, level-0 px; of a turned view, the box around it. */
  box(): Box {
    const scale = this.info.width;
    const bounds = this.osd.viewport.getBounds(true).getBoundingBox();
    return { x0: bounds.x * scale, y0: bounds.y * scale, w0: bounds.width * scale, h0: bounds.height * scale };
  }

  /** Level-0 px per CSS px, as shown now. */
  level0PerPixel(): number {
    const scale = this.info.width;
    return scale / (this.osd.viewport.getZoom(true) * Math.max(1, this.element.clientWidth));
  }

  toScreen(x0: number, y0: number): Point {
    const scale = this.info.width;
    const at = this.osd.viewport.pixelFromPoint(new OpenSeadragon.Point(x0 / scale, y0 / scale), true);
    return [at.x, at.y];
  }

  fromScreen(x: number, y: number): Point {
    const scale = this.info.width;
    const at = this.osd.viewport.pointFromPixel(new OpenSeadragon.Point(x, y), true);
    return [at.x * scale, at.y * scale];
  }

  // -- what lies over the slide -------------------------------------------------------------------

  /** Lay a picture over a rectangle of level-0 px; one of the same id is replaced. */
  addLayer(id: string, canvas: CanvasImageSource, box: Box, opacity = 1): void {
    this.layers.set(id, { canvas, box, opacity });
    this.redraw();
  }

  setLayer(id: string, change: { opacity?: number }): void {
    const layer = this.layers.get(id);
    if (!layer) return;
    if (change.opacity !== undefined) layer.opacity = change.opacity;
    this.redraw();
  }

  removeLayer(id: string): void {
    this.layers.delete(id);
    this.redraw();
  }

  /** Draw outlines in level-0 px; those of the same id are replaced. */
  outline(id: string, shapes: Shape[], style: OutlineStyle = {}): void {
    const rings = shapes.flatMap((shape) => (Array.isArray(shape) ? shape : [corners(shape)]));
    const first = rings[0]?.[0];
    if (!first) return this.removeOutline(id);
    const path = new Path2D();
    for (const ring of rings) {
      for (const [i, [x, y]] of ring.entries()) {
        if (i) path.lineTo(x - first[0], y - first[1]);
        else path.moveTo(x - first[0], y - first[1]);
      }
      path.closePath();
    }
    const highest = rings.flat().reduce((a, b) => (b[1] < a[1] ? b : a));
    this.outlines.set(id, { ...style, path, from: first, labelAt: highest });
    this.redraw();
  }

  removeOutline(id: string): void {
    this.outlines.delete(id);
    this.redraw();
  }

  /** Paint over everything else with each frame, in CSS px; returns how to stop. */
  paint(painter: (context: CanvasRenderingContext2D) => void): () => void {
    this.painters.add(painter);
    return () => {
      this.painters.delete(painter);
      this.redraw();
    };
  }

  /** Change how the slide's own pixels are shown. */
  adjust({ brightness, contrast, gamma }: Adjustment): void {
    const drawn = this.osd.drawer.canvas as HTMLElement;
    const plain = brightness === 1 && contrast === 1 && gamma === 1;
    const curve = gamma === 1 ? "" : " url(#gamma)";
    // By the object model: the page's policy has no style attributes.
    drawn.style.filter = plain ? "" : `brightness(${brightness}) contrast(${contrast})${curve}`;
  }

  // -- events; each returns how to stop --------------------------------------------------------------

  /** Clicks that are no drags. One that answers true keeps it from the others; `first` asks it before them. */
  onClick(then: Click, first = false): () => void {
    return listed(this.clicks, then, first);
  }

  onDoubleClick(then: Click): () => void {
    return listed(this.doubleClicks, then, true);
  }

  /** Drags that begin where `grip` answers with what follows them; others move the slide. */
  onDrag(grip: (place: Point) => Drag | null): () => void {
    return kept(this.grips, grip);
  }

  onPointer(then: (place: Point) => void): () => void {
    return kept(this.pointers, then);
  }

  /** After the view has moved, turned or changed its size. */
  onMove(then: () => void): () => void {
    return kept(this.moves, then);
  }

  /** Before {@link fly} leaves a place. */
  onFly(then: () => void): () => void {
    return kept(this.flights, then);
  }

  /** When a tile does not come, after some tries; its address says why. */
  onLoss(then: (path: string) => void): () => void {
    return kept(this.losses, then);
  }

  /** Take the slide off the screen. */
  destroy(): void {
    this.gone = true;
    this.sizes.disconnect();
    cancelAnimationFrame(this.drawing);
    this.osd.destroy();
    for (const name of ["role", "aria-label", "aria-busy", "tabindex", "data-view"]) this.element.removeAttribute(name);
  }

  private listen(): void {
    const osd = this.osd;
    osd.addHandler("canvas-click", (event) => {
      if (!event.quick) return;
      const place = this.fromScreen(event.position.x, event.position.y);
      this.clicks.some((then) => then(place, event.originalEvent as PointerEvent));
    });
    osd.addHandler("canvas-double-click", (event) => {
      const place = this.fromScreen(event.position.x, event.position.y);
      const taken = this.doubleClicks.some((then) => then(place, event.originalEvent as MouseEvent));
      if (!taken) osd.viewport.zoomBy(2, osd.viewport.pointFromPixel(event.position, true)).applyConstraints();
    });
    osd.addHandler("canvas-press", (event) => {
      const place = this.fromScreen(event.position.x, event.position.y);
      this.drag = null;
      for (const grip of this.grips) this.drag ??= grip(place);
    });
    osd.addHandler("canvas-drag", (event) => {
      if (!this.drag) return;
      event.preventDefaultAction = true;
      this.drag.move(this.fromScreen(event.position.x, event.position.y));
    });
    osd.addHandler("canvas-drag-end", (event) => {
      if (!this.drag) return;
      event.preventDefaultAction = true;
      this.drag.end();
      this.drag = null;
    });
    // The page has keys of its own, the same on every part of it.
    osd.addHandler("canvas-key", (event) => {
      event.preventDefaultAction = true;
      (event as { preventDefault?: boolean }).preventDefault = false;
    });
    this.element.addEventListener("pointermove", (event) => {
      if (!this.pointers.size) return;
      const at = this.element.getBoundingClientRect();
      const place = this.fromScreen(event.clientX - at.x, event.clientY - at.y);
      for (const then of this.pointers) then(place);
    });
    const moved = () => {
      this.redraw();
      this.settle();
      for (const then of this.moves) then();
    };
    for (const event of ["viewport-change", "resize", "rotate", "open"] as const) osd.addHandler(event, moved);
    osd.addHandler("update-viewport", () => {
      this.draw();
      this.drawn = this.whereabouts();
      this.settle();
    });
    osd.addHandler("tile-load-failed", (event) => {
      const path = String(event.tile.getUrl());
      for (const then of this.losses) then(path);
    });
    osd.addHandler("animation-finish", () => this.settle());
    osd.world.addHandler("add-item", ({ item }) => item.addHandler("fully-loaded-change", () => this.settle()));
  }

  private whereabouts(): string {
    const { x, y, w, rot } = this.placeNow();
    return [x, y, w, rot, this.element.clientWidth, this.element.clientHeight].join();
  }

  /** Tell assistive technology, and tests, what is in view and whether it is all there. */
  private settle(): void {
    const image = this.osd.world.getItemAt(0);
    const [now, then] = [this.placeNow(), this.place()];
    const moving = now.x !== then.x || now.y !== then.y || now.w !== then.w;
    const busy = moving || !image?.getFullyLoaded() || this.drawn !== this.whereabouts();
    this.element.setAttribute("aria-busy", String(busy));
    const { x0, y0, w0, h0 } = this.box();
    this.element.dataset.view = [x0, y0, w0, h0].map((side) => side.toFixed(1)).join(" ");
  }

  /** Draw the layers anew with the next frame. */
  redraw(): void {
    if (this.drawing || this.gone) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = 0;
      this.draw();
    });
  }

  private draw(): void {
    const { clientWidth, clientHeight } = this.element;
    const dpr = devicePixelRatio || 1;
    const [width, height] = [Math.round(clientWidth * dpr), Math.round(clientHeight * dpr)];
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
    // Without a graphics card, Chromium's processor draws lines itself faster than as one.
    const context = this.canvas.getContext("2d", { willReadFrequently: !this.hasCard });
    if (!context) return;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    if (!this.osd.world.getItemCount()) return;
    for (const layer of this.layers.values()) {
      if (!layer.opacity) continue;
      const { x0, y0, w0, h0 } = layer.box;
      context.globalAlpha = layer.opacity;
      context.setTransform(this.matrix([x0, y0], dpr));
      context.drawImage(layer.canvas, 0, 0, w0, h0);
    }
    context.globalAlpha = 1;
    context.setTransform(dpr, 0, 0, dpr, 0, 0);
    for (const outline of this.outlines.values()) this.drawOutline(context, outline);
    for (const paint of this.painters) {
      context.save();
      paint(context);
      context.restore();
    }
  }

  private drawOutline(context: CanvasRenderingContext2D, outline: Outline): void {
    const path = new Path2D();
    path.addPath(outline.path, this.matrix(outline.from, 1));
    const width = outline.width ?? 2;
    context.setLineDash(outline.dashed ? [6, 4] : []);
    context.lineJoin = "round";
    for (const [line, colour] of [[width + 2, "rgb(255 255 255 / 75%)"], [width, outline.colour ?? "#0a58ca"]] as const) {
      context.lineWidth = line;
      context.strokeStyle = colour;
      context.stroke(path);
    }
    context.setLineDash([]);
    if (outline.label) this.write(context, outline.label, outline.labelAt);
  }

  /** Write a few words at a place of the slide, above and right of it, in {@link paint}. */
  write(context: CanvasRenderingContext2D, text: string, at: Point, colour = "#fff"): void {
    context.font = LABEL_FONT;
    const width = context.measureText(text).width + 10;
    const [x0, y0] = this.toScreen(...at);
    // Of a place in view all of the label is: at the upper edge it stands below the place.
    const x = x0 > this.element.clientWidth ? x0 : Math.min(x0, this.element.clientWidth - width);
    const y = y0 >= 0 && y0 < 22 ? 22 : y0;
    context.fillStyle = "rgb(0 0 0 / 78%)";
    context.fillRect(x, y - 22, width, 20);
    context.fillStyle = colour;
    context.textBaseline = "middle";
    context.fillText(text, x + 5, y - 11.5);
  }

  /** Paint the cross in the middle, where the keyboard sets points, in {@link paint}. */
  cross(context: CanvasRenderingContext2D): void {
    const [x, y] = [this.element.clientWidth / 2, this.element.clientHeight / 2];
    for (const [width, colour] of [[4, "rgb(0 0 0 / 60%)"], [1.5, "#fff"]] as const) {
      context.lineWidth = width;
      context.strokeStyle = colour;
      context.beginPath();
      context.moveTo(x - 9, y);
      context.lineTo(x + 9, y);
      context.moveTo(x, y - 9);
      context.lineTo(x, y + 9);
      context.stroke();
    }
  }

  /** From level-0 px to the screen: what {@link toScreen} does, for many places. */
  turn(): Turn {
    const scale = 1 / this.level0PerPixel();
    const angle = rad(this.osd.viewport.getRotation(true));
    const [left, top] = this.toScreen(0, 0);
    return { a: scale * Math.cos(angle), b: scale * Math.sin(angle), left, top };
  }

  /** From level-0 px less `from` to the screen, `dpr` times CSS px. */
  private matrix(from: Point, dpr: number): DOMMatrix {
    const { a, b } = this.turn();
    const [x, y] = this.toScreen(...from);
    return new DOMMatrix([a * dpr, b * dpr, -b * dpr, a * dpr, x * dpr, y * dpr]);
  }
}

/** Say why tiles do not come, at most every five seconds. */
export function explainLosses(view: SlideView, say: (problem: Problem) => void): void {
  let asking = false;
  view.onLoss((path) => {
    if (asking) return;
    asking = true;
    const again = () => setTimeout(() => (asking = false), 5000);
    api.whyNot(path).then((problem) => {
      again();
      if (problem) say(problem);
    }, again);
  });
}

function rad(degrees: number): number {
  return (degrees * Math.PI) / 180;
}

function corners({ x0, y0, w0, h0 }: Box): Ring {
  return [[x0, y0], [x0 + w0, y0], [x0 + w0, y0 + h0], [x0, y0 + h0]];
}

function kept<T>(set: Set<T>, item: T): () => void {
  set.add(item);
  return () => set.delete(item);
}

function listed<T>(list: T[], item: T, first: boolean): () => void {
  if (first) list.unshift(item);
  else list.push(item);
  return () => {
    const at = list.indexOf(item);
    if (at >= 0) list.splice(at, 1);
  };
}
