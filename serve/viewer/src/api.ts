/** Requests to the service: JSON, its errors as sentences, and the stream of an answer. */

export interface Session {
  name: string;
  scopes: string[];
  expires: string | null;
  /** Whether the service asks for tokens at all. */
  tokens: boolean;
  can: { search: boolean; ground: boolean; chat: string | null; annotate: boolean; patients: boolean };
}

export type Status = "ready" | "quarantined" | "empty";

export interface SlideRow {
  slide_id: string;
  /** Level-0 px. */
  width: number | null;
  height: number | null;
  /** µm per level-0 px. */
  mpp: number | null;
  vendor: string | null;
  split: string | null;
  n_regions: number | null;
  n_patches: number | null;
  tissue_mm2: number | null;
  patient_id?: string | null;
  status?: Status;
  reason?: string | null;
  message?: string | null;
}

export interface SlideList {
  data: SlideRow[];
  next: string | null;
  total: number;
}

/** The tile pyramid of a slide, by DZI's numbering: `max_level` is full resolution. */
export interface TileInfo {
  slide_id: string;
  width: number;
  height: number;
  /** µm per level-0 px; null where nothing says it. */
  mpp: number | null;
  /** 10 / mpp. */
  power: number | null;
  tile_w: number;
  tile_h: number;
  min_level: number;
  max_level: number;
  levels: { level: number; width: number; height: number; scale0: number }[];
  format: "jpg";
  version: string;
}

/** A place in level-0 px. */
export type Point = [number, number];

export type Ring = Point[];

export interface Outlines {
  tissue: { type: "MultiPolygon"; coordinates: Ring[][] } | null;
  regions: { region_id: string; x0: number; y0: number; size0: number }[];
}

/** A rectangle in level-0 px. */
export interface Box {
  x0: number;
  y0: number;
  w0: number;
  h0: number;
}

export interface Found {
  rank: number;
  score: number;
  slide_id: string;
  region_id: string | null;
  x0: number | null;
  y0: number | null;
  size0: number | null;
  mpp: number | null;
}

export interface SearchResponse {
  model: string;
  exhaustive: boolean | null;
  results: Found[];
}

export interface HotBox extends Box {
  x_um: number;
  y_um: number;
  w_um: number;
  h_um: number;
  score: number;
  patches: number;
}

/** The part of a chunk of a streamed answer that this page reads. */
export interface ChatChunk {
  choices: { delta: { content?: string }; finish_reason: string | null }[];
  usage?: { prompt_tokens: number; completion_tokens: number; total_tokens: number };
}

/** An error of the service, or of the way to it, as a sentence for the reader. */
export class Problem extends Error {
  readonly code: string;
  readonly status: number;

  constructor(message: string, code: string, status: number) {
    super(message);
    this.name = "Problem";
    this.code = code;
    this.status = status;
  }
}

let signedOut: () => void = () => {};

/** Call `then` whenever the service answers that nobody is signed in. */
export function onSignedOut(then: () => void): void {
  signedOut = then;
}

interface Options {
  signal?: AbortSignal;
  headers?: Record<string, string>;
  /** Whether a 401 is this caller's own business. */
  quiet?: boolean;
}

async function send(method: string, path: string, body: unknown, options: Options): Promise<Response> {
  const headers: Record<string, string> = { Accept: "application/json", ...options.headers };
  // The service takes unsafe methods from its own page alone, and knows it by this type too.
  if (method !== "GET") headers["Content-Type"] = "application/json";
  const init: RequestInit = { method, headers, credentials: "same-origin", cache: "no-cache" };
  if (body !== undefined) init.body = JSON.stringify(body);
  if (options.signal) init.signal = options.signal;
  let answer: Response;
  try {
    answer = await fetch(path, init);
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new Problem("The service does not answer. Check that it runs, then try again.", "unreachable", 0);
  }
  if (answer.ok) return answer;
  const problem = await problemOf(answer);
  if (problem.status === 401 && !options.quiet) signedOut();
  throw problem;
}

async function problemOf(answer: Response): Promise<Problem> {
  let said: { message?: unknown; code?: unknown } = {};
  try {
    said = (await answer.json()) as typeof said;
  } catch {
    // Not ours: a proxy's page, or nothing at all.
  }
  const message = typeof said.message === "string" ? said.message : `The service answered ${answer.status}.`;
  return new Problem(message, typeof said.code === "string" ? said.code : "http", answer.status);
}

async function json<T>(method: string, path: string, body: unknown, options: Options = {}): Promise<T> {
  const answer = await send(method, path, body, options);
  return (answer.status === 204 ? undefined : await answer.json()) as T;
}

/** Ask the service. Every call throws {@link Problem}, or an AbortError where `signal` fired. */
export const api = {
  get: <T>(path: string, options?: Options) => json<T>("GET", path, undefined, options),
  post: <T>(path: string, body: unknown, options?: Options) => json<T>("POST", path, body, options),
  put: <T>(path: string, body: unknown, options?: Options) => json<T>("PUT", path, body, options),
  del: <T = void>(path: string, options?: Options) => json<T>("DELETE", path, undefined, options),

  async picture(path: string, options: Options = {}): Promise<Blob> {
    return (await send("GET", path, undefined, options)).blob();
  },

  /** Why a picture did not come, asked for once more; null where it comes now. */
  async whyNot(path: string): Promise<Problem | null> {
    try {
      await send("GET", path, undefined, {});
      return null;
    } catch (error) {
      if (error instanceof Problem) return error;
      throw error;
    }
  },

  /** The chunks of a streamed answer as they arrive; an error inside the stream is thrown. */
  async *stream(path: string, body: unknown, options: Options = {}): AsyncGenerator<ChatChunk> {
    const answer = await send("POST", path, body, {
      ...options,
      headers: { ...options.headers, Accept: "text/event-stream" },
    });
    if (!answer.body) return;
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    try {
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        const events = (rest + value).split("\n\n");
        rest = events.pop() ?? "";
        for (const event of events) {
          const data = event.startsWith("data: ") ? event.slice(6) : "";
          if (data === "[DONE]") return;
          if (!data) continue;
          const chunk = JSON.parse(data) as ChatChunk & { error?: { message: string; code: string } };
          if (chunk.error) throw new Problem(chunk.error.message, chunk.error.code, 200);
          yield chunk;
        }
      }
    } finally {
      await reader.cancel().catch(() => {});
    }
  },
};

/** Address of something below a slide; `parts` are encoded. */
export function slidePath(slideId: string, ...parts: string[]): string {
  return ["/v1/slides", encodeURIComponent(slideId), ...parts.map(encodeURIComponent)].join("/");
}

/** Address of a picture of a square or rectangle of a slide; the service makes it at most 1024 px wide. */
export function viewPath(slideId: string, box: Box, px: number): string {
  const whole = (value: number) => String(Math.round(value));
  const query = new URLSearchParams({
    x0: whole(box.x0),
    y0: whole(box.y0),
    w0: whole(Math.max(1, box.w0)),
    h0: whole(Math.max(1, box.h0)),
    px: whole(Math.min(1024, px)),
  });
  return `${slidePath(slideId, "view")}?${query}`;
}
