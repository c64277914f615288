import assert from "node:assert/strict";
import { test } from "node:test";
import { areaLabel, lengthLabel, mppLabel, powerLabel, scaleBar } from "./scalebar.ts";

test("the bar is as long on the screen as its label says, at every zoom", () => {
  for (let exponent = -6; exponent <= 9; exponent += 0.013) {
    const umPerPx = 2 ** exponent;
    const bar = scaleBar(umPerPx, 140);
    assert.ok(Math.abs(bar.px * umPerPx - bar.um) <= 1e-9 * bar.um);
    assert.ok(bar.px <= 140 * (1 + 1e-9) && bar.px >= 140 / 2.5 - 1e-6, `${bar.px} px at ${umPerPx}`);
    const first = Number(bar.um.toExponential()[0]);
    assert.ok([1, 2, 5].includes(first), `${bar.um}`);
    const [number, unit] = bar.label.split(" ") as [string, string];
    const um = Number(number.replaceAll(",", "")) * { nm: 1e-3, "µm": 1, mm: 1e3, cm: 1e4 }[unit]!;
    assert.ok(Math.abs(um - bar.um) <= 1e-6 * bar.um, `${bar.label} for ${bar.um} µm`);
  }
});

test("a bar that fits exactly is taken", () => {
  assert.deepEqual(scaleBar(0.5, 100), { um: 50, px: 100, label: "50 µm" });
  assert.deepEqual(scaleBar(10, 100), { um: 1000, px: 100, label: "1 mm" });
  assert.deepEqual(scaleBar(0.25, 140), { um: 20, px: 80, label: "20 µm" });
});

test("lengths, areas and scales are written in the units of the field", () => {
  assert.equal(lengthLabel(0), "0 µm");
  assert.equal(lengthLabel(0.25), "250 nm");
  assert.equal(lengthLabel(12.3456), "12.35 µm");
  assert.equal(lengthLabel(1234.5), "1.235 mm");
  assert.equal(lengthLabel(25_400), "2.54 cm");
  assert.equal(areaLabel(99_999), "100,000 µm²");
  assert.equal(areaLabel(1_250_000), "1.25 mm²");
  assert.equal(powerLabel(0.25), "40×");
  assert.equal(powerLabel(8), "1.25×");
  assert.equal(mppLabel(0.2738), "0.2738 µm/px");
});
