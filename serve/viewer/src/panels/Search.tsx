/** Search: by words, by the region or picture in view, or by the whole slide; a click flies there. */

import { signal } from "@preact/signals";
import { useEffect, useState } from "preact/hooks";
import { api, Problem, slidePath, viewPath } from "../api.ts";
import type { Box, Found, Outlines, SearchResponse } from "../api.ts";
import { looksNow } from "../layers.ts";
import { format, go, isLabel, MAX_LABELS, MAX_RESULTS, slideRoute, USUAL_SEARCH } from "../route.ts";
import type { Level, Mode, Place, SearchOptions } from "../route.ts";
import type { SlideView } from "../slide.ts";
import { arrivals, layers, like, outlines, picture, query, searchOptions, session, slide } from "../state.ts";
import { Failed, Refused, scoreText } from "./parts.tsx";

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

const PICTURE_PX = 1024;
const THUMBNAIL_PX = 256;

// What was asked and found stays while other panels and slides are looked at.
const patient = signal("");
const choosing = signal(false);
const hasPatches = signal<boolean | null>(null);

const found = signal<{ of: string; about: SearchResponse; level: Level } | null>(null);
const busy = signal(false);
const failed = signal<string | null>(null);
/** The result that was opened last. */
const opened = signal<Found | null>(null);
let running: AbortController | null = null;
/** What was searched for last, and the last address that was looked at for something to search for. */
const last = { wish: "", arrival: 0 };

export function Search({ view }: { view: SlideView | null }) {
  const can = session.value?.can;
  useEffect(() => {
    if (can?.search && hasPatches.value === null) void lookForPatches();
  }, [can?.search]);
  // An address with a query is a link to its results.
  useEffect(() => {
    if (!can?.search || last.arrival === arrivals.value) return;
    last.arrival = arrivals.value;
    if (wish() !== last.wish) void searchWish(view);
  }, [can?.search, arrivals.value]);
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
  const patches = searchOptions.value.level === "patch";
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

function choose(more: Partial<SearchOptions>): void {
  searchOptions.value = { ...searchOptions.value, ...more };
}

/** Options are folded away as soon as something is searched: results come first. */
function Options() {
  const told = optionsText();
  return (
    <>
      <div class="line">
        <button
          type="button"
          class="small"
          id="search-choose"
          aria-expanded={choosing.value}
          aria-controls="search-options"
          onClick={() => (choosing.value = !choosing.value)}
        >
          Options and filters
        </button>
        {told && <span class="hint grow">{told}</span>}
      </div>
      <div id="search-options" class="options" hidden={!choosing.value}>
        {choosing.value && <Fields />}
      </div>
    </>
  );
}

/** The options that are not as usual, in words. */
function optionsText(): string {
  const { level, mode, k, split, labels, without } = searchOptions.value;
  return [
    level === "slide" ? "slides" : level === "patch" ? "single patches" : "",
    level === "slide" && mode !== "vector" ? (mode === "text" ? "by words" : "by meaning and words") : "",
    k === USUAL_SEARCH.k ? "" : `${k} results`,
    split.trim() ? `split ${split.trim()}` : "",
    ...labels.filter(isLabel),
    session.value?.can.patients && patient.value.trim() ? `patient ${patient.value.trim()}` : "",
    without === "slide" ? "not this slide" : without === "patient" ? "not this patient" : "",
  ]
    .filter(Boolean)
    .join(", ");
}

function Fields() {
  const { level, mode, k, split, without } = searchOptions.value;
  return (
    <>
      <div class="fields">
        <label for="search-level">Find</label>
        <select
          id="search-level"
          value={level}
          onChange={(event) => {
            const wanted = event.currentTarget.value as Level;
            choose(wanted === "slide" ? { level: wanted } : { level: wanted, mode: "vector" });
          }}
        >
          <option value="region">regions</option>
          <option value="slide">slides</option>
          {hasPatches.value && <option value="patch">single patches</option>}
        </select>
        <label for="search-mode">Words are compared by</label>
        <select
          id="search-mode"
          value={mode}
          disabled={level !== "slide"}
          onChange={(event) => choose({ mode: event.currentTarget.value as Mode })}
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
          max={MAX_RESULTS}
          value={k}
          onChange={(event) => {
            const wanted = Math.round(event.currentTarget.valueAsNumber) || USUAL_SEARCH.k;
            choose({ k: Math.min(MAX_RESULTS, Math.max(1, wanted)) });
            event.currentTarget.value = String(searchOptions.value.k);
          }}
        />
        <label for="search-split">Only of split</label>
        <input type="text" id="search-split" value={split} onInput={(event) => choose({ split: event.currentTarget.value })} />
        {session.value?.can.patients && (
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
        <label for="search-without">Leave out of “like this”</label>
        <select
          id="search-without"
          value={without}
          onChange={(event) => choose({ without: event.currentTarget.value as SearchOptions["without"] })}
        >
          <option value="">nothing</option>
          <option value="slide">this slide</option>
          <option value="patient">all slides of its patient</option>
        </select>
      </div>
      <Labels />
    </>
  );
}

function Labels() {
  const { labels } = searchOptions.value;
  const rows = labels.map((label) => label.split(/=(.*)/s) as [string, string | undefined]);
  const set = (i: number, name: string, value: string) =>
    choose({ labels: labels.map((label, j) => (i === j ? `${name}=${value}` : label)) });
  return (
    <fieldset class="labels">
      <legend>Only slides with these labels</legend>
      {rows.map(([name, value = ""], i) => (
        <div class="line" key={i}>
          <input
            type="text"
            aria-label={`Name of label ${i + 1}`}
            placeholder="name"
            value={name}
            onInput={(event) => set(i, event.currentTarget.value.replace(/=/g, ""), value)}
          />
          <span aria-hidden="true">=</span>
          <input
            type="text"
            aria-label={`Value of label ${i + 1}`}
            placeholder="value"
            value={value}
            onInput={(event) => set(i, name, event.currentTarget.value)}
          />
          <button type="button" aria-label={`Remove label ${i + 1}`} onClick={() => choose({ labels: labels.filter((_, j) => j !== i) })}>
            ×
          </button>
        </div>
      ))}
      {labels.length < MAX_LABELS && (
        <button type="button" class="small" onClick={() => choose({ labels: [...labels, "="] })}>
          Add a label
        </button>
      )}
    </fieldset>
  );
}

function summary(): string {
  const { of, about, level: what } = found.value!;
  const count = about.results.length;
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
  last.arrival = arrivals.value + 1; // what is found stays, whatever has been typed since
  const sought = { q: query.value, like: like.value, search: searchOptions.value };
  const shown = { layers: layers.value, looks: looksNow(), picture: picture.value, panel: "search" as const };
  go(slideRoute(one.slide_id, { place: placeOf(one, view), ...sought, ...shown }));
}

function outlineOpened(view: SlideView): void {
  const one = opened.value;
  const box = one && one.slide_id === slide.value?.slide_id ? boxOf(one) : null;
  view.outline("found", box ? [box] : [], { label: `Result ${one?.rank ?? ""}`, colour: "#d55e00" });
}

// -- asking ----------------------------------------------------------------------------------------

/** What the page would search for now, as one text. */
function wish(): string {
  const sought = like.value || query.value.trim();
  return sought && JSON.stringify([sought, searchOptions.value]);
}

/** Search for what an address asks for. */
async function searchWish(view: SlideView | null): Promise<void> {
  if (like.value.includes("/")) return search({ region_id: like.value }, "like the region of the link");
  if (like.value) return search({ slide_id: like.value }, `like ${like.value}`);
  return searchText(view);
}

async function searchText(view: SlideView | null): Promise<void> {
  const text = query.value.trim();
  if (!text) return;
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
    const data = await base64(await api.picture(viewPath(slide_id, box, px), { signal }));
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
  const { split, labels } = searchOptions.value;
  const equal = (field: string, value: string): Condition[] =>
    value.trim() ? [{ field, op: "=", value: value.trim() }] : [];
  return [
    ...equal("split", split),
    ...(session.value?.can.patients ? equal("patient_id", patient.value) : []),
    ...labels.filter(isLabel).flatMap((label) => {
      const [name = "", value = ""] = label.split(/=(.*)/s);
      return equal(`label.${name.trim()}`, value);
    }),
  ];
}

async function search(sought: Sought, of: string): Promise<void> {
  await guarded((signal) => ask(sought, of, signal));
}

async function ask(sought: Sought, of: string, signal: AbortSignal): Promise<void> {
  const stored = "slide_id" in sought || "region_id" in sought;
  // A slide is compared with slides, a region with what is chosen.
  const { level, mode, k, without } = searchOptions.value;
  const wanted: Level = "slide_id" in sought ? "slide" : level;
  const body = {
    ...sought,
    level: wanted,
    mode: "text" in sought && wanted === "slide" ? mode : "vector",
    // A region is most like itself, which nobody looks for; of a slide, the service leaves it out.
    k: Math.min(MAX_RESULTS, "region_id" in sought ? k + 1 : k),
    filters: conditions(),
    exclude_same_slide: stored && (without !== "" || wanted === "slide"),
    exclude_same_patient: stored && without === "patient",
  };
  like.value = "slide_id" in sought ? sought.slide_id : "region_id" in sought ? sought.region_id : "";
  last.wish = wish();
  const about = await api.post<SearchResponse>("/v1/search", body, { signal });
  const others = about.results.filter(
    (one) => !("region_id" in sought && one.region_id === sought.region_id),
  );
  const results = others.slice(0, k).map((one, i) => ({ ...one, rank: i + 1 }));
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
  if (choosing.value && document.getElementById("search-options")?.contains(document.activeElement))
    document.getElementById("search-choose")?.focus();
  choosing.value = false;
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
