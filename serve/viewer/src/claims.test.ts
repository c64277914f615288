import assert from "node:assert/strict";
import { test } from "node:test";
import { toClaims } from "./claims.ts";

test("an answer is cut into its sentences and stays itself", () => {
  const answer = "There is necrosis. It covers approx. 4.5 mm of the section!\n\n- **Mucin** is absent.\n2) No mitoses\n3. Fat.\n";
  const claims = toClaims(answer);
  assert.equal(claims.map((one) => one.shown).join(""), answer);
  assert.deepEqual(
    claims.map((one) => one.text).filter(Boolean),
    ["There is necrosis.", "It covers approx. 4.5 mm of the section!", "Mucin is absent.", "No mitoses", "Fat."],
  );
});

test("what has no word is no claim", () => {
  assert.deepEqual(toClaims(""), []);
  assert.deepEqual(toClaims("3.\n—\n").map((one) => one.text), ["", ""]);
  for (const said of ["cannot be told from this slide", "Cannot be told from this slide.", "Yes.", "none"])
    assert.deepEqual(toClaims(said), [{ shown: said, text: "" }]);
  assert.equal(toClaims("necrosis")[0]!.text, "necrosis");
  assert.equal(toClaims(`A${"a".repeat(3000)}.`)[0]!.text.length, 2000);
});
