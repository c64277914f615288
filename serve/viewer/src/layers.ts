/** Heat layers of the open slide: asked of the service, painted, laid over the slide, kept in step. */

import { effect, signal, untracked } from "@preact/signals";
import { api, Problem } from "./api.ts";
import type { HotBox } from "./api.ts";
import { colourMap, LAYER_COLOURS, MAPS, normalise, paint, smooth, toGrid } from "./heat.ts";
import type { Grid, MapName, Patch } from "./heat.ts";
import type { SlideView } from "./slide.ts";
import { layers as wanted, looks, slide } from "./state.ts";

/** Answer of `/v1/ground` with `patches: true`. */
export interface Ground {
  slide_id: string;
  text: string;
  contrast?: string | null;
  /** Cosine of text and slide, -1 to 1. */
  score: number;
  mpp: number;
  patch_um: number;
  boxes: HotBox[];
  patches: Patch[];
}

/** How a layer is drawn. */
export interface Look {
  shown: boolean;
  map: MapName;
  opacity: number;
  threshold: number;
  /** Whether each patch has one colour. */
  single: boolean;
  boxes: boolean;
}

export interface Layer {
  slideId: string;
  /** The sentence and its contrast, as in the address. */
  key: string;
  text: string;
  contrast: string | null;
  /** Colour of its outlines, and of the map `single`; #rrggbb. */
  colour: string;
  look: Look;
  found: Ground | null;
  /** Heat as it is drawn, in [0, 1]. */
  grid: Grid | null;
  /** Why there is no heat. */
  failed: string | null;
}

/** Most layers at a time. */
export const MAX_LAYERS = 6;
/** Width of the smoothing, patches: as the service smooths before it cuts out boxes. */
export const SIGMA = 1;
const MINUS = " ~ ";

/** The layers of the open slide. */
export const heatLayers = signal<Layer[]>([]);

/** A sentence and its contrast as one string of the address. */
export function layerKey(text: string, contrast: string | null): string {
  return contrast ? `${text}${MINUS}${contrast}` : text;
}

export function fromKey(key: string): { text: string; contrast: string | null } {
  const [text = "", ...rest] = key.split(MINUS);
  return { text, contrast: rest.join(MINUS) || null };
}

const USUAL: Look = { shown: true, map: "viridis", opacity: 0.7, threshold: 0.1, single: false, boxes: true };

/** A look as a text of the address: map, opacity and threshold in per cent, and what is on. */
export function lookText({ map, opacity, threshold, shown, single, boxes }: Look): string {
  const on = [shown && "shown", single && "patches", boxes && "boxes"].filter(Boolean);
  return [map, Math.round(100 * opacity), Math.round(100 * threshold), ...on].join(" ");
}

/** The look that a text of the address says; null where it says none. */
export function toLook(text: string): Look | null {
  const [name, opacity, threshold, ...on] = text.split(" ");
  const map = MAPS.find((one) => one.name === name)?.name;
  const part = (percent: string | undefined) => Math.min(1, Math.max(0, Number(percent) / 100));
  if (!map || Number.isNaN(part(opacity) + part(threshold))) return null;
  const [shown, single, boxes] = ["shown", "patches", "boxes"].map((one) => on.includes(one)) as [boolean, boolean, boolean];
  return { map, opacity: part(opacity), threshold: part(threshold), shown, single, boxes };
}

/** How the layers wanted are drawn, for the address; nothing where it is as usual. */
export function looksNow(): string[] {
  const told = wanted.value.map((key) => {
    const layer = heatLayers.value.find((one) => one.key === key);
    return layer ? lookText(layer.look) : (looks.value[key] ?? "");
  });
  // Of several layers, what is usual depends on which was first.
  return told.length === 1 && told[0] === lookText(USUAL) ? [""] : told;
}

/** Show where a sentence is true. */
export function showWhere(text: string, contrast: string | null = null): void {
  const key = layerKey(text.trim(), contrast?.trim() || null);
  if (!wanted.value.includes(key)) wanted.value = [...wanted.value, key].slice(-MAX_LAYERS);
  else change(key, { shown: true });
}

export function removeLayer(key: string): void {
  wanted.value = wanted.value.filter((one) => one !== key);
}

/** Draw a layer otherwise. */
export function change(key: string, look: Partial<Look>): void {
  replace(key, (layer) => ({ ...layer, look: { ...layer.look, ...look } }));
}

/** Show one layer alone, or all again where it is alone already. */
export function solo(key: string): void {
  const alone = heatLayers.value.every((layer) => layer.look.shown === (layer.key === key));
  heatLayers.value = heatLayers.value.map((layer) => ({
    ...layer,
    look: { ...layer.look, shown: alone || layer.key === key },
  }));
}

/** Ask again for a layer that failed. */
export function retry(key: string): void {
  const failed = heatLayers.value.find((layer) => layer.key === key);
  if (failed) looks.value = { [key]: lookText(failed.look) };
  heatLayers.value = heatLayers.value.filter((layer) => layer !== failed);
  wanted.value = [...wanted.value];
}

function replace(key: string, then: (layer: Layer) => Layer): void {
  heatLayers.value = heatLayers.value.map((layer) => (layer.key === key ? then(layer) : layer));
}

/** Keep the layers of a viewer in step with what is wanted, until it goes; returns what ends it. */
export function follow(view: SlideView): () => void {
  const drawn = new Map<string, Layer>();
  const asking = new Map<string, AbortController>();

  const endAsking = effect(() => {
    const slideId = slide.value?.slide_id ?? null;
    const keys = slideId === null ? [] : wanted.value.slice(-MAX_LAYERS);
    untracked(() => {
      for (const [id, request] of asking) {
        const [of, key] = JSON.parse(id) as [string, string];
        if (of === slideId && keys.includes(key)) continue;
        request.abort();
        asking.delete(id);
      }
      const asked = (key: string) => toLook(looks.value[key] ?? "");
      const kept = heatLayers.value
        .filter((layer) => layer.slideId === slideId && keys.includes(layer.key))
        .map((layer) => ({ ...layer, look: asked(layer.key) ?? layer.look }));
      const made = keys
        .filter((key) => slideId !== null && !kept.some((layer) => layer.key === key))
        .map((key) => newLayer(slideId!, key));
      const colours = LAYER_COLOURS.filter((one) => !kept.some((layer) => layer.colour === one));
      made.forEach((layer, i) => (layer.colour = colours[i % colours.length] ?? layer.colour));
      // Of several layers on each other, one sees which is which by one colour for each.
      if (keys.length > 1) for (const layer of made) layer.look.map = "single";
      for (const layer of made) layer.look = asked(layer.key) ?? layer.look;
      if (slideId !== null) looks.value = {}; // they are the layers' own now
      heatLayers.value = [...kept, ...made];
      for (const layer of heatLayers.value)
        if (!layer.found && !layer.failed) void ask(layer, asking);
    });
  });

  const endDrawing = effect(() => {
    const now = heatLayers.value.filter((layer) => layer.grid !== null);
    const shown = new Map(now.map((layer) => [`heat ${layer.slideId} ${layer.key}`, layer]));
    for (const id of drawn.keys()) {
      if (shown.has(id)) continue;
      view.removeLayer(id);
      view.outline(id, []);
      drawn.delete(id);
    }
    for (const [id, layer] of shown) {
      const before = drawn.get(id);
      if (before === layer) continue;
      drawLayer(view, id, layer, before);
      drawn.set(id, layer);
    }
  });

  return () => {
    endAsking();
    endDrawing();
    for (const request of asking.values()) request.abort();
  };
}

function newLayer(slideId: string, key: string): Layer {
  const told = { found: null, grid: null, failed: null };
  return { slideId, key, ...fromKey(key), colour: LAYER_COLOURS[0]!, look: { ...USUAL }, ...told };
}

async function ask(layer: Layer, asking: Map<string, AbortController>): Promise<void> {
  const id = JSON.stringify([layer.slideId, layer.key]);
  if (asking.has(id)) return;
  const request = new AbortController();
  asking.set(id, request);
  const tell = (more: Partial<Layer>) =>
    replace(layer.key, (one) => (one.slideId === layer.slideId ? { ...one, ...more } : one));
  try {
    const body = { slide_id: layer.slideId, text: layer.text, contrast: layer.contrast, patches: true };
    const found = await api.post<Ground>("/v1/ground", body, { signal: request.signal });
    const raw = found.patches.length ? toGrid(found.patches, found.patch_um / found.mpp) : null;
    tell({ found, grid: raw && normalise(smooth(raw, SIGMA)) });
  } catch (error) {
    if (request.signal.aborted) return;
    tell({ failed: error instanceof Problem ? error.message : "The heat could not be computed." });
    if (!(error instanceof Problem)) console.error(error);
  } finally {
    if (asking.get(id) === request) asking.delete(id);
  }
}

function drawLayer(view: SlideView, id: string, layer: Layer, before: Layer | undefined): void {
  const { look, grid, found } = layer;
  const painted = (one: Layer) => [one.look.map, one.look.threshold, one.look.single].join();
  if (!before || painted(before) !== painted(layer)) {
    const canvas = toCanvas(grid!, look, layer.colour);
    view.addLayer(id, canvas, grid!.place);
  }
  view.setLayer(id, { opacity: look.shown ? look.opacity : 0 });
  view.outline(id, look.shown && look.boxes ? found!.boxes : [], {
    label: layer.text,
    colour: layer.colour,
  });
}

function toCanvas(grid: Grid, look: Look, colour: string): HTMLCanvasElement {
  const { map, threshold, single } = look;
  const { width, height, pixels } = paint(grid, { map: colourMap(map, colour), threshold, single });
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d")!.putImageData(new ImageData(pixels, width, height), 0, 0);
  return canvas;
}
