import assert from "node:assert/strict";
import { test } from "node:test";
import type { Feature, Geometry } from "./annotate.ts";
import type { Point } from "./api.ts";
import { Areas, simplified } from "./areas.ts";

function feature(id: string, geometry: Geometry): Feature {
  return { type: "Feature", id, geometry, properties: {} };
}

function square(x: number, y: number, side: number): Point[] {
  return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]];
}

test("the smallest area under the pointer is found, and none in a hole or beside it", () => {
  const areas = new Areas();
  areas.show([
    feature("small", { type: "Polygon", coordinates: [square(10, 10, 5)] }),
    feature("holed", { type: "Polygon", coordinates: [square(0, 0, 100), square(40, 40, 40)] }),
    feature("two", { type: "MultiPolygon", coordinates: [[square(200, 0, 10)], [square(300, 0, 10)]] }),
    feature("point", { type: "Point", coordinates: [150, 150] }),
  ]);
  const found = ([x, y]: Point, reach = 0) => areas.at([x, y], reach);
  assert.equal(found([12, 12]), "small");
  assert.equal(found([30, 30]), "holed");
  assert.equal(found([60, 60]), null);
  assert.equal(found([305, 5]), "two");
  assert.equal(found([250, 5]), null);
  assert.equal(found([150, 150], 5), null);
  // Near an outline counts, as far as it is told to: of a hole's, too.
  assert.equal(found([103, 50], 2), null);
  assert.equal(found([103, 50], 3), "holed");
  assert.equal(found([44, 60], 4), "holed");
});

test("what is drawn is as near to the outline as was asked, with few corners", () => {
  const ring = Float64Array.from(
    Array.from({ length: 4000 }, (_, i) => (2 * Math.PI * i) / 4000).flatMap((at) => [1000 * Math.cos(at), 1000 * Math.sin(at)]),
  );
  const few = simplified(ring, 50);
  assert.ok(few.length < ring.length / 20 && few.length > 60);
  for (let i = 0; i < ring.length; i += 2) {
    let nearest = Infinity;
    for (let j = 0; j < few.length; j += 2) nearest = Math.min(nearest, Math.hypot(ring[i]! - few[j]!, ring[i + 1]! - few[j + 1]!));
    assert.ok(nearest < 50);
  }
  assert.deepEqual(simplified(ring, 0), ring);
});

test("only what is in view is painted, and dots for what is smaller than a pixel", () => {
  const calls: string[] = [];
  const context = new Proxy({} as Record<string, unknown>, {
    get: (_, name: string) => (...args: unknown[]) => void calls.push(`${name} ${args.join()}`),
    set: () => true,
  }) as unknown as CanvasRenderingContext2D;
  globalThis.Path2D ??= class { moveTo() {} lineTo() {} closePath() {} } as unknown as typeof Path2D; // prettier-ignore
  const areas = new Areas();
  areas.show([0, 1, 2, 3].map((i) => feature(`${i}`, { type: "Polygon", coordinates: [square(1000 * i, 0, 10)] })));
  const none = { edited: null, selected: null, hovered: null };
  const turn = { a: 1, b: 0, left: 0, top: 0 };
  assert.equal(areas.paint(context, { x0: 500, y0: -10, w0: 1000, h0: 50 }, turn, none), 1);
  assert.equal(areas.paint(context, { x0: 500, y0: -10, w0: 1000, h0: 50 }, turn, { ...none, edited: "1" }), 0);
  calls.length = 0;
  assert.equal(areas.paint(context, { x0: 0, y0: 0, w0: 4000, h0: 400 }, { ...turn, a: 0.1 }, none), 4);
  assert.deepEqual(calls.filter((call) => call.startsWith("fill")).length, 4);
  assert.ok(calls.every((call) => call.startsWith("fillRect")));
});
