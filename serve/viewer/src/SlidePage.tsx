/** A slide: the picture first, one toolbar above it, one panel beside it. */

import { effect, untracked, useSignal } from "@preact/signals";
import type { FunctionComponent, RefObject } from "preact";
import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import { api, Problem, slidePath } from "./api.ts";
import type { SlideRow, TileInfo } from "./api.ts";
import { HelpDialog, useKeys } from "./keys.tsx";
import { heatLayers, looksNow } from "./layers.ts";
import { Ruler } from "./measure.ts";
import { Annotations } from "./panels/Annotations.tsx";
import { Ask } from "./panels/Ask.tsx";
import { Search } from "./panels/Search.tsx";
import { Where } from "./panels/Where.tsx";
import { PickSlide } from "./PickSlide.tsx";
import { go, note, remember } from "./route.ts";
import type { PanelName, SlideRoute } from "./route.ts";
import { ScaleStrip, useScale } from "./Overlay.tsx";
import { powerLabel, round } from "./scalebar.ts";
import { PictureFilter, SlideFacts } from "./SlideFacts.tsx";
import { explainLosses, SlideView } from "./slide.ts";
import {
  arrivals, layers, like, looks, outlines, panel, picture, query, report, searchOptions, session, slide, tell,
  view as inView,
} from "./state.ts";
import { Account, fullScreen, Home, Tool } from "./ui.tsx";

const POWERS = [1.25, 2.5, 5, 10, 20, 40];
const PERCENTS = [12.5, 25, 50, 100, 200];
const NARROW = "(max-width: 45rem)";

export function SlidePage({ at }: { at: SlideRoute }) {
  const stage = useRef<HTMLDivElement>(null);
  const minimap = useRef<HTMLDivElement>(null);
  const [view, setView] = useState<SlideView | null>(null);
  const [ruler, setRuler] = useState<Ruler | null>(null);
  const [failure, setFailure] = useState("");
  const [help, setHelp] = useState(false);
  const [pick, setPick] = useState(false);
  const shown = useRef(at);

  // One viewer for as long as this slide is shown; another slide is another SlidePage.
  useEffect(() => {
    const calls = new AbortController();
    let made: SlideView | null = null;
    const stop = () => {
      made?.destroy();
      made = null;
    };
    const fail = (error: unknown) => {
      if (calls.signal.aborted) return;
      if (error instanceof Problem) setFailure(error.message);
      else report(error);
    };
    const begin = async () => {
      const asked = api.get<TileInfo>(slidePath(at.id, "tiles"), { signal: calls.signal });
      asked.catch(() => {}); // where both fail, the slide's own reason is the one to read
      const row = await api.get<SlideRow>(slidePath(at.id), { signal: calls.signal });
      const info = await asked;
      const view = (made = new SlideView(stage.current!, info, minimap.current));
      explainLosses(view, (problem) => {
        if (calls.signal.aborted) return;
        if (problem.code !== "source_changed") return report(problem);
        // Another file under the same name: its places would not be true.
        setView(null);
        stop();
        fail(problem);
      });
      await view.open(shown.current.place); // "back" may have been faster
      if (calls.signal.aborted) return;
      slide.value = { ...info, row };
      inView.value = view.box();
      setRuler(new Ruler(view, tell));
      setView(view);
    };
    takeOver(at);
    begin().catch(fail);
    return () => {
      calls.abort();
      stop();
      slide.value = inView.value = outlines.value = null;
    };
  }, []);

  // The browser's back and forward, and typed addresses.
  useEffect(() => {
    if (shown.current === at) return;
    shown.current = at;
    takeOver(at);
    view?.moveTo(at.place ?? view.whole());
  }, [at, view]);

  useEffect(() => (view ? keepAddress(view, at.id) : undefined), [view]);

  const turn = useCallback(() => view?.turnTo(view.place().rot + 90), [view]);
  useKeys({ view: () => view, ruler, onHelp: () => setHelp(true), onTurn: turn });

  const row = slide.value?.row;
  const state = view ? "open" : failure ? "failed" : "loading";
  return (
    <div class={`slide-page${panel.value && state !== "failed" ? " with-panel" : ""}`}>
      <header class="bar">
        <Home />
        <h1 title={at.id}>{at.id}</h1>
        <Toolbar
          view={view}
          ruler={ruler}
          onTurn={turn}
          onCompare={() => setPick(true)}
          onHelp={() => setHelp(true)}
        />
      </header>
      <main class="stage" aria-label="Slide">
        <div class="slide" ref={stage} data-state={state} />
        {state === "loading" && <p class="stage-word">Opening the slide…</p>}
        {state === "failed" && (
          <p class="stage-word" role="alert">
            This slide cannot be shown. {failure} <a href="#/">All slides</a>
          </p>
        )}
        <Minimap element={minimap} />
        <ScaleStrip view={view} />
        <PictureFilter view={view} />
        {ruler?.kind.value && <Measuring ruler={ruler} view={view!} />}
      </main>
      {state !== "failed" && <SidePanel view={view} ruler={ruler} row={row} />}
      {help && <HelpDialog onClose={() => setHelp(false)} />}
      {pick && (
        <PickSlide
          title="Compare with"
          except={at.id}
          onClose={() => setPick(false)}
          onPick={(right) =>
            go({ page: "compare", left: at.id, right, sync: true, places: [view?.place() ?? null, null] })
          }
        />
      )}
    </div>
  );
}

/** The minimap's element: hidden while all of the slide is in view, when it would only cover some of it. */
function Minimap({ element }: { element: RefObject<HTMLDivElement | null> }) {
  const { x0 = 0, y0 = 0, w0 = 0, h0 = 0 } = inView.value ?? {};
  const { width = 0, height = 0 } = slide.value ?? {};
  const whole = x0 <= 0 && y0 <= 0 && x0 + w0 >= width && y0 + h0 >= height;
  return <div class={`minimap${whole ? " waiting" : ""}`} id="minimap" ref={element} />;
}

/** Make what the address says the state of the page. */
function takeOver(at: SlideRoute): void {
  query.value = at.q;
  like.value = at.like;
  searchOptions.value = at.search;
  looks.value = Object.fromEntries(at.layers.map((key, i) => [key, at.looks[i] ?? ""]));
  layers.value = at.layers;
  picture.value = at.picture;
  arrivals.value++;
  const closed = at.panel === "slide" && matchMedia(NARROW).matches;
  panel.value = at.panel && !closed && mayUse(at.panel) ? at.panel : at.panel && !closed ? "slide" : null;
}

/** Keep the address true to the view and to what is shown; returns how to stop. */
function keepAddress(view: SlideView, id: string): () => void {
  let timer = 0;
  const now = (): SlideRoute => ({
    page: "slide",
    id,
    place: view.place(),
    q: query.peek(),
    like: like.peek(),
    search: searchOptions.peek(),
    layers: layers.peek(),
    looks: untracked(looksNow),
    picture: picture.peek(),
    panel: panel.peek(),
  });
  const soon = () => {
    clearTimeout(timer);
    timer = window.setTimeout(() => note(now()), 200);
  };
  let frame = 0;
  const stops = [
    view.onMove(() => {
      soon();
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        inView.value = view.box();
      });
    }),
    view.onFly(() => {
      note(now());
      remember();
    }),
    effect(() => {
      for (const part of [query, like, searchOptions, layers, heatLayers, picture, panel]) void part.value;
      soon();
    }),
  ];
  return () => {
    clearTimeout(timer);
    cancelAnimationFrame(frame);
    for (const stop of stops) stop();
  };
}

// -- toolbar ---------------------------------------------------------------------------------------------

interface ToolbarProps {
  view: SlideView | null;
  ruler: Ruler | null;
  onTurn: () => void;
  onCompare: () => void;
  onHelp: () => void;
}

function Toolbar({ view, ruler, onTurn, onCompare, onHelp }: ToolbarProps) {
  const off = !view;
  const toggle = (kind: "length" | "area") => {
    ruler?.start(ruler.kind.peek() === kind ? null : kind);
    if (ruler?.kind.peek()) view?.element.focus(); // where Space and Enter set points
  };
  return (
    <div class="tools" role="group" aria-label="Tools">
      <span class="tool-group">
        <Tool icon="minus" label="Zoom out" hotkey="-" disabled={off} onPress={() => view?.zoomBy(0.5)} />
        <Magnification view={view} />
        <Tool icon="plus" label="Zoom in" hotkey="+" disabled={off} onPress={() => view?.zoomBy(2)} />
        <Tool icon="fit" label="Whole slide" hotkey="0" disabled={off} onPress={() => view?.moveTo(view.whole(view.place().rot), false)} />
        <Tool icon="rotate" label="Rotate by 90 degrees" hotkey="r" disabled={off} onPress={onTurn} />
      </span>
      <span class="tool-group">
        <Tool icon="length" label="Measure a length" hotkey="m" pressed={ruler?.kind.value === "length"} disabled={off} onPress={() => toggle("length")} />
        <Tool icon="area" label="Measure an area" hotkey="a" pressed={ruler?.kind.value === "area"} disabled={off} onPress={() => toggle("area")} />
        <Tool icon="compare" label="Compare with another slide" disabled={off} onPress={onCompare} />
        <Tool icon="link" label="Copy the link to this view" disabled={off} onPress={() => void copyLink()} />
        <Tool icon="full" label="Full screen" hotkey="f" onPress={fullScreen} />
      </span>
      <span class="tool-group">
        <Tool icon="help" label="Help and keys" hotkey="?" onPress={onHelp} />
        <Account />
        <Tool icon="panel" label="Side panel" pressed={panel.value !== null} onPress={() => (panel.value = panel.value ? null : "slide")} />
      </span>
    </div>
  );
}

/** Go to a magnification; shows the one there is. A slide without a scale has pixels alone, in per cent. */
function Magnification({ view }: { view: SlideView | null }) {
  const px0 = useScale(view);
  const mpp = view?.info.mpp ?? null;
  const now = px0 === null ? "–" : mpp === null ? `${round(100 / px0, 3)} %` : powerLabel(mpp * px0);
  const choose = (event: { currentTarget: HTMLSelectElement }) => {
    const power = Number(event.currentTarget.value);
    event.currentTarget.value = "";
    if (!view || !power) return;
    const px = mpp === null ? 100 / power : 10 / power / mpp;
    view.moveTo({ ...view.place(), w: view.element.clientWidth * px }, false);
  };
  return (
    <select class="magnification" aria-label="Magnification" disabled={!view} value="" onChange={choose}>
      <option value="">{now}</option>
      {(view && mpp === null ? PERCENTS : POWERS).map((power) => (
        <option key={power} value={power}>
          {power}
          {mpp === null ? " %" : "×"}
        </option>
      ))}
    </select>
  );
}

async function copyLink(): Promise<void> {
  try {
    await navigator.clipboard.writeText(location.href);
    tell("The link to this view is copied.");
  } catch {
    tell("This browser does not let the page copy: take the link from the address bar.");
  }
}

/** What to do while measuring, and what has been measured so far. */
function Measuring({ ruler, view }: { ruler: Ruler; view: SlideView }) {
  const tick = useSignal(0);
  useEffect(() => view.onPointer(() => tick.value++), [view]);
  void tick.value;
  const area = ruler.kind.value === "area";
  const enough = ruler.points.value.length >= (area ? 3 : 2);
  return (
    <div class="measuring" role="region" aria-label="Measuring">
      <p>
        {area ? "Click around the area." : "Click along the line."} Double-click or Enter ends it; Space sets a point at the
        cross.
      </p>
      <p class="measured">{ruler.points.value.length > 0 && ruler.label()}</p>
      <span class="row">
        <button type="button" disabled={!enough} onClick={() => ruler.finish()}>
          Finish
        </button>
        <button type="button" disabled={!ruler.points.value.length} onClick={() => ruler.undo()}>
          Take back
        </button>
        <button type="button" onClick={() => ruler.start(null)}>
          Stop
        </button>
      </span>
    </div>
  );
}

// -- side panel ------------------------------------------------------------------------------------------

const TABS: Record<PanelName, string> = { slide: "Slide", search: "Search", where: "Where", ask: "Ask", draw: "Draw" };

const PARTS: Record<Exclude<PanelName, "slide">, FunctionComponent<{ view: SlideView | null }>> = {
  search: Search,
  where: Where,
  ask: Ask,
  draw: Annotations,
};

/** Whether this client may use a panel: what it may not do is not shown. */
function mayUse(name: PanelName): boolean {
  const { can, scopes = [] } = session.value ?? {};
  if (name === "search") return can?.search ?? false;
  if (name === "where") return can?.ground ?? false;
  if (name === "ask") return Boolean(can?.chat);
  // A client with the scope who still may not draw is on a service without annotations.
  if (name === "draw") return can?.annotate || (!scopes.includes("annotate") && scopes.includes("read"));
  return true;
}

interface SidePanelProps {
  view: SlideView | null;
  ruler: Ruler | null;
  row: SlideRow | undefined;
}

/** The tabs. A panel is made when first opened and then kept, hidden, with what is in it. */
function SidePanel({ view, ruler, row }: SidePanelProps) {
  const opened = useRef(new Set<PanelName>());
  const now = panel.value;
  const names = (Object.keys(TABS) as PanelName[]).filter(mayUse);
  if (now) opened.current.add(now);
  // Layers named in the address are shown whichever panel is open.
  if (layers.value.length && mayUse("where")) opened.current.add("where");

  const step = (event: KeyboardEvent) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by || !now) return;
    event.preventDefault();
    const next = names[(names.indexOf(now) + by + names.length) % names.length]!;
    panel.value = next;
    document.getElementById(`tab-${next}`)?.focus();
  };

  return (
    <aside class="panel" aria-label="Side panel" hidden={!now}>
      <div class="tabs" role="tablist" aria-label="Panels" onKeyDown={step}>
        {names.map((name) => (
          <button
            key={name}
            type="button"
            role="tab"
            id={`tab-${name}`}
            aria-selected={now === name}
            aria-controls={`panel-${name}`}
            tabIndex={now === name ? 0 : -1}
            onClick={() => (panel.value = name)}
          >
            {TABS[name]}
          </button>
        ))}
      </div>
      {names.map((name) => {
        const Part = name === "slide" ? null : PARTS[name];
        return (
          <section key={name} id={`panel-${name}`} class="panel-body" role="tabpanel" aria-labelledby={`tab-${name}`} hidden={now !== name}>
            {opened.current.has(name) && (Part ? <Part view={view} /> : <SlideFacts view={view} ruler={ruler} row={row} />)}
          </section>
        );
      })}
    </aside>
  );
}

