/** Ask: a conversation about this slide or the square in view; its sentences can be looked for. */

import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { api, Problem } from "../api.ts";
import { toClaims } from "../claims.ts";
import { MAX_LAYERS, removeLayer, showWhere } from "../layers.ts";
import type { SlideView } from "../slide.ts";
import { layers, session, slide } from "../state.ts";
import { Refused } from "./parts.tsx";

interface Square {
  x0: number;
  y0: number;
  size0: number;
}

interface Options {
  choice: string | null;
  scores: Record<string, number>;
  abstain: number | null;
}

interface Turn {
  question: string;
  square: Square | null;
  answer: string;
  /** Scores of the options, where the question had any. */
  options: Options | null;
  state: "running" | "done" | "stopped" | "failed";
  /** Why it failed, or that the answer was cut off. */
  told: string | null;
}

/** Turns of a conversation that are sent with the next question: the service takes 64 messages. */
const REMEMBERED = 31;
const MAX_CHARACTERS = 20_000;
/** What models are tuned to answer with a caption (pathflip/models/chat_template.py). */
const DESCRIBE = "Describe the input pathology whole slide image.";
const MAX_OPTIONS = 8;

/** Letters by which the service names the options of a question. */
const LETTERS = "ABCDEFGH";

/** Conversations by slide, for as long as the page is open. */
const talks = signal<Record<string, Turn[]>>({});
const question = signal("");
const inView = signal(false);
const choosing = signal(false);
const choices = signal("");
const mayAbstain = signal(true);
const running = signal<{ of: string; stop: AbortController } | null>(null);

export function Ask({ view }: { view: SlideView | null }) {
  const model = session.value?.can.chat;
  if (!model)
    return (
      <Refused
        scope="chat"
        doing="asking questions"
        lacks="This service has no language model: it was started without a tuned run."
      />
    );
  const id = slide.value?.slide_id;
  const turns = (id && talks.value[id]) || [];
  const busy = running.value !== null;
  return (
    <div class="panel-part">
      <Talk turns={turns} view={view} />
      {turns.length > 0 && !busy && (
        <button
          type="button"
          onClick={() => {
            talks.value = { ...talks.value, [id!]: [] };
            view?.outline("ask", []);
          }}
        >
          New conversation
        </button>
      )}
      <Form view={view} busy={busy} />
      <p class="hint">
        Answers by <code>{model}</code>. A model can be wrong.
        {session.value?.can.ground &&
          " Click a sentence of an answer to see where the slide model finds it; that shows a place, and proves nothing."}
      </p>
    </div>
  );
}

function Talk({ turns, view }: { turns: Turn[]; view: SlideView | null }) {
  const end = useRef<HTMLDivElement>(null);
  const last = turns.at(-1);
  useEffect(() => {
    end.current?.scrollIntoView({ block: "nearest" });
  }, [turns.length, last?.state, last?.answer.length]);
  // While an answer is written it is busy, so that it is read out once, when it is whole.
  return (
    <div role="log" aria-label="Conversation" aria-busy={last?.state === "running"} class="talk" tabIndex={0}>
      {turns.map((turn, i) => (
        <Exchange key={i} turn={turn} view={view} />
      ))}
      <div ref={end} />
    </div>
  );
}

function Exchange({ turn, view }: { turn: Turn; view: SlideView | null }) {
  const { square, state, options } = turn;
  return (
    <>
      <div class="question">
        <span class="hidden">You asked: </span>
        {turn.question}
        {square && (
          <button
            type="button"
            class="small"
            onClick={() => {
              showSquare(view, square);
              view?.fly(square.x0, square.y0, square.size0, square.size0);
            }}
          >
            about this square
          </button>
        )}
      </div>
      <div class="answer">
        <span class="hidden">Answer: </span>
        {options ? <Scores options={options} /> : <Answer turn={turn} />}
        {state === "running" && <span class="writing" aria-hidden="true" />}
        {state === "stopped" && <p class="hint">Stopped.</p>}
        {turn.told && <p class={state === "failed" ? "panel-error" : "hint"}>{turn.told}</p>}
      </div>
    </>
  );
}

function Answer({ turn }: { turn: Turn }) {
  if (turn.state === "running" || !session.value?.can.ground)
    return <span class="said">{turn.answer}</span>;
  return (
    <span class="said">
      {toClaims(turn.answer).map(({ shown, text }, i) =>
        text ? <Claim key={i} shown={shown} text={text} /> : <span key={i}>{shown}</span>,
      )}
    </span>
  );
}

function Claim({ shown, text }: { shown: string; text: string }) {
  const isShown = layers.value.includes(text);
  const full = !isShown && layers.value.length >= MAX_LAYERS;
  return (
    <button
      type="button"
      class="claim"
      aria-pressed={isShown}
      disabled={full}
      title={full ? "Remove a layer in Where first" : isShown ? "Hide its heat" : "Show where"}
      onClick={() => (isShown ? removeLayer(text) : showWhere(text))}
    >
      {shown}
    </button>
  );
}

function Scores({ options }: { options: Options }) {
  const { choice, scores, abstain } = options;
  const percent = (value: number) => `${Math.round(100 * value)} %`;
  return (
    <>
      <p class="choice">{choice ?? "This cannot be told from this slide."}</p>
      <table class="scores">
        <caption class="hidden">Probability of each option</caption>
        <tbody>
          {Object.entries(scores).map(([option, score]) => (
            <tr key={option} class={option === choice ? "chosen" : undefined}>
              <th scope="row">{option}</th>
              <td>
                <meter min={0} max={1} value={score} aria-label={option} />
              </td>
              <td>{percent(score)}</td>
            </tr>
          ))}
          {abstain !== null && (
            <tr class={choice === null ? "chosen" : undefined}>
              <th scope="row">cannot be told</th>
              <td>
                <meter min={0} max={1} value={abstain} aria-label="cannot be told" />
              </td>
              <td>{percent(abstain)}</td>
            </tr>
          )}
        </tbody>
      </table>
    </>
  );
}

// -- asking ----------------------------------------------------------------------------------------

function Form({ view, busy }: { view: SlideView | null; busy: boolean }) {
  const options = optionsOf(choices.value);
  const unfit = choosing.value ? unfitness(options) : null;
  const ready = slide.value !== null && question.value.trim() !== "" && !unfit;
  const send = () => {
    if (!ready || busy) return;
    void ask(view, question.value.trim(), choosing.value ? optionsOf(choices.value) : null);
    question.value = "";
  };
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
    >
      <fieldset class="row">
        <legend>About</legend>
        <label class="check">
          <input type="radio" name="ask-about" checked={!inView.value} onChange={() => (inView.value = false)} />
          the whole slide
        </label>
        <label class="check">
          <input type="radio" name="ask-about" checked={inView.value} onChange={() => (inView.value = true)} />
          the square in view
        </label>
      </fieldset>
      <label for="ask-text">Question</label>
      <textarea
        id="ask-text"
        rows={2}
        maxLength={MAX_CHARACTERS}
        placeholder="Which tissue is shown?"
        value={question.value}
        onInput={(event) => (question.value = event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
          event.preventDefault();
          send();
        }}
      />
      <label class="check">
        <input
          type="checkbox"
          checked={choosing.value}
          onChange={(event) => (choosing.value = event.currentTarget.checked)}
        />
        choose among options
      </label>
      {choosing.value && (
        <>
          <label for="ask-options">Options, one a line</label>
          <textarea
            id="ask-options"
            rows={4}
            placeholder={"colon\nbreast\nlung"}
            value={choices.value}
            aria-describedby="ask-unfit"
            onInput={(event) => (choices.value = event.currentTarget.value)}
          />
          <p class="hint" id="ask-unfit">
            {unfit ?? "The conversation before is not part of such a question."}
          </p>
          <label class="check">
            <input
              type="checkbox"
              checked={mayAbstain.value}
              onChange={(event) => (mayAbstain.value = event.currentTarget.checked)}
            />
            it may say that this cannot be told
          </label>
        </>
      )}
      <div class="row">
        {busy ? (
          <button type="button" onClick={() => running.value?.stop.abort()}>
            Stop
          </button>
        ) : (
          <>
            <button type="submit" class="primary" disabled={!ready}>
              Ask
            </button>
            <button type="button" disabled={slide.value === null} onClick={() => void ask(view, DESCRIBE, null)}>
              Describe it
            </button>
          </>
        )}
      </div>
    </form>
  );
}

function optionsOf(text: string): string[] {
  return text.split("\n").map((line) => line.trim()).filter(Boolean); // prettier-ignore
}

function unfitness(options: readonly string[]): string | null {
  if (options.length < 2) return "Give at least two options.";
  if (options.length > MAX_OPTIONS) return `Give at most ${MAX_OPTIONS} options.`;
  if (new Set(options).size < options.length) return "Two options are equal.";
  return null;
}

/** The largest square in the middle of the view, as far as it is on the slide. */
function squareOf(view: SlideView): Square {
  const { x0, y0, w0, h0 } = view.box();
  const size0 = Math.max(1, Math.floor(Math.min(w0, h0)));
  return {
    x0: Math.max(0, Math.round(x0 + (w0 - size0) / 2)),
    y0: Math.max(0, Math.round(y0 + (h0 - size0) / 2)),
    size0,
  };
}

function showSquare(view: SlideView | null, square: Square | null): void {
  const boxes = square ? [{ ...square, w0: square.size0, h0: square.size0 }] : [];
  view?.outline("ask", boxes, { label: "Asked about", dashed: true });
}

async function ask(view: SlideView | null, words: string, options: string[] | null): Promise<void> {
  const of = slide.value!.slide_id;
  const square = inView.value && view ? squareOf(view) : null;
  const before = talks.value[of] ?? [];
  const turn: Turn = {
    question: words, square, answer: "", options: null, state: "running", told: null,
  }; // prettier-ignore
  let now = turn;
  const tell = (more: Partial<Turn>) => {
    now = { ...now, ...more };
    talks.value = { ...talks.value, [of]: [...before, now] };
  };
  tell({});
  showSquare(view, square);
  const stop = new AbortController();
  running.value = { of, stop };
  const alone = options !== null || words === DESCRIBE; // as models are tuned
  const history = alone ? [] : before.filter((one) => one.answer && !one.options).slice(-REMEMBERED);
  const body = {
    model: session.value!.can.chat,
    slide_id: of,
    ...(square && { region: square }),
    messages: [
      ...history.flatMap((one) => [
        { role: "user", content: one.question },
        { role: "assistant", content: one.answer.slice(0, MAX_CHARACTERS) },
      ]),
      { role: "user", content: turn.question },
    ],
  };
  try {
    if (options) await choose(body, options, stop.signal, tell);
    else await write(body, stop.signal, tell);
  } catch (error) {
    if (stop.signal.aborted) tell({ state: "stopped" });
    else {
      const told = error instanceof Problem ? error.message : "The answer broke off. Please ask again.";
      tell({ state: "failed", told });
      question.value ||= turn.question; // to ask again
      if (!(error instanceof Problem)) console.error(error);
    }
  } finally {
    running.value = null;
  }
}

type Tell = (more: Partial<Turn>) => void;

async function write(body: object, signal: AbortSignal, tell: Tell): Promise<void> {
  let [answer, finish]: [string, string | null] = ["", null];
  for await (const chunk of api.stream("/v1/chat/completions", { ...body, stream: true }, { signal })) {
    const choice = chunk.choices[0];
    if (!choice) continue;
    finish = choice.finish_reason ?? finish;
    if (!choice.delta.content) continue;
    answer += choice.delta.content;
    tell({ answer });
  }
  if (finish === null) {
    if (signal.aborted) return tell({ state: "stopped" });
    return tell({ state: "failed", told: "The answer broke off: the connection to the service was lost." });
  }
  const cut = finish === "length" ? "The answer was cut off at the longest the service gives." : null;
  tell({ state: "done", told: answer ? cut : "The model gave an empty answer." });
}

async function choose(body: object, options: string[], signal: AbortSignal, tell: Tell): Promise<void> {
  interface Chosen {
    choices: { message: { content: string } }[];
    options: Options | null;
  }
  // Left out, the model may abstain where it has learned to.
  const asked = { ...body, choices: options, ...(!mayAbstain.value && { abstain: false }) };
  const found = await api.post<Chosen>("/v1/chat/completions", asked, { signal });
  const answer = found.choices[0]?.message.content ?? "";
  tell({ state: "done", answer, options: found.options ? inWords(found.options, options) : null });
}

/** Scores by the options' texts in place of their letters. */
function inWords({ choice, scores, abstain }: Options, options: readonly string[]): Options {
  const text = (letter: string) => options[LETTERS.indexOf(letter)] ?? letter;
  const named = Object.entries(scores).map(([letter, score]) => [text(letter), score] as const);
  return { choice: choice === null ? null : text(choice), scores: Object.fromEntries(named), abstain };
}
