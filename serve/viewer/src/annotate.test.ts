import assert from "node:assert/strict";
import { test } from "node:test";
import { area, bounds, classOf, CLASSES, colourOf, newFeature, readCollection, toGeometry, toShape } from "./annotate.ts"; // prettier-ignore
import type { Feature, Geometry } from "./annotate.ts";
import type { Point } from "./api.ts";

const SQUARE: Point[] = [[10, 20], [110, 20], [110, 70], [10, 70], [10, 20]]; // prettier-ignore
const HOLE: Point[] = [[30, 30], [50, 30], [50, 50], [30, 50], [30, 30]]; // prettier-ignore
const SLANTED: Point[] = [[0, 0], [10, 5], [20, 0], [10, 30], [0, 0]]; // prettier-ignore

test("an upright rectangle stays one, whichever corner it begins with", () => {
  for (const turn of [0, 1, 2, 3]) {
    const corners = SQUARE.slice(0, 4);
    const turned = [...corners.slice(turn), ...corners.slice(0, turn)];
    for (const points of [turned, turned.toReversed()]) {
      const shape = toShape({ type: "Polygon", coordinates: [[...points, points[0]!]] });
      assert.equal(shape?.type, "RECTANGLE");
      assert.deepEqual(toGeometry(shape!), { type: "Polygon", coordinates: [SQUARE] });
    }
  }
});

test("every area comes back as it was", () => {
  const shapes: [Geometry, string][] = [
    [{ type: "Polygon", coordinates: [SLANTED] }, "POLYGON"],
    [{ type: "Polygon", coordinates: [SQUARE, HOLE] }, "MULTIPOLYGON"],
    [{ type: "MultiPolygon", coordinates: [[SQUARE, HOLE], [SLANTED]] }, "MULTIPOLYGON"],
  ];
  for (const [geometry, type] of shapes) {
    const shape = toShape(geometry);
    assert.equal(shape?.type, type);
    assert.deepEqual(toGeometry(shape!), geometry);
  }
  const bow: Point[] = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]; // prettier-ignore
  assert.equal(toShape({ type: "Polygon", coordinates: [bow] })?.type, "POLYGON");
  assert.equal(toShape({ type: "Point", coordinates: [1, 2] }), null);
});

test("a turned rectangle is the polygon of its corners", () => {
  const bounds = { minX: 0, minY: 0, maxX: 0, maxY: 0 };
  const turned = toGeometry({ type: "RECTANGLE", geometry: { bounds, x: 10, y: 20, w: 40, h: 20, rot: Math.PI / 6 } });
  const points = (turned.coordinates as Point[][])[0]!;
  assert.equal(area(turned).toFixed(0), "800");
  // Its middle stays, its upper side points 30 degrees down to the right, as the slide's y runs down.
  const middle = [0, 1].map((axis) => points.slice(0, 4).reduce((sum, at) => sum + at[axis]!, 0) / 4);
  assert.deepEqual(middle.map(Math.round), [30, 30]);
  const [[ax, ay], [bx, by]] = [points[0]!, points[1]!];
  assert.ok(Math.abs(Math.atan2(by - ay, bx - ax) - Math.PI / 6) < 1e-3);
  assert.equal(toShape(turned)?.type, "POLYGON");
});

test("coordinates are written to a hundredth of a pixel and closed", () => {
  const points: Point[] = [[0.123456, 1], [10.5, 1], [3, 9.999]]; // prettier-ignore
  const geometry = toGeometry({ type: "POLYGON", geometry: { bounds: { minX: 0, minY: 1, maxX: 10, maxY: 10 }, points } });
  assert.deepEqual(geometry.coordinates, [[[0.12, 1], [10.5, 1], [3, 10], [0.12, 1]]]); // prettier-ignore
});

test("areas leave out holes", () => {
  const geometry: Geometry = { type: "MultiPolygon", coordinates: [[SQUARE, HOLE], [SLANTED]] };
  assert.equal(area(geometry), 100 * 50 - 20 * 20 + 250);
  assert.equal(area({ type: "LineString", coordinates: SQUARE }), 0);
  assert.deepEqual(bounds(geometry), { x0: 0, y0: 0, w0: 110, h0: 70 });
  assert.deepEqual(bounds({ type: "Point", coordinates: [5, 6] }), { x0: 5, y0: 6, w0: 0, h0: 0 });
});

test("a class has the colour it has in use, or QuPath's, or one of its own", () => {
  const used: Feature = {
    type: "Feature",
    id: "a",
    geometry: { type: "Point", coordinates: [0, 0] },
    properties: { classification: { name: "Mitosis", color: [1, 2, 3] } },
  };
  assert.deepEqual(classOf("Mitosis", [used]), { name: "Mitosis", color: [1, 2, 3] });
  assert.deepEqual(classOf(" Tumor "), CLASSES[0]);
  assert.deepEqual(classOf("Mitosis"), classOf("Mitosis"));
  assert.notDeepEqual(classOf("Mitosis")?.color, classOf("Vessel")?.color);
  assert.equal(classOf("  "), null);
  assert.equal(colourOf(used), "#010203");
});

test("files of QuPath are read, others are refused with a sentence", () => {
  const feature = newFeature("a", toShape({ type: "Polygon", coordinates: [SQUARE] })!);
  const collection = { type: "FeatureCollection", features: [feature] };
  for (const document of [collection, [feature], feature])
    assert.deepEqual(readCollection(`\uFEFF${JSON.stringify(document)}`), collection);
  for (const text of ["", "{", "3", "null", '{"type": "Topology"}', '[{"type": "Polygon"}]', "[3]"])
    assert.throws(() => readCollection(text), /^Error: This file .*\.$/);
  assert.throws(() => readCollection(JSON.stringify(Array(2001).fill(feature))), /At most 2000/);
});
