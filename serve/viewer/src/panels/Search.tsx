/** Search: by words, by the region or picture in view, or by the whole slide; a click flies there. */

import { signal } from "@preact/signals";
import { useEffect, useState } from "preact/hooks";
import { api, Problem, slidePath, viewPath } from "../api.ts";
import type { Box, Found, Outlines, SearchResponse } from "../api.ts";
import { format, go, slideRoute } from "../route.ts";
import type { Place } from "../route.ts";
import type { SlideView } from "../slide.ts";
import { layers, outlines, query, session, slide } from "../state.ts";
import { Failed, Refused, scoreText } from "./parts.tsx";

type Level = "region" | "slide" | "patch";
type Mode = "vector" | "text" | "hybrid";
interface Label {
  name: string;
  value: string;
}
interface Condition {
  field: string;
  op: "=";
  value: string;
}
type Sought =
  | { text: string }
  | { slide_id: string }
  | { region_id: string }
  | { image: { data: string; mpp: number } };

const MAX_K = 100;
const PICTURE_PX = 1024;
const THUMBNAIL_PX = 256;

// What was asked and found stays while other panels and slides are looked at.
const level = signal<Level>("region");
const mode = signal<Mode>("vector");
const k = signal(12);
const split = signal("");
const patient = signal("");
const labels = signal<Label[]>([]);
const otherSlides = signal(false);
const otherPatients = signal(false);
const hasPatches = signal<boolean | null>(null);

const found = signal<{ of: string; about: SearchResponse; level: Level } | null>(null);
const busy = signal(false);
const failed = signal<string | null>(null);
/** The result that was opened last. */
const opened = signal<Found | null>(null);
let running: AbortController | null = null;
let lastText = "";

export function Search({ view }: { view: SlideView | null }) {
  const can = session.value?.can;
  useEffect(() => {
    if (!can?.search) return;
    if (hasPatches.value === null) void lookForPatches();
    // An address with a query is a link to its results.
    if (query.value.trim() && query.value.trim() !== lastText) void searchText(view);
  }, [can?.search]);
  useEffect(() => {
    if (view) outlineOpened(view);
  }, [view, opened.value, slide.value?.slide_id]);
  if (!can?.search)
    return (
      <Refused
        scope="search"
        doing="searching"
        lacks="There is nothing to search by here: the service was started without a trained run, or its archive has no index of that run yet (pathflip index)."
      />
    );
  return (
    <div class="panel-part">
      <form
        role="search"
        onSubmit={(event) => {
          event.preventDefault();
          void searchText(view);
        }}
      >
        <label for="search-text">Search in words</label>
        <div class="line">
          <input
            id="search-text"
            type="search"
            maxLength={2000}
            placeholder="dense lymphocytes"
            value={query.value}
            onInput={(event) => (query.value = event.currentTarget.value)}
          />
          <button type="submit" class="primary" disabled={!query.value.trim()}>
            Search
          </button>
        </div>
        <LikeThis view={view} />
        <Options />
      </form>
      <p role="status" class="hint">
        {busy.value ? "Searching…" : found.value ? summary() : ""}
      </p>
      <Failed text={failed.value} />
      <Results view={view} />
    </div>
  );
}

function LikeThis({ view }: { view: SlideView | null }) {
  if (!view || !slide.value) return null;
  const patches = level.value === "patch";
  return (
    <div class="line" role="group" aria-labelledby="search-like">
      <span id="search-like">Like this</span>
      <button
        type="button"
        aria-label="Like this region"
        title="Regions like the one under the middle of the view"
        disabled={patches}
        onClick={() => void likeRegion(view)}
      >
        region
      </button>
      <button
        type="button"
        aria-label="Like this view"
        title="Places that look like the picture in view"
        onClick={() => void likeView(view)}
      >
        view
      </button>
      <button type="button" aria-label="Like this slide" disabled={patches} onClick={() => void likeSlide(view)}>
        slide
      </button>
    </div>
  );
}

function Options() {
  const can = session.value?.can;
  const narrowed = conditions().length > 0 || otherSlides.value || otherPatients.value;
  return (
    <details>
      <summary>{narrowed ? "Options and filters (in use)" : "Options and filters"}</summary>
      <div class="fields">
        <label for="search-level">Find</label>
        <select
          id="search-level"
          value={level.value}
          onChange={(event) => {
            level.value = event.currentTarget.value as Level;
            if (level.value !== "slide") mode.value = "vector";
          }}
        >
          <option value="region">regions</option>
          <option value="slide">slides</option>
          {hasPatches.value && <option value="patch">single patches</option>}
        </select>
        <label for="search-mode">Words are compared by</label>
        <select
          id="search-mode"
          value={mode.value}
          disabled={level.value !== "slide"}
          onChange={(event) => (mode.value = event.currentTarget.value as Mode)}
        >
          <option value="vector">meaning</option>
          <option value="text">the words of captions</option>
          <option value="hybrid">both</option>
        </select>
        <label for="search-k">Results</label>
        <input
          id="search-k"
          type="number"
          min={1}
          max={MAX_K}
          value={k.value}
          onChange={(event) => {
            k.value = Math.min(MAX_K, Math.max(1, Math.round(event.currentTarget.valueAsNumber) || 12));
            event.currentTarget.value = String(k.value);
          }}
        />
        <label for="search-split">Only of split</label>
        <input
          type="text"
          id="search-split"
          value={split.value}
          onInput={(event) => (split.value = event.currentTarget.value)}
        />
        {can?.patients && (
          <>
            <label for="search-patient">Only of patient</label>
            <input
              type="text"
              id="search-patient"
              value={patient.value}
              onInput={(event) => (patient.value = event.currentTarget.value)}
            />
          </>
        )}
      </div>
      <Labels />
      <p class="hint">With “like this region” and “like this slide”:</p>
      <label class="check">
        <input
          type="checkbox"
          checked={otherSlides.value}
          onChange={(event) => (otherSlides.value = event.currentTarget.checked)}
        />
        leave out this slide
      </label>
      <label class="check">
        <input
          type="checkbox"
          checked={otherPatients.value}
          onChange={(event) => (otherPatients.value = event.currentTarget.checked)}
        />
        leave out all slides of its patient
      </label>
    </details>
  );
}

function Labels() {
  const set = (i: number, more: Partial<Label>) =>
    (labels.value = labels.value.map((one, j) => (i === j ? { ...one, ...more } : one)));
  return (
    <fieldset class="labels">
      <legend>Only slides with these labels</legend>
      {labels.value.map((one, i) => (
        <div class="line" key={i}>
          <input
            type="text"
            aria-label={`Name of label ${i + 1}`}
            placeholder="name"
            value={one.name}
            onInput={(event) => set(i, { name: event.currentTarget.value })}
          />
          <span aria-hidden="true">=</span>
          <input
            type="text"
            aria-label={`Value of label ${i + 1}`}
            placeholder="value"
            value={one.value}
            onInput={(event) => set(i, { value: event.currentTarget.value })}
          />
          <button
            type="button"
            aria-label={`Remove label ${i + 1}`}
            onClick={() => (labels.value = labels.value.filter((_, j) => j !== i))}
          >
            ×
          </button>
        </div>
      ))}
      {labels.value.length < 8 && (
        <button
          type="button"
          onClick={() => (labels.value = [...labels.value, { name: "", value: "" }])}
        >
          Add a label
        </button>
      )}
    </fieldset>
  );
}

function summary(): string {
  const { of, about, level: of_level } = found.value!;
  const count = about.results.length;
  const what = of_level === "region" ? "region" : of_level === "slide" ? "slide" : "patch";
  const plural = what === "patch" ? "patches" : `${what}s`;
  const told = count === 0 ? `No ${plural} found` : `${count} ${count === 1 ? what : plural}`;
  const partly = about.exhaustive === false ? " Only the patches of the best regions were compared." : "";
  return `${told} ${of}.${partly}`.replace(/([.?!]”)\./, "$1");
}

// -- results ---------------------------------------------------------------------------------------

function Results({ view }: { view: SlideView | null }) {
  if (!found.value?.about.results.length) return null;
  return (
    <ol class="strip" aria-label="Results, best first">
      {found.value.about.results.map((one) => (
        <Result key={`${one.slide_id} ${one.x0} ${one.y0}`} one={one} view={view} />
      ))}
    </ol>
  );
}

function Result({ one, view }: { one: Found; view: SlideView | null }) {
  const box = boxOf(one);
  const picture = box
    ? viewPath(one.slide_id, box, THUMBNAIL_PX)
    : slidePath(one.slide_id, "thumbnail");
  const here = slide.value?.slide_id;
  const [missing, setMissing] = useState(false);
  return (
    <li>
      <button
        type="button"
        class="result"
        aria-current={opened.value === one ? "true" : undefined}
        onClick={() => openResult(one, view)}
      >
        <span class="picture">
          {missing ? (
            "No picture"
          ) : (
            <img src={picture} alt="" loading="lazy" decoding="async" onError={() => setMissing(true)} />
          )}
        </span>
        <span class="score">{scoreText(one.score)}</span>
        <span class="name">{one.slide_id}</span>
        {box && <span class="place">{placeText(one)}</span>}
      </button>
      {here !== undefined && here !== one.slide_id && (
        <a
          class="compare"
          href={format({
            page: "compare", left: here, right: one.slide_id, sync: false,
            places: [view?.place() ?? null, placeOf(one, view)],
          } /* prettier-ignore */)}
          aria-label={`Compare with ${one.slide_id}`}
        >
          Compare
        </a>
      )}
    </li>
  );
}

function boxOf({ x0, y0, size0 }: Found): Box | null {
  return x0 === null || y0 === null || size0 === null ? null : { x0, y0, w0: size0, h0: size0 };
}

/** Where a result lies, from the slide's left and top. */
function placeText({ x0, y0, size0, mpp }: Found): string {
  if (x0 === null || y0 === null || size0 === null || mpp === null) return "";
  const mm = (px: number) => ((px * mpp) / 1000).toFixed(1);
  return `${mm(x0 + size0 / 2)}, ${mm(y0 + size0 / 2)} mm`;
}

/** A place that shows the result's square as a whole. */
function placeOf(one: Found, view: SlideView | null): Place | null {
  const box = boxOf(one);
  if (!box) return null;
  const { clientWidth = innerWidth, clientHeight = innerHeight } = view?.element ?? {};
  const wide = Math.max(1, clientWidth / Math.max(1, clientHeight));
  return { x: box.x0 + box.w0 / 2, y: box.y0 + box.h0 / 2, w: box.w0 * 1.1 * wide, rot: 0 };
}

function openResult(one: Found, view: SlideView | null): void {
  opened.value = one;
  const box = boxOf(one);
  if (view && slide.value?.slide_id === one.slide_id) {
    if (box) view.fly(box.x0, box.y0, box.w0, box.h0);
    return;
  }
  const shared = { q: query.value, layers: layers.value, panel: "search" as const };
  go(slideRoute(one.slide_id, { place: placeOf(one, view), ...shared }));
}

function outlineOpened(view: SlideView): void {
  const one = opened.value;
  const box = one && one.slide_id === slide.value?.slide_id ? boxOf(one) : null;
  view.outline("found", box ? [box] : [], { label: `Result ${one?.rank ?? ""}`, colour: "#d55e00" });
}

// -- asking ----------------------------------------------------------------------------------------

async function searchText(view: SlideView | null): Promise<void> {
  const text = query.value.trim();
  if (!text) return;
  lastText = text;
  view?.removeOutline("query");
  await search({ text }, `for “${text}”`);
}

async function likeSlide(view: SlideView): Promise<void> {
  const id = slide.value!.slide_id;
  view.removeOutline("query");
  await search({ slide_id: id }, `like ${id}`);
}

async function likeRegion(view: SlideView): Promise<void> {
  const id = slide.value!.slide_id;
  const { x, y } = view.place();
  await guarded(async (signal) => {
    const known = outlines.value ?? (await api.get<Outlines>(slidePath(id, "outlines"), { signal }));
    const region = known.regions.find(
      ({ x0, y0, size0 }) => x >= x0 && x < x0 + size0 && y >= y0 && y < y0 + size0,
    );
    if (!region)
      throw new Problem(
        "No region of the archive lies under the middle of the view. Move the view onto tissue.",
        "no_region", 0,
      ); // prettier-ignore
    const { x0, y0, size0 } = region;
    view.outline("query", [{ x0, y0, w0: size0, h0: size0 }], { label: "Like this", dashed: true });
    await ask({ region_id: region.region_id }, "like the region in the middle of the view", signal);
  });
}

async function likeView(view: SlideView): Promise<void> {
  const { slide_id, width, height, mpp } = slide.value!; // of an archive, so it has a scale
  await guarded(async (signal) => {
    const seen = view.box();
    const [left, top] = [Math.max(0, seen.x0), Math.max(0, seen.y0)];
    const right = Math.min(width, seen.x0 + seen.w0);
    const bottom = Math.min(height, seen.y0 + seen.h0);
    const box = { x0: left, y0: top, w0: right - left, h0: bottom - top };
    if (box.w0 < 1 || box.h0 < 1)
      throw new Problem("There is nothing of the slide in view.", "no_view", 0);
    const side = Math.max(box.w0, box.h0);
    const px = Math.max(16, Math.min(PICTURE_PX, Math.round(side)));
    const answer = await fetch(viewPath(slide_id, box, px), { credentials: "same-origin", signal });
    if (!answer.ok)
      throw new Problem("The picture in view could not be read from the slide.", "view", answer.status);
    const data = await base64(await answer.blob());
    view.outline("query", [box], { label: "Like this", dashed: true });
    await ask({ image: { data, mpp: (side * mpp!) / px } }, "like the picture in view", signal);
  });
}

function base64(blob: Blob): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result).replace(/^[^,]*,/, ""));
    reader.onerror = () => reject(reader.error ?? new Error("no picture"));
    reader.readAsDataURL(blob);
  });
}

function conditions(): Condition[] {
  const equal = (field: string, value: string): Condition[] =>
    value.trim() ? [{ field, op: "=", value: value.trim() }] : [];
  return [
    ...equal("split", split.value),
    ...(session.value?.can.patients ? equal("patient_id", patient.value) : []),
    ...labels.value.flatMap(({ name, value }) => (name.trim() ? equal(`label.${name.trim()}`, value) : [])),
  ];
}

async function search(sought: Sought, of: string): Promise<void> {
  await guarded((signal) => ask(sought, of, signal));
}

async function ask(sought: Sought, of: string, signal: AbortSignal): Promise<void> {
  const stored = "slide_id" in sought || "region_id" in sought;
  // A slide is compared with slides, a region with what is chosen.
  const wanted: Level = "slide_id" in sought ? "slide" : level.value;
  const body = {
    ...sought,
    level: wanted,
    mode: "text" in sought && wanted === "slide" ? mode.value : "vector",
    // A region is most like itself, which nobody looks for; of a slide, the service leaves it out.
    k: "region_id" in sought ? k.value + 1 : k.value,
    filters: conditions(),
    exclude_same_slide: stored && (otherSlides.value || wanted === "slide"),
    exclude_same_patient: stored && otherPatients.value,
  };
  const about = await api.post<SearchResponse>("/v1/search", body, { signal });
  const others = about.results.filter(
    (one) => !("region_id" in sought && one.region_id === sought.region_id),
  );
  const results = others.slice(0, k.value).map((one, i) => ({ ...one, rank: i + 1 }));
  found.value = { of, about: { ...about, results }, level: wanted };
  opened.value = null;
}

/** Run the newest request; one before it is called off. */
async function guarded(work: (signal: AbortSignal) => Promise<void>): Promise<void> {
  running?.abort();
  const mine = new AbortController();
  running = mine;
  busy.value = true;
  failed.value = null;
  try {
    await work(mine.signal);
  } catch (error) {
    if (mine.signal.aborted) return;
    failed.value = error instanceof Problem ? error.message : "The search failed. Please try again.";
    found.value = null; // what is there is of another question
    if (!(error instanceof Problem)) console.error(error);
  } finally {
    if (running === mine) busy.value = false;
  }
}

async function lookForPatches(): Promise<void> {
  try {
    const listed = await api.get<{ data: { capability: string }[] }>("/v1/models");
    hasPatches.value = listed.data.some((one) => one.capability === "patches");
  } catch {
    hasPatches.value = false; // asked again when the panel is opened anew on a new page
  }
}
