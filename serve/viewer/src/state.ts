/** What the parts of the page share, as signals. */

import { signal } from "@preact/signals";
import { api, onSignedOut, Problem } from "./api.ts";
import type { Box, Outlines, Session, SlideRow, TileInfo } from "./api.ts";
import { PLAIN, USUAL_SEARCH } from "./route.ts";
import type { Adjustment, PanelName, SearchOptions } from "./route.ts";

/** Who is signed in; null: nobody; undefined: not asked yet. */
export const session = signal<Session | null | undefined>(undefined);

/** The slide that is open: its pyramid and its row in the archive. */
export const slide = signal<(TileInfo & { row: SlideRow }) | null>(null);

/** What is in view, in level-0 px: of a turned view, the box around it. */
export const view = signal<Box | null>(null);

/** The panel that is open; null: none. */
export const panel = signal<PanelName | null>("slide");

/** What is searched for, as in the address. */
export const query = signal("");

/** Id of the region or slide whose like is searched for, as in the address; empty: none. */
export const like = signal("");

/** How often an address was opened: what it asks for is searched, unlike what is typed. */
export const arrivals = signal(0);

/** How is searched, as in the address. */
export const searchOptions = signal<SearchOptions>(USUAL_SEARCH);

/** How the picture of the open slide is shown, as in the address. */
export const picture = signal<Adjustment>(PLAIN);

/** Sentences whose heat is shown, as in the address. Another panel adds one to have it shown. */
export const layers = signal<string[]>([]);

/** How each of them is drawn, as in the address: see layers.ts. */
export const looks = signal<Record<string, string>>({});

/** Outlines of the open slide, asked for when first shown. */
export const outlines = signal<Outlines | null>(null);

export interface Notice {
  text: string;
  kind: "error" | "info";
}

/** A sentence for the reader, shown until the next one. */
export const notice = signal<Notice | null>(null);

/** Show an error as a sentence; a request that was called off is none. */
export function report(error: unknown): void {
  if (error instanceof DOMException && error.name === "AbortError") return;
  if (error instanceof Problem) {
    if (error.status !== 401) notice.value = { text: error.message, kind: "error" };
    return;
  }
  console.error(error);
  notice.value = { text: "The page failed at this. Load it again, please.", kind: "error" };
}

/** Show a sentence that is no error. */
export function tell(text: string): void {
  notice.value = { text, kind: "info" };
}

/** Who was signed in before. */
let before: string | null = null;

/** Ask who is signed in. Somebody else finds a page that has forgotten everything. */
export async function loadSession(): Promise<void> {
  try {
    const now = await api.get<Session>("/v1/session", { quiet: true });
    if (before !== null && before !== now.name) return location.reload();
    before = now.name;
    session.value = now;
  } catch (error) {
    session.value = null;
    if (!(error instanceof Problem && error.status === 401)) report(error);
  }
}

onSignedOut(() => {
  if (session.value) tell("Your session has ended. Please sign in again.");
  session.value = null;
});
