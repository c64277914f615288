import assert from "node:assert/strict";
import { test } from "node:test";
import { fromKey, heatLayers, layerKey, looksNow, lookText, MAX_LAYERS, removeLayer, showWhere, solo, toLook } from "./layers.ts";
import type { Layer } from "./layers.ts";
import { layers } from "./state.ts";

test("a sentence and its contrast are one string of the address and come back", () => {
  const pairs = [["necrosis", null], ["necrosis", "tissue"], ["a ~ b", "c"]] as const; // prettier-ignore
  for (const [text, contrast] of pairs) {
    const key = layerKey(text, contrast);
    assert.equal(layerKey(fromKey(key).text, fromKey(key).contrast), key);
  }
  assert.deepEqual(fromKey("There is mucin. ~ tissue"), { text: "There is mucin.", contrast: "tissue" });
});

test("a look is read back from the address as it was written", () => {
  const look: Layer["look"] = { shown: false, map: "inferno", opacity: 0.35, threshold: 1, single: true, boxes: false };
  for (const one of [look, { ...look, shown: true, boxes: true, single: false, opacity: 0 }])
    assert.deepEqual(toLook(lookText(one)), one);
  for (const text of ["", "rainbow 1 2", "turbo", "turbo a b shown"]) assert.equal(toLook(text), null);
  assert.deepEqual(toLook("turbo 400 -3"), { ...look, map: "turbo", opacity: 1, threshold: 0, single: false });
});

test("only a look that is not as usual is in the address", () => {
  const usual = toLook("viridis 70 10 shown boxes")!;
  layers.value = ["a"];
  heatLayers.value = [{ key: "a", look: usual } as Layer];
  assert.deepEqual(looksNow(), [""]);
  heatLayers.value = [{ key: "a", look: { ...usual, opacity: 0.5 } } as Layer];
  assert.deepEqual(looksNow(), ["viridis 50 10 shown boxes"]);
});

test("a sentence is shown once, and at most so many are", () => {
  layers.value = [];
  for (const sentence of ["a", "b", " a ", "c", "d", "e", "f", "g"]) showWhere(sentence);
  assert.equal(layers.value.length, MAX_LAYERS);
  assert.deepEqual(layers.value, ["b", "c", "d", "e", "f", "g"]);
  removeLayer("d");
  assert.deepEqual(layers.value, ["b", "c", "e", "f", "g"]);
});

test("one layer is shown alone, and all again", () => {
  const look = { shown: true } as Layer["look"];
  heatLayers.value = ["a", "b", "c"].map((key) => ({ key, look }) as Layer);
  const shown = () => heatLayers.value.filter((layer) => layer.look.shown).map((layer) => layer.key);
  solo("b");
  assert.deepEqual(shown(), ["b"]);
  solo("c");
  assert.deepEqual(shown(), ["c"]);
  solo("c");
  assert.deepEqual(shown(), ["a", "b", "c"]);
});
