import assert from "node:assert/strict";
import { test } from "node:test";
import { fromKey, heatLayers, layerKey, MAX_LAYERS, removeLayer, showWhere, solo } from "./layers.ts";
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
