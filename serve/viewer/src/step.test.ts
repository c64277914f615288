import assert from "node:assert/strict";
import { test } from "node:test";
import { follow } from "./step.ts";
import type { Join } from "./step.ts";

const near = (a: number, b: number) => assert.ok(Math.abs(a - b) < 1e-6, `${a} is not ${b}`);

test("a step of 100 µm to the right is one on both slides, whatever their scale", () => {
  const join: Join = {
    from: { x: 1000, y: 1000, w: 4000, rot: 0 },
    to: { x: 500, y: 700, w: 2000, rot: 0 },
    fromMpp: 0.25,
    toMpp: 0.5,
  };
  const there = follow({ x: 1400, y: 1000, w: 800, rot: 0 }, join, [600, 300]);
  near(there.x, 700); // 400 px of 0.25 µm are 200 px of 0.5 µm
  near(there.y, 700);
  near(there.w, 200); // 200 µm over 600 px; 100 µm over 300 px; 200 px of 0.5 µm
});

test("what is matched on the screen stays matched when a slide is turned against the other", () => {
  const join: Join = {
    from: { x: 0, y: 0, w: 1000, rot: 30 },
    to: { x: 0, y: 0, w: 1000, rot: 120 },
    fromMpp: 0.5,
    toMpp: 0.5,
  };
  const screen = (x: number, y: number, rot: number): [number, number] => {
    const turn = (rot * Math.PI) / 180;
    return [x * Math.cos(turn) - y * Math.sin(turn), x * Math.sin(turn) + y * Math.cos(turn)];
  };
  for (const [x, y] of [[10, 0], [0, 10], [-7, 3]] as const) {
    const there = follow({ x, y, w: 1000, rot: 30 }, join, [100, 100]);
    const [a, b] = [screen(x, y, 30), screen(there.x, there.y, 120)];
    near(a[0], b[0]);
    near(a[1], b[1]);
  }
  assert.equal(follow({ x: 0, y: 0, w: 1, rot: 350 }, join, [1, 1]).rot, 80);
});

test("there and back is where it was", () => {
  const join: Join = {
    from: { x: 12, y: -4, w: 1000, rot: 15 },
    to: { x: 900, y: 77, w: 300, rot: 200 },
    fromMpp: 0.2738,
    toMpp: 0.499,
  };
  const back: Join = { from: join.to, to: join.from, fromMpp: join.toMpp, toMpp: join.fromMpp };
  const now = { x: 321.5, y: 99, w: 777, rot: 45 };
  const again = follow(follow(now, join, [640, 480]), back, [480, 640]);
  for (const key of ["x", "y", "w", "rot"] as const) near(again[key], now[key]);
});
