/** The panel of the slide itself: what it is, how its picture is shown, what was measured. */

import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { api, slidePath } from "./api.ts";
import type { Outlines, SlideRow } from "./api.ts";
import type { Measure, Ruler } from "./measure.ts";
import { mppLabel, round } from "./scalebar.ts";
import { PLAIN } from "./route.ts";
import type { Adjustment } from "./route.ts";
import type { SlideView } from "./slide.ts";
import { outlines, picture, report, session } from "./state.ts";
import { Tool } from "./ui.tsx";

interface Props {
  view: SlideView | null;
  ruler: Ruler | null;
  row: SlideRow | undefined;
}

export function SlideFacts({ view, ruler, row }: Props) {
  return (
    <>
      {row && <Facts row={row} power={view?.info.power ?? null} />}
      <Overlays view={view} />
      <Picture />
      {ruler && view && <Measures ruler={ruler} view={view} />}
    </>
  );
}

function Facts({ row, power }: { row: SlideRow; power: number | null }) {
  const facts: [string, string | null | undefined][] = [
    ["Size", row.width && row.height ? `${whole(row.width)} × ${whole(row.height)} px` : null],
    ["", row.width && row.height && row.mpp ? `${mm(row.width, row.mpp)} × ${mm(row.height, row.mpp)} mm` : null],
    ["Scale", row.mpp ? `${mppLabel(row.mpp)}${power ? ` (${round(power, 3)}×)` : ""}` : "not stated in the file"],
    ["Tissue", row.tissue_mm2 === null ? null : `${round(row.tissue_mm2, 3)} mm²`],
    ["Regions", row.n_regions === null ? null : whole(row.n_regions)],
    ["Format", row.vendor],
    ["Split", row.split],
    ["Patient", session.value?.can.patients ? row.patient_id : null],
  ];
  return (
    <section aria-labelledby="facts">
      <h2 id="facts">About this slide</h2>
      <dl class="facts">
        {facts.map(
          ([name, value]) =>
            value && (
              <div key={name}>
                <dt>{name}</dt>
                <dd>{value}</dd>
              </div>
            ),
        )}
      </dl>
    </section>
  );
}

function whole(px: number): string {
  return px.toLocaleString("en-GB");
}

function mm(px: number, mpp: number): string {
  return round((px * mpp) / 1000, 3);
}

/** Outlines of the tissue and of the regions, fetched when first wanted. */
function Overlays({ view }: { view: SlideView | null }) {
  const tissue = useSignal(false);
  const regions = useSignal(false);
  const wanted = tissue.value || regions.value;
  useEffect(() => {
    if (!view || !wanted || outlines.peek()) return;
    const call = new AbortController();
    const path = slidePath(view.info.slide_id, "outlines");
    api.get<Outlines>(path, { signal: call.signal }).then((found) => (outlines.value = found), report);
    return () => call.abort();
  }, [view, wanted]);
  const found = outlines.value;
  useEffect(() => {
    if (!view || !found) return;
    view.outline("tissue", tissue.value ? (found.tissue?.coordinates ?? []) : [], { colour: "#0b7a3e" });
    const boxes = found.regions.map(({ x0, y0, size0 }) => ({ x0, y0, w0: size0, h0: size0 }));
    view.outline("regions", regions.value ? boxes : [], { colour: "#3d3d8f", width: 1, dashed: true });
  }, [view, found, tissue.value, regions.value]);
  return (
    <section aria-labelledby="overlays">
      <h2 id="overlays">Outlines</h2>
      <label class="check">
        <input type="checkbox" checked={tissue.value} onChange={(event) => (tissue.value = event.currentTarget.checked)} />
        Tissue
      </label>
      <label class="check">
        <input type="checkbox" checked={regions.value} onChange={(event) => (regions.value = event.currentTarget.checked)} />
        Regions
      </label>
      <p class="hint" role="status">
        {wanted && found && !found.tissue && !found.regions.length && "None are known: this slide was not ingested."}
      </p>
    </section>
  );
}

function Picture() {
  const set = (change: Partial<Adjustment>) => (picture.value = { ...picture.value, ...change });
  const { brightness, contrast, gamma } = picture.value;
  const plain = brightness === 1 && contrast === 1 && gamma === 1;
  return (
    <section aria-labelledby="picture">
      <h2 id="picture">Picture</h2>
      <Slide label="Brightness" value={brightness} min={0.3} max={2} onChange={(brightness) => set({ brightness })} />
      <Slide label="Contrast" value={contrast} min={0.3} max={3} onChange={(contrast) => set({ contrast })} />
      <Slide label="Gamma" value={gamma} min={0.3} max={3} onChange={(gamma) => set({ gamma })} />
      <button type="button" disabled={plain} onClick={() => (picture.value = PLAIN)}>
        As scanned
      </button>
    </section>
  );
}

/** Shows the picture of a view as it is wanted; holds the curve that the view's filter names. */
export function PictureFilter({ view }: { view: SlideView | null }) {
  const { gamma } = picture.value;
  useEffect(() => view?.adjust(picture.value), [view, picture.value]);
  return (
    <svg class="filters" aria-hidden="true" focusable="false">
      <filter id="gamma" color-interpolation-filters="sRGB">
        <feComponentTransfer>
          <feFuncR type="gamma" exponent={1 / gamma} />
          <feFuncG type="gamma" exponent={1 / gamma} />
          <feFuncB type="gamma" exponent={1 / gamma} />
        </feComponentTransfer>
      </filter>
    </svg>
  );
}

interface SlideProps {
  label: string;
  value: number;
  min: number;
  max: number;
  onChange: (value: number) => void;
}

function Slide({ label, value, min, max, onChange }: SlideProps) {
  return (
    <label class="slider">
      <span>{label}</span>
      <input
        type="range"
        min={min}
        max={max}
        step={0.05}
        value={value}
        onInput={(event) => onChange(Number(event.currentTarget.value))}
      />
      <output>{round(value, 3)}</output>
    </label>
  );
}

function Measures({ ruler, view }: { ruler: Ruler; view: SlideView }) {
  const done = ruler.done.value;
  return (
    <section aria-labelledby="measures">
      <h2 id="measures">Measured</h2>
      {!done.length && <p class="hint">Nothing yet. The ruler and the area tool are in the bar above; keys m and a.</p>}
      <ol class="measures" aria-live="polite">
        {done.map((measure, index) => (
          <li key={measure.id}>
            <button type="button" class="plain" onClick={() => flyTo(view, measure)}>
              <span class="number">{index + 1}</span> {measure.kind === "length" ? "Length" : "Area"}{" "}
              <strong>{measure.label}</strong>
            </button>
            <Tool icon="remove" label={`Remove measure ${index + 1}`} onPress={() => ruler.remove(measure.id)} />
          </li>
        ))}
      </ol>
    </section>
  );
}

function flyTo(view: SlideView, measure: Measure): void {
  const xs = measure.points.map(([x]) => x);
  const ys = measure.points.map(([, y]) => y);
  const [x0, y0] = [Math.min(...xs), Math.min(...ys)];
  const [w0, h0] = [Math.max(...xs) - x0, Math.max(...ys) - y0];
  view.fly(x0 - w0 / 2, y0 - h0 / 2, 2 * w0, 2 * h0);
}
