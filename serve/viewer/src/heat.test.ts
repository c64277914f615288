import assert from "node:assert/strict";
import { test } from "node:test";
import { colourMap, hex, LAYER_COLOURS, MAPS, normalise, paint, smooth, toGrid } from "./heat.ts";
import type { Grid, Patch } from "./heat.ts";

const PITCH = 32 / 0.2738; // 116.87 level-0 px: no whole number

/** Line i of the patch grid, as pathflip.geometry.edge has it. */
const line = (i: number) => Math.floor(i * PITCH + 0.5);

function patchesAt(cells: readonly (readonly [column: number, row: number, heat: number])[]): Patch[] {
  return cells.map(([column, row, heat]) => {
    const [width, height] = [line(column + 1) - line(column), line(row + 1) - line(row)];
    return { x0: line(column), y0: line(row), size0: Math.max(width, height), heat };
  });
}

function gridOf(rows: readonly (readonly (number | null)[])[]): Grid {
  const heat = Float64Array.from(rows.flat(), (value) => value ?? 0);
  const tissue = Uint8Array.from(rows.flat(), (value) => (value === null ? 0 : 1));
  const [columns, count] = [rows[0]!.length, rows.length];
  return { columns, rows: count, heat, tissue, place: { x0: 0, y0: 0, w0: columns, h0: count } };
}

test("every patch is painted on itself, to a pixel of level 0, however large the slide", () => {
  const cells = [[7, 3, 0.5], [7, 900, 1], [1500, 3, 0.25], [800, 401, 0.75]] as const; // prettier-ignore
  const patches = patchesAt(cells);
  const grid = toGrid(patches, PITCH);
  assert.deepEqual([grid.columns, grid.rows], [1494, 898]);
  const map = colourMap("viridis");
  const { width, height, pixels } = paint(grid, { map, single: true });
  const [scaleX, scaleY] = [grid.place.w0 / width, grid.place.h0 / height];
  const seen = new Map<number, [number, number, number, number]>(); // box of the pixels of each alpha
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const alpha = pixels[(y * width + x) * 4 + 3]!;
      if (!alpha) continue;
      const box = seen.get(alpha) ?? [x, y, x, y];
      seen.set(alpha, [Math.min(box[0], x), Math.min(box[1], y), Math.max(box[2], x), Math.max(box[3], y)]);
    }
  }
  assert.equal(seen.size, patches.length);
  for (const patch of patches) {
    const [left, top, right, bottom] = seen.get(Math.round(patch.heat * 255))!;
    const edges = [
      grid.place.x0 + left * scaleX - patch.x0,
      grid.place.y0 + top * scaleY - patch.y0,
      grid.place.x0 + (right + 1) * scaleX - (patch.x0 + patch.size0),
      grid.place.y0 + (bottom + 1) * scaleY - (patch.y0 + patch.size0),
    ];
    for (const edge of edges) assert.ok(Math.abs(edge) <= 1, `${edge}`); // size0 is the longer side
  }
});

test("colours run between neighbours and end with the tissue", () => {
  const grid = gridOf([[0, 1, null, 1]]);
  const { width, pixels } = paint(grid, { map: colourMap("single", "#112233") });
  const cell = width / 4;
  const alpha = Array.from({ length: width }, (_, x) => pixels[x * 4 + 3]!);
  const middle = cell / 2 - 1;
  assert.ok(alpha[middle]! < 32, "a cold patch is clear at its centre");
  assert.equal(Math.max(...alpha.slice(2 * cell, 3 * cell)), 0, "nothing off tissue");
  assert.equal(Math.min(...alpha.slice(3 * cell)), 255, "a patch alone has its own heat all over");
  for (let x = middle + 1; x < cell + middle; x++) assert.ok(alpha[x]! >= alpha[x - 1]!);
  assert.deepEqual([...pixels.slice(3 * cell * 4, 3 * cell * 4 + 3)], [0x11, 0x22, 0x33]);
});

test("below the threshold nothing is painted", () => {
  const grid = gridOf([[0.2, 0.5, 0.8]]);
  const { width, pixels } = paint(grid, { map: colourMap("turbo"), threshold: 0.5, single: true });
  const cell = width / 3;
  const alpha = [0, 1, 2].map((i) => pixels[i * cell * 4 + 3]);
  assert.deepEqual(alpha, [0, 128, 204]);
});

test("smoothing is a Gaussian mean over the patches that are there", () => {
  const random = (() => {
    let state = 1;
    return () => (state = (state * 48271) % 2147483647) / 2147483647;
  })();
  const rows = Array.from({ length: 9 }, () =>
    Array.from({ length: 14 }, () => (random() < 0.3 ? null : random())),
  );
  const sigma = 1.3;
  const smoothed = smooth(gridOf(rows), sigma);
  rows.forEach((row, y) =>
    row.forEach((value, x) => {
      let [sum, weights] = [0, 0];
      rows.forEach((others, v) =>
        others.forEach((other, u) => {
          const reach = Math.max(Math.abs(u - x), Math.abs(v - y));
          if (other === null || reach > Math.round(4 * sigma)) return;
          const weight = Math.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * sigma ** 2));
          sum += weight * other;
          weights += weight;
        }),
      );
      const expected = value === null ? 0 : sum / weights;
      assert.ok(Math.abs(smoothed.heat[y * 14 + x]! - expected) < 1e-12);
    }),
  );
  assert.equal(smooth(smoothed, 0), smoothed);
});

test("heat is a share of its 99th percentile, clipped", () => {
  const values = Array.from({ length: 101 }, (_, i) => i / 4);
  const found = normalise(gridOf([[null, ...values]]));
  assert.equal(found.heat[0], 0);
  values.forEach((value, i) =>
    assert.ok(Math.abs(found.heat[i + 1]! - Math.min(1, value / (99 / 4))) < 1e-12),
  );
  const below = normalise(gridOf([[-1, -2]]));
  assert.deepEqual([...below.heat], [0, 0]);
  const single = normalise(gridOf([[...Array<number>(400).fill(0), 3]]));
  assert.equal(single.heat[400], 1, "where the percentile is 0, the maximum is the measure");
});

const light = ([red, green, blue]: readonly [number, number, number]) => {
  const linear = [red, green, blue].map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * linear[0]! + 0.7152 * linear[1]! + 0.0722 * linear[2]!;
};

test("heat is told by lightness alone in the maps for everybody", () => {
  for (const name of ["viridis", "cividis", "inferno"] as const) {
    const map = colourMap(name);
    const lights = Array.from({ length: 64 }, (_, i) => light(map(i / 63)));
    lights.slice(1).forEach((value, i) => assert.ok(value >= lights[i]!, `${name} at ${i}`));
    assert.ok(lights[63]! > lights[0]! + 0.5);
  }
});

test("maps begin and end with the colours they are known by", () => {
  assert.deepEqual(colourMap("viridis")(0), hex("#440154"));
  assert.deepEqual(colourMap("viridis")(1), hex("#fde725"));
  assert.deepEqual(colourMap("single", "#0072b2")(0.3), [0, 0x72, 0xb2]);
  assert.equal(new Set(MAPS.map((one) => one.name)).size, MAPS.length);
  assert.equal(new Set(LAYER_COLOURS).size, LAYER_COLOURS.length);
});
