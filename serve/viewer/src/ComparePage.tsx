/** Two slides side by side, in step or each by itself. */

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { api, slidePath } from "./api.ts";
import type { TileInfo } from "./api.ts";
import { HelpDialog, useKeys } from "./keys.tsx";
import { ScaleStrip } from "./Overlay.tsx";
import { PickSlide } from "./PickSlide.tsx";
import { format, go, note, slideRoute } from "./route.ts";
import type { CompareRoute, Place } from "./route.ts";
import { explainLosses, SlideView } from "./slide.ts";
import { report } from "./state.ts";
import { follow } from "./step.ts";
import { Account, Home, Tool } from "./ui.tsx";

type Pair<T> = [T, T];

export function ComparePage({ at }: { at: CompareRoute }) {
  const stages: Pair<{ current: HTMLDivElement | null }> = [useRef<HTMLDivElement>(null), useRef<HTMLDivElement>(null)];
  const [views, setViews] = useState<Pair<SlideView> | null>(null);
  const [sync, setSync] = useState(at.sync);
  const [turn, setTurn] = useState(0); // of the right one against the left
  const leader = useRef<0 | 1>(0); // the side that leads: the one last touched
  const [help, setHelp] = useState(false);
  const [pick, setPick] = useState<0 | 1 | null>(null);
  const ids: Pair<string> = [at.left, at.right];

  useEffect(() => {
    const calls = new AbortController();
    let made: SlideView[] = [];
    Promise.all(ids.map((id) => api.get<TileInfo>(slidePath(id, "tiles"), { signal: calls.signal })))
      .then(async (infos) => {
        made = infos.map((info, side) => new SlideView(stages[side]!.current!, info));
        for (const view of made) explainLosses(view, report);
        await Promise.all(made.map((view, side) => view.open(at.places[side])));
        if (calls.signal.aborted) return;
        const pair = made as Pair<SlideView>;
        if (!at.places[1]) match(pair);
        setViews(pair);
      })
      .catch((error: unknown) => {
        if (!calls.signal.aborted) report(error);
      });
    return () => {
      calls.abort();
      for (const view of made) view.destroy();
    };
  }, []);

  const shown = useRef(at);
  useEffect(() => {
    if (shown.current === at || !views) return;
    shown.current = at;
    setSync(at.sync);
    for (const side of [0, 1] as const) views[side].moveTo(at.places[side] ?? views[side].whole());
    if (!at.places[1]) match(views);
  }, [at, views]);

  useEffect(() => {
    if (!views) return;
    const update = () => setTurn(between(views[1].place().rot, views[0].place().rot));
    update();
    const stops = views.map((view) => view.onMove(update));
    return () => stops.forEach((stop) => stop());
  }, [views]);
  // Before the next key: after the next frame, as other effects are, one slide would still move the other.
  useLayoutEffect(() => (views && sync ? join(views, leader) : undefined), [views, sync, turn]);
  useEffect(() => (views ? keepAddress(views, at, sync) : undefined), [views, at, sync]);

  const rotate = (degrees: number) => {
    if (!views) return;
    leader.current = 0;
    views[1].turnTo(views[0].place().rot + degrees);
  };
  useKeys({
    view: () => views?.[leader.current] ?? null,
    ruler: null,
    onHelp: () => setHelp(true),
    onTurn: () => views?.[leader.current].turnTo(views[leader.current].place().rot + 90),
  });
  const both = (act: (view: SlideView) => void) => {
    if (!views) return;
    if (sync) act(views[leader.current]);
    else for (const view of views) act(view);
  };

  return (
    <div class="compare-page">
      <header class="bar">
        <Home />
        <h1>Compare</h1>
        <div class="tools" role="group" aria-label="Tools">
          <span class="tool-group">
            <Tool icon="minus" label="Zoom out" disabled={!views} onPress={() => both((view) => view.zoomBy(0.5))} />
            <Tool icon="plus" label="Zoom in" disabled={!views} onPress={() => both((view) => view.zoomBy(2))} />
            <Tool icon="fit" label="Whole slides" disabled={!views} onPress={() => both((view) => view.moveTo(view.whole(view.place().rot), false))} />
            <Tool icon="rotate" label="Rotate by 90 degrees" disabled={!views} onPress={() => both((view) => view.turnTo(view.place().rot + 90))} />
          </span>
          <span class="tool-group">
            <label class="check" title="Unlock, bring the two to the same place, and lock again">
              <input type="checkbox" checked={sync} onChange={(event) => setSync(event.currentTarget.checked)} />
              In step
            </label>
            <label class="degrees">
              Turn the right by
              <input
                type="number"
                min={-180}
                max={180}
                step={1}
                value={Math.round(turn)}
                disabled={!views}
                onChange={(event) => rotate(Number(event.currentTarget.value) || 0)}
              />
              °
            </label>
          </span>
          <span class="tool-group">
            <Tool
              icon="swap"
              label="Swap the sides"
              onPress={() => go({ ...at, left: at.right, right: at.left, sync, places: views ? [views[1].place(), views[0].place()] : [null, null] })}
            />
            <Tool icon="help" label="Help and keys" hotkey="?" onPress={() => setHelp(true)} />
            <Account />
          </span>
        </div>
      </header>
      <main class="pair">
        {([0, 1] as const).map((side) => (
          <section
            key={side}
            class="stage"
            aria-label={side ? "Right slide" : "Left slide"}
            onFocusCapture={() => (leader.current = side)}
            onPointerDownCapture={() => (leader.current = side)}
            onWheelCapture={() => (leader.current = side)}
          >
            <div class="slide" ref={stages[side]} data-state={views ? "open" : "loading"} />
            <p class="side-name">
              <a href={format(slideRoute(ids[side]))}>{ids[side]}</a>
              <button type="button" onClick={() => setPick(side)} aria-label={`Change the ${side ? "right" : "left"} slide`}>
                Change
              </button>
            </p>
            <ScaleStrip view={views?.[side] ?? null} />
          </section>
        ))}
      </main>
      {help && <HelpDialog onClose={() => setHelp(false)} />}
      {pick !== null && (
        <PickSlide
          title={pick ? "Slide on the right" : "Slide on the left"}
          onClose={() => setPick(null)}
          onPick={(id) => {
            const kept = views?.[1 - pick]?.place() ?? null;
            go({ ...at, sync, ...(pick ? { right: id, places: [kept, null] } : { left: id, places: [null, kept] }) });
          }}
        />
      )}
    </div>
  );
}

/** Degrees from one angle to another, -180 to 180, to a hundredth. */
function between(to: number, from: number): number {
  return Math.round(100 * (((to - from + 900) % 360) - 180)) / 100;
}

/** Give the right view the left one's µm per pixel, about the middle of its slide. */
function match([left, right]: Pair<SlideView>): void {
  const [fromMpp, toMpp] = scales(left, right);
  const width = (left.place().w * fromMpp * right.element.clientWidth) / left.element.clientWidth / toMpp;
  right.moveTo({ ...right.whole(left.place().rot), w: width });
}

/** µm per level-0 px of two views; where one is unknown, their pixels count as equal. */
function scales(one: SlideView, other: SlideView): Pair<number> {
  const [a, b] = [one.info.mpp, other.info.mpp];
  return a === null || b === null ? [1, 1] : [a, b];
}

/** From here on the two move as one; returns how to part them. */
function join(views: Pair<SlideView>, leader: { current: 0 | 1 }): () => void {
  const start = views.map((view) => view.place()) as Pair<Place>;
  const stops = ([0, 1] as const).map((side) =>
    views[side].onMove(() => {
      if (leader.current !== side) return;
      const [own, other] = [views[side], views[side ? 0 : 1]];
      const [fromMpp, toMpp] = scales(own, other);
      const between = { from: start[side], to: start[side ? 0 : 1], fromMpp, toMpp };
      other.moveTo(follow(own.placeNow(), between, [own.element.clientWidth, other.element.clientWidth]));
    }),
  );
  return () => {
    for (const stop of stops) stop();
  };
}

function keepAddress(views: Pair<SlideView>, at: CompareRoute, sync: boolean): () => void {
  let timer = 0;
  const soon = () => {
    clearTimeout(timer);
    timer = window.setTimeout(() => note({ ...at, sync, places: [views[0].place(), views[1].place()] }), 200);
  };
  soon();
  const stops = views.map((view) => view.onMove(soon));
  return () => {
    clearTimeout(timer);
    for (const stop of stops) stop();
  };
}
