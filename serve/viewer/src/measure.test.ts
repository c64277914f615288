import assert from "node:assert/strict";
import { test } from "node:test";
import { areaUm2, crossesItself, lengthUm, measured } from "./measure.ts";
import type { Point } from "./api.ts";

const turned = (points: Point[], degrees: number, far: number): Point[] => {
  const [sin, cos] = [Math.sin((degrees * Math.PI) / 180), Math.cos((degrees * Math.PI) / 180)];
  return points.map(([x, y]) => [far + x * cos - y * sin, far + x * sin + y * cos]);
};

test("a 3-4-5 triangle has its sides and its area, turned and far from the origin", () => {
  const triangle: Point[] = [[0, 0], [300, 0], [300, 400]];
  for (const degrees of [0, 31, 90, 217]) {
    for (const far of [0, 150_000]) {
      const points = turned(triangle, degrees, far);
      assert.ok(Math.abs(lengthUm(points, 0.25) - 700 * 0.25) < 1e-8);
      assert.ok(Math.abs(areaUm2(points, 0.25) - 60_000 * 0.0625) < 1e-6);
    }
  }
});

test("a polygon of many corners has the area of the circle it follows", () => {
  const n = 720;
  const circle = Array.from({ length: n }, (_, i): Point => [
    1000 + 500 * Math.cos((2 * Math.PI * i) / n),
    1000 + 500 * Math.sin((2 * Math.PI * i) / n),
  ]);
  const polygon = (n / 2) * 500 ** 2 * Math.sin((2 * Math.PI) / n); // closed form of the regular n-gon
  assert.ok(Math.abs(areaUm2(circle, 0.5) - polygon / 4) < 1e-6 * polygon);
  assert.ok(Math.abs(areaUm2(circle.toReversed(), 0.5) - polygon / 4) < 1e-6 * polygon);
});

test("a measure is in µm, and in pixels where nothing says how large those are", () => {
  const square: Point[] = [[0, 0], [300, 0], [300, 300], [0, 300]];
  assert.equal(measured("length", square, 0.5), "450 µm");
  assert.equal(measured("area", square, 0.5), "22,500 µm²");
  assert.equal(measured("length", square, null), "900 px");
  assert.equal(measured("area", square, null), "90,000 px²");
});

test("too few points measure nothing", () => {
  assert.equal(lengthUm([], 0.5), 0);
  assert.equal(lengthUm([[4, 5]], 0.5), 0);
  assert.equal(areaUm2([], 0.5), 0);
  assert.equal(areaUm2([[0, 0], [10, 10]], 0.5), 0);
});

test("an outline that crosses itself is noticed", () => {
  assert.equal(crossesItself([[0, 0], [10, 0], [10, 10], [0, 10]]), false);
  assert.equal(crossesItself([[0, 0], [10, 10], [10, 0], [0, 10]]), true);
  assert.equal(crossesItself([[0, 0], [10, 0], [5, 2], [10, 10], [0, 10]]), false);
});
