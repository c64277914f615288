/** The archive: every slide, found by name and label. Only the rows on the screen exist. */

import { useEffect, useRef, useState } from "preact/hooks";
import { api } from "./api.ts";
import type { SlideList, SlideRow } from "./api.ts";
import { Search } from "./panels/Search.tsx";
import { format, isLabel, note, slideRoute } from "./route.ts";
import type { ArchiveRoute } from "./route.ts";
import { round } from "./scalebar.ts";
import { report, session } from "./state.ts";
import { Account, Dialog, Home, Icon, store, stored, Thumbnail, Tool } from "./ui.tsx";

const PAGE = 100; // slides a request
const KEPT = 40; // pages in memory
const AHEAD = 2; // rows above and below the screen
const OPENING = 1500; // ms after which files that were being opened are asked for again

type Layout = "grid" | "list";

interface Filters {
  q: string;
  label: string;
  status: string;
}

export function ArchivePage({ at }: { at: ArchiveRoute }) {
  const [filters, setFilters] = useState<Filters>(at);
  const [layout, setLayout] = useState<Layout>(() => (stored("pathflip.layout") === "list" ? "list" : "grid"));
  const maySearch = session.value?.can.search ?? false;
  const [searching, setSearching] = useState(() => maySearch && matchMedia("(min-width: 64rem)").matches);
  const pages = usePages(filters);
  const hidden = useQuarantined(filters, pages.total);

  // The browser's back and forward.
  useEffect(() => setFilters(at), [at]);
  const change = (some: Partial<Filters>) => {
    const now = { ...filters, ...some };
    setFilters(now);
    note({ page: "archive", ...now });
  };

  return (
    <div class={`archive-page${searching ? " with-panel" : ""}`}>
      <header class="bar">
        <Home />
        <h1>Archive</h1>
        <div class="tools">
          <Account />
          {maySearch && <Tool icon="search" label="Search by words" pressed={searching} onPress={() => setSearching(!searching)} />}
        </div>
      </header>
      <main class="archive">
        <form class="filters-bar" role="search" aria-label="Slides" onSubmit={(event) => event.preventDefault()}>
          <label class="field">
            Name
            <input type="search" value={filters.q} spellcheck={false} placeholder="any part of it" maxLength={200} onInput={(event) => change({ q: event.currentTarget.value })} />
          </label>
          <label class="field">
            Label
            <input type="search" value={filters.label} spellcheck={false} placeholder="name=value" maxLength={200} onInput={(event) => change({ label: event.currentTarget.value })} />
          </label>
          <label class="field">
            Status
            <select value={filters.status} onChange={(event) => change({ status: event.currentTarget.value })}>
              <option value="ready">Ready</option>
              <option value="quarantined">Quarantined</option>
              <option value="empty">Without tissue</option>
              <option value="all">All</option>
            </select>
          </label>
          <p class="count" role="status">
            {filters.label.trim() && !isLabel(filters.label) ? "Write a label as name=value. " : ""}
            {pages.total === null ? "Loading…" : count(pages.total)}
          </p>
          {filters.status === "ready" && hidden > 0 && (
            <button type="button" class="plain hidden-slides" onClick={() => change({ status: "quarantined" })}>
              {hidden.toLocaleString("en-GB")} quarantined
            </button>
          )}
          <Tool
            icon={layout === "grid" ? "list" : "grid"}
            label={layout === "grid" ? "Show as a list" : "Show as pictures"}
            onPress={() => {
              const other = layout === "grid" ? "list" : "grid";
              setLayout(other);
              store("pathflip.layout", other);
            }}
          />
        </form>
        <Rows pages={pages} layout={layout} />
      </main>
      {searching && (
        <aside class="panel" aria-label="Search by words">
          <div class="panel-body">
            <Search view={null} />
          </div>
        </aside>
      )}
    </div>
  );
}

function count(total: number): string {
  return total === 1 ? "1 slide" : `${total.toLocaleString("en-GB")} slides`;
}

/** How many slides that the filters fit are quarantined, once it is known how many are not. */
function useQuarantined({ q, label }: Filters, ready: number | null): number {
  const [number, setNumber] = useState(0);
  const wanted = filtered({ q, label, status: "quarantined" });
  useEffect(() => {
    if (ready === null) return;
    const call = new AbortController();
    const ask = () =>
      api.get<SlideList>(`/v1/slides?limit=1&${wanted}`, { signal: call.signal }).then((found) => setNumber(found.total), () => {});
    const timer = setTimeout(ask, 300); // after the last letter
    return () => {
      clearTimeout(timer);
      call.abort();
    };
  }, [String(wanted), ready]);
  return number;
}

/** The filters as the service takes them. */
function filtered({ q, label, status }: Filters): URLSearchParams {
  const query = new URLSearchParams({ status });
  if (q.trim()) query.set("q", q.trim());
  if (isLabel(label)) query.set("label", label.trim());
  return query;
}

interface Pages {
  total: number | null;
  at: (index: number) => SlideRow | undefined;
  want: (from: number, to: number) => void;
  /** Changes with the filters: the list starts again at its top. */
  key: string;
}

/** Pages of the archive's list, asked for as they come into view. */
function usePages({ q, label, status }: Filters): Pages {
  const key = JSON.stringify([q.trim(), label.trim(), status]);
  const [total, setTotal] = useState<number | null>(null);
  const [, redraw] = useState(0);
  const state = useRef({ key: "", rows: new Map<number, SlideRow[]>(), asked: new Set<number>(), call: new AbortController() });

  const fetchPage = (number: number) => {
    const own = state.current;
    if (own.asked.has(number)) return;
    own.asked.add(number);
    const query = `limit=${PAGE}&offset=${number * PAGE}&${filtered({ q, label, status })}`;
    api.get<SlideList>(`/v1/slides?${query}`, { signal: own.call.signal }).then(
      (found) => {
        own.rows.set(number, found.data);
        // Files without an archive are opened one after the other: some of these are still to come.
        if (found.data.some((row) => row.status === "ready" && row.width === null))
          setTimeout(() => own === state.current && (own.asked.delete(number), fetchPage(number)), OPENING);
        for (const old of own.rows.keys()) {
          if (own.rows.size <= KEPT) break;
          if (Math.abs(old - number) > KEPT / 2) {
            own.rows.delete(old);
            own.asked.delete(old);
          }
        }
        setTotal(found.total);
        redraw((n) => n + 1);
      },
      (error: unknown) => {
        own.asked.delete(number);
        report(error);
      },
    );
  };

  useEffect(() => {
    const timer = setTimeout(
      () => {
        state.current.call.abort();
        state.current = { key, rows: new Map(), asked: new Set(), call: new AbortController() };
        fetchPage(0);
      },
      state.current.key ? 200 : 0,
    );
    return () => clearTimeout(timer);
  }, [key]);
  useEffect(() => () => state.current.call.abort(), []);

  return {
    total,
    key: state.current.key,
    at: (index) => state.current.rows.get(Math.floor(index / PAGE))?.[index % PAGE],
    want: (from, to) => {
      if (state.current.key !== key) return;
      for (let page = Math.floor(from / PAGE); page <= Math.floor(Math.max(from, to - 1) / PAGE); page++) fetchPage(page);
    },
  };
}

/** Which list was shown last, and how far down. */
const left = { key: "", top: 0 };

/** The rows in view, at their places in a list as high as all of them. */
function Rows({ pages, layout }: { pages: Pages; layout: Layout }) {
  const scroller = useRef<HTMLDivElement>(null);
  const [why, setWhy] = useState<SlideRow | null>(null);
  const [view, setView] = useState({ top: 0, width: 0, height: 0 });
  useEffect(() => {
    const element = scroller.current!;
    const update = () => setView({ top: element.scrollTop, width: element.clientWidth, height: element.clientHeight });
    const scrolled = () => {
      left.top = element.scrollTop;
      update();
    };
    update();
    const sizes = new ResizeObserver(update);
    sizes.observe(element);
    element.addEventListener("scroll", scrolled, { passive: true });
    return () => {
      sizes.disconnect();
      element.removeEventListener("scroll", scrolled);
    };
  }, []);
  // Back from a slide, the list is where it was; another list begins at its top.
  const loaded = pages.total !== null;
  useEffect(() => {
    if (!loaded || !pages.key) return;
    scroller.current!.scrollTo(0, left.key === pages.key ? left.top : 0);
    left.key = pages.key;
  }, [pages.key, loaded, layout]);

  const rem = Number.parseFloat(getComputedStyle(document.documentElement).fontSize) || 16;
  const total = pages.total ?? 0;
  const columns = layout === "list" ? 1 : Math.max(view.width > 20 * rem ? 2 : 1, Math.floor(view.width / (12.5 * rem)));
  const high = layout === "list" ? 5 * rem : 13.5 * rem;
  const rows = Math.ceil(total / columns);
  const first = Math.max(0, Math.floor(view.top / high) - AHEAD);
  const last = Math.min(rows, Math.ceil((view.top + view.height) / high) + AHEAD);
  const [from, to] = [first * columns, Math.min(total, last * columns)];
  useEffect(() => {
    if (to <= from) return;
    const timer = setTimeout(() => pages.want(from, to), 80); // a fast scroll passes over most of them
    return () => clearTimeout(timer);
  }, [from, to, pages.key]);

  return (
    <div class="scroller" ref={scroller} tabIndex={0} role="region" aria-label="Slides found">
      {pages.total === 0 && <p class="none">No slide fits. Take back a word, or look under another status.</p>}
      <ul class={`slides ${layout}`} style={{ height: `${rows * high}px` }}>
        {Array.from({ length: Math.max(0, to - from) }, (_, i) => from + i).map((index) => (
          <li
            key={index}
            aria-setsize={total}
            aria-posinset={index + 1}
            style={{
              top: `${Math.floor(index / columns) * high}px`,
              left: `${((index % columns) / columns) * 100}%`,
              width: `${100 / columns}%`,
              height: `${high}px`,
            }}
          >
            <Card row={pages.at(index)} onWhy={setWhy} />
          </li>
        ))}
      </ul>
      {why && <Why row={why} onClose={() => setWhy(null)} />}
    </div>
  );
}

/** Why a slide cannot be opened, in full. */
function Why({ row, onClose }: { row: SlideRow; onClose: () => void }) {
  return (
    <Dialog title={row.slide_id} onClose={onClose}>
      <p>
        {row.status === "empty"
          ? "This slide has no tissue, so it is not searched."
          : "This slide is quarantined: it is neither shown nor searched."}
      </p>
      {(row.reason || row.message) && (
        <p>
          {row.reason && <code class="fault">{row.reason}</code>} {row.message}
        </p>
      )}
      <p class="hint">When the cause is mended, the next ingest takes it up again.</p>
    </Dialog>
  );
}

function Card({ row, onWhy }: { row: SlideRow | undefined; onWhy: (row: SlideRow) => void }) {
  if (!row) return <span class="card waiting" aria-label="Loading" />;
  const ready = !row.status || row.status === "ready";
  const inside = (
    <>
      {row.status === "quarantined" ? (
        <span class="thumb locked">
          <Icon name="lock" />
        </span>
      ) : (
        <Thumbnail id={row.slide_id} shown={ready} />
      )}
      <span class="card-text">
        <strong>{row.slide_id}</strong>
        {ready ? <Facts row={row} /> : <Reason row={row} />}
      </span>
    </>
  );
  if (!ready)
    return (
      <button type="button" class="card" onClick={() => onWhy(row)}>
        {inside}
      </button>
    );
  return (
    <a class="card" href={format(slideRoute(row.slide_id))}>
      {inside}
    </a>
  );
}

function Reason({ row }: { row: SlideRow }) {
  return (
    <span class="sub reason">
      {row.reason && <code>{row.reason}</code>} {row.message}
    </span>
  );
}

/** What is known of a slide, in a line: what does not fit is left out. */
function Facts({ row }: { row: SlideRow }) {
  const facts = [
    row.mpp ? `${round(row.mpp, 3)} µm/px` : "",
    row.tissue_mm2 === null ? "" : `${round(row.tissue_mm2, 3)} mm²`,
    row.split ?? "",
  ];
  return (
    <span class="sub facts-line">
      {facts.filter(Boolean).map((fact) => (
        <span key={fact}>{fact}</span>
      ))}
    </span>
  );
}
