/**
 * Heat of a text on a slide: patches on their grid, smoothed as the service does before it cuts out
 * boxes (pathflip/heatmap.py), coloured, and painted for a canvas that lies on the patches.
 *
 * Grids are rows of columns of patches; line i of a grid of pitch p is level-0 pixel
 * floor(i p + 0.5), as pathflip.geometry.edge says. All else is level-0 px.
 */

export interface Rect {
  x0: number;
  y0: number;
  w0: number;
  h0: number;
}

/** A patch as `/v1/ground` returns it, with `patches: true`. */
export interface Patch {
  x0: number;
  y0: number;
  size0: number;
  heat: number;
}

/** Heat on the patch grid, cut to the patches there are; values are row by row. */
export interface Grid {
  columns: number;
  rows: number;
  heat: Float64Array;
  tissue: Uint8Array;
  /** Rectangle that the cells cover. */
  place: Rect;
}

export interface Painted {
  width: number;
  height: number;
  /** RGBA, not premultiplied. */
  pixels: Uint8ClampedArray<ArrayBuffer>;
}

export type ColourMap = (value: number) => readonly [number, number, number];

/** Longest side of a painted canvas, px, unless there are more patches. */
export const MAX_SIDE = 2048;
/** Side of a patch on it: single patches have sharp edges, colours that run need no more pixels. */
const CELL = { single: 16, running: 8 };

/**
 * Put patches on their grid.
 *
 * @param patches At least one.
 * @param pitch Side of a patch, level-0 px; it need not be a whole number.
 */
export function toGrid(patches: readonly Patch[], pitch: number): Grid {
  const column = (patch: Patch) => Math.round(patch.x0 / pitch);
  const row = (patch: Patch) => Math.round(patch.y0 / pitch);
  let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
  for (const patch of patches) {
    left = Math.min(left, column(patch));
    right = Math.max(right, column(patch));
    top = Math.min(top, row(patch));
    bottom = Math.max(bottom, row(patch));
  }
  const [columns, rows] = [right - left + 1, bottom - top + 1];
  const heat = new Float64Array(columns * rows);
  const tissue = new Uint8Array(columns * rows);
  for (const patch of patches) {
    const cell = (row(patch) - top) * columns + column(patch) - left;
    heat[cell] = patch.heat;
    tissue[cell] = 1;
  }
  const place = { x0: left * pitch, y0: top * pitch, w0: columns * pitch, h0: rows * pitch };
  return { columns, rows, heat, tissue, place };
}

/** Blur heat inside the tissue only: a Gaussian mean over the patches that are there. */
export function smooth(grid: Grid, sigma: number): Grid {
  if (sigma <= 0) return grid;
  const { columns, rows, tissue } = grid;
  const radius = Math.max(1, Math.round(4 * sigma));
  const kernel = Float64Array.from({ length: 2 * radius + 1 }, (_, i) =>
    Math.exp(-((i - radius) ** 2) / (2 * sigma ** 2)),
  );
  const along = (values: Float64Array, count: number, step: number, line: number) => {
    const out = new Float64Array(values.length);
    for (let start = 0; start < values.length / count; start++) {
      const first = line === 1 ? start * count : start;
      for (let i = 0; i < count; i++) {
        let sum = 0;
        for (let j = Math.max(0, i - radius); j <= Math.min(count - 1, i + radius); j++)
          sum += values[first + j * step]! * kernel[j - i + radius]!;
        out[first + i * step] = sum;
      }
    }
    return out;
  };
  const blur = (values: Float64Array) =>
    along(along(values, columns, 1, 1), rows, columns, columns);
  const weight = blur(Float64Array.from(tissue));
  const heat = blur(grid.heat.map((value, i) => value * tissue[i]!));
  return { ...grid, heat: heat.map((value, i) => (tissue[i] ? value / weight[i]! : 0)) };
}

/**
 * Divide heat by a high percentile of the tissue's and clip it to [0, 1].
 *
 * A map without heat above zero there (a contrast may subtract it all) becomes 0 everywhere.
 */
export function normalise(grid: Grid, percentile = 99): Grid {
  const values = grid.heat.filter((_, i) => grid.tissue[i]).sort();
  const at = ((values.length - 1) * percentile) / 100;
  const low = values[Math.floor(at)] ?? 0;
  const high = values[Math.ceil(at)] ?? 0;
  let top = low + (high - low) * (at - Math.floor(at));
  if (!(top > 0)) top = values[values.length - 1] ?? 0;
  const scale = top > 0 ? 1 / top : 0;
  const clip = (value: number) => Math.min(1, Math.max(0, value * scale));
  return { ...grid, heat: grid.heat.map((value, i) => (grid.tissue[i] ? clip(value) : 0)) };
}

/**
 * Paint heat in [0, 1]: warm parts in colour, cold parts and what is off tissue transparent.
 *
 * @param grid See {@link normalise}.
 * @param map Colours.
 * @param threshold Heat below which nothing is painted.
 * @param single Whether each patch has one colour; else colours run between neighbours, on tissue.
 */
export function paint(
  grid: Grid,
  { map, threshold = 0, single = false }: { map: ColourMap; threshold?: number; single?: boolean },
): Painted {
  const { width, height, values } = spread(grid, single);
  const colours = new Uint8ClampedArray(4 * 256);
  for (let value = Math.max(1, Math.ceil(threshold * 255 - 0.5)); value < 256; value++)
    colours.set([...map(value / 255), value], 4 * value);
  // A pixel is one number, whatever the order of its bytes: that is the same on both sides.
  const table = new Uint32Array(colours.buffer);
  const pixels = new Uint8ClampedArray(4 * width * height);
  const whole = new Uint32Array(pixels.buffer);
  for (let i = 0; i < whole.length; i++) whole[i] = table[values[i]!]!;
  return { width, height, pixels };
}

interface Spread {
  width: number;
  height: number;
  /** Heat of each pixel in 255ths, 0 off tissue. */
  values: Uint8Array;
}

/** Pixels of grids that were painted: another colour or threshold needs no others. */
const spreads = new WeakMap<Grid, Partial<Record<"single" | "running", Spread>>>();

function spread(grid: Grid, single: boolean): Spread {
  const kind = single ? "single" : "running";
  const known = spreads.get(grid) ?? {};
  spreads.set(grid, known);
  return (known[kind] ??= single ? patchwise(grid) : running(grid));
}

function cellOf({ columns, rows }: Grid, most: number): number {
  return Math.max(1, Math.min(most, Math.floor(MAX_SIDE / Math.max(columns, rows))));
}

function patchwise(grid: Grid): Spread {
  const { columns, rows, heat } = grid;
  const cell = cellOf(grid, CELL.single);
  const [width, height] = [columns * cell, rows * cell];
  const values = new Uint8Array(width * height);
  for (let row = 0; row < rows; row++) {
    const first = row * cell * width;
    for (let column = 0; column < columns; column++)
      values.fill(Math.round(heat[row * columns + column]! * 255), first + column * cell, first + (column + 1) * cell);
    for (let line = 1; line < cell; line++) values.copyWithin(first + line * width, first, first + width);
  }
  return { width, height, values };
}

/** Heat interpolated among the four patches around a pixel, as far as they are tissue. */
function running(grid: Grid): Spread {
  const { columns, rows, heat, tissue } = grid;
  const cell = cellOf(grid, CELL.running);
  const [width, height] = [columns * cell, rows * cell];
  const values = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    const v = (y + 0.5) / cell - 0.5;
    const top = Math.floor(v);
    const down = v - top;
    const upper = Math.max(0, top) * columns;
    const lower = Math.min(rows - 1, top + 1) * columns;
    const own = Math.floor(y / cell) * columns;
    for (let x = 0; x < width; x++) {
      if (!tissue[own + Math.floor(x / cell)]) continue;
      const u = (x + 0.5) / cell - 0.5;
      const left = Math.floor(u);
      const right = u - left;
      const from = Math.max(0, left);
      const to = Math.min(columns - 1, left + 1);
      const a = (1 - right) * (1 - down) * tissue[upper + from]!;
      const b = right * (1 - down) * tissue[upper + to]!;
      const c = (1 - right) * down * tissue[lower + from]!;
      const d = right * down * tissue[lower + to]!;
      const sum = a * heat[upper + from]! + b * heat[upper + to]! + c * heat[lower + from]! + d * heat[lower + to]!;
      values[y * width + x] = Math.round((255 * sum) / (a + b + c + d));
    }
  }
  return { width, height, values };
}

// -- colours ---------------------------------------------------------------------------------------

/** Colours of maps at equal steps; those between are interpolated, to within 10 of 256 of OpenCV's. */
const STEPS = {
  viridis:
    "440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e 1f988b 22a884 35b779 54c568 7ad151 a5db36 d2e21b fde725",
  cividis:
    "00224e 002e6c 1e3a6f 35456c 47516c 575d6d 666970 757575 848279 948e77 a59c74 b7a96e c8b866 dbc75a eed649 fee838",
  inferno:
    "000004 0c0826 240c4f 420a68 5d126e 781c6d 932667 ae305c c73e4c dd513a ed6925 f8850f fca50a fac62d f2e661 fcffa4",
  turbo:
    "30123b 4143a7 4771e9 3e9bfe 22c5e2 1ae4b6 46f884 88ff4e b9f635 e1dd37 faba39 fd8d27 f05b12 d63506 af1801 7a0403",
};

export type MapName = keyof typeof STEPS | "single";

/** Colour maps by name, in the order in which they are offered. */
export const MAPS: readonly { name: MapName; label: string }[] = [
  { name: "viridis", label: "Viridis" },
  { name: "cividis", label: "Cividis (colour-blind safe)" },
  { name: "inferno", label: "Inferno" },
  { name: "turbo", label: "Turbo" },
  { name: "single", label: "One colour per layer" },
];

/** Colours that people with any colour vision tell apart (Okabe and Ito, 2008). */
export const LAYER_COLOURS = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

export function hex(colour: string): [number, number, number] {
  const value = parseInt(colour.replace("#", ""), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

/**
 * A colour map.
 *
 * @param name Its name.
 * @param colour Colour of `single`, #rrggbb.
 */
export function colourMap(name: MapName, colour = LAYER_COLOURS[0]!): ColourMap {
  if (name === "single") {
    const only = hex(colour);
    return () => only;
  }
  const steps = STEPS[name].split(" ").map(hex);
  return (value) => {
    const at = Math.min(1, Math.max(0, value)) * (steps.length - 1);
    const low = steps[Math.floor(at)]!;
    const high = steps[Math.ceil(at)]!;
    const part = at - Math.floor(at);
    const mix = (i: 0 | 1 | 2) => Math.round(low[i] + (high[i] - low[i]) * part);
    return [mix(0), mix(1), mix(2)];
  };
}
