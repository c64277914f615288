import assert from "node:assert/strict";
import { test } from "node:test";
import { format, parse, slideRoute } from "./route.ts";
import type { Route } from "./route.ts";

test("an address is read back as it was written", () => {
  const odd = "a slide/with?odd#parts & ümlaut=1";
  const routes: Route[] = [
    { page: "archive", q: "", label: "", status: "ready" },
    { page: "archive", q: "tcga 01", label: "organ=colon & more", status: "quarantined" },
    slideRoute("slide_0001-1a2b3c4d"),
    slideRoute(odd, {
      place: { x: 12345.67, y: 0.25, w: 800, rot: 90 },
      q: "dense lymphocytes?",
      like: "slide_0001-1a2b3c4d/2_2",
      search: { level: "slide", mode: "hybrid", k: 24, split: "test", labels: ["organ=colon & more", "a=b=c"], without: "patient" },
      layers: ["areas of necrosis, and more", "100 % tumour"],
      looks: ["", "turbo 50 30 -pb"],
      picture: { brightness: 0.8, contrast: 1, gamma: 1.25 },
      panel: "where",
    }),
    slideRoute("a", { panel: null }),
    { page: "compare", left: odd, right: "b", sync: true, places: [null, null] },
    {
      page: "compare",
      left: "a",
      right: "b",
      sync: false,
      places: [{ x: 1, y: 2, w: 3, rot: 0 }, { x: 4.5, y: 5, w: 6, rot: 270 }],
    },
  ];
  for (const route of routes) assert.deepEqual(parse(format(route)), route);
});

test("addresses that mean nothing show the archive or the whole slide", () => {
  const archive = { page: "archive", q: "", label: "", status: "ready" };
  for (const hash of ["", "#", "#/", "#/elsewhere/x", "#/slide/", "#/compare/a"])
    assert.deepEqual(parse(hash), archive);
  for (const query of ["x=1&y=2", "x=1&y=2&w=-3", "x=1&y=2&w=nan", "x=&y=&w="])
    assert.deepEqual(parse(`#/slide/a?${query}`), slideRoute("a"));
  for (const query of ["k=0&find=all&by=&without=me&label=organ", "k=101&picture=1,2", "picture=a,b,c&looks=x"])
    assert.deepEqual(parse(`#/slide/a?${query}`), slideRoute("a"));
  assert.deepEqual(parse("#/slide/a?picture=0,9,1"), slideRoute("a", { picture: { brightness: 0.3, contrast: 3, gamma: 1 } }));
  assert.deepEqual(parse("#/slide/a%"), slideRoute("a%"));
  assert.equal((parse("#/slide/a?x=1&y=1&w=1&rot=-90") as { place: { rot: number } }).place.rot, 270);
});
