/** Where: a sentence as heat over the slide, with the boxes around its hottest parts. */

import { signal } from "@preact/signals";
import { useEffect, useId, useRef } from "preact/hooks";
import { api } from "../api.ts";
import type { HotBox } from "../api.ts";
import { colourMap, MAPS, paint } from "../heat.ts";
import type { MapName } from "../heat.ts";
import { change, follow, heatLayers, MAX_LAYERS, removeLayer, retry, showWhere, solo } from "../layers.ts";
import type { Layer } from "../layers.ts";
import { lengthLabel } from "../scalebar.ts";
import type { SlideView } from "../slide.ts";
import { layers, report, session } from "../state.ts";
import { download, Failed, fileName, focusSoon, Refused, scoreText, Swatch } from "./parts.tsx";

/** Colours of the ramp. */
const STEPS = 64;

const sentence = signal("");
const contrast = signal("");

export function Where({ view }: { view: SlideView | null }) {
  useEffect(() => (view ? follow(view) : undefined), [view]);
  if (!session.value?.can.ground)
    return (
      <Refused
        scope="search"
        doing="showing where a sentence is true"
        lacks="This service was started without a trained run, so no model can say where a sentence is true."
      />
    );
  return (
    <div class="panel-part">
      <Ask />
      <Told />
      {heatLayers.value.length > 0 && (
        <>
          <ul class="layers" aria-label="Layers">
            {heatLayers.value.map((layer) => (
              <LayerItem key={layer.key} layer={layer} view={view} />
            ))}
          </ul>
          <p class="hint">
            Colours are relative to this slide: a sentence that is false here has a hottest place too. The
            fit, the cosine of sentence and slide from −1 to 1, says how well it holds at all. Compare
            it with the fit of other sentences; it is no probability.
          </p>
        </>
      )}
    </div>
  );
}

function Ask() {
  const full = layers.value.length >= MAX_LAYERS;
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        if (!sentence.value.trim() || full) return;
        showWhere(sentence.value, contrast.value);
        sentence.value = "";
      }}
    >
      <label for="where-text">Show where this is true</label>
      <div class="line">
        <input
          type="text"
          id="where-text"
          maxLength={2000}
          placeholder="There is necrosis."
          value={sentence.value}
          onInput={(event) => (sentence.value = event.currentTarget.value)}
        />
        <button type="submit" class="primary" disabled={!sentence.value.trim() || full}>
          Show
        </button>
      </div>
      <details>
        <summary>{contrast.value.trim() ? "Contrast (in use)" : "Contrast"}</summary>
        <label for="where-contrast">Subtract the heat of</label>
        <input
          type="text"
          id="where-contrast"
          maxLength={2000}
          placeholder="tissue"
          value={contrast.value}
          onInput={(event) => (contrast.value = event.currentTarget.value)}
        />
        <p class="hint">
          A neutral text, such as “tissue”, takes away what any sentence would light up.
        </p>
      </details>
      {full && <p class="hint">{MAX_LAYERS} layers are shown. Remove one to show another.</p>}
    </form>
  );
}

/** What is read out when a layer has come. */
function Told() {
  const last = heatLayers.value.at(-1);
  let text = "";
  if (last?.found) text = `Layer “${last.text}” is shown, ${boxesText(last.found.boxes.length)}.`;
  else if (last && !last.failed) text = "Computing the heat…";
  return (
    <p role="status" class={last?.found ? "hidden" : "hint"}>
      {text}
    </p>
  );
}

function boxesText(count: number): string {
  return count === 1 ? "1 box" : `${count || "no"} boxes`;
}

function LayerItem({ layer, view }: { layer: Layer; view: SlideView | null }) {
  const { key, text, contrast: less, look, found, failed } = layer;
  return (
    <li class="layer">
      <div class="line">
        <label class="check grow">
          <input
            type="checkbox"
            checked={look.shown}
            onChange={(event) => change(key, { shown: event.currentTarget.checked })}
          />
          <Swatch colour={layer.colour} />
          <span>
            {text}
            {less && <span class="less"> less “{less}”</span>}
          </span>
        </label>
        <button type="button" aria-label={`Show only “${text}”`} onClick={() => solo(key)}>
          Only
        </button>
        <button type="button" aria-label={`Remove “${text}”`} onClick={() => (removeLayer(key), focusSoon("where-text"))}>
          ×
        </button>
      </div>
      <Failed text={failed}>
        <button type="button" onClick={() => retry(key)}>
          Try again
        </button>
      </Failed>
      {!found && !failed && <progress aria-label={`Computing “${text}”`} />}
      {found && (
        <>
          <p class="hint">
            Fit {scoreText(found.score)}
            {found.boxes.length === 0 && ". No part of at least 4 patches stands out"}
          </p>
          {look.map !== "single" && <Ramp layer={layer} />}
          <Boxes layer={layer} view={view} />
          <Looks layer={layer} />
        </>
      )}
    </li>
  );
}

/** The colours from cold to hot, as they are seen over white. */
function Ramp({ layer: { look, colour } }: { layer: Layer }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  useEffect(() => {
    const heat = Float64Array.from({ length: STEPS }, (_, i) => i / (STEPS - 1));
    const place = { x0: 0, y0: 0, w0: STEPS, h0: 1 };
    const grid = { columns: STEPS, rows: 1, heat, tissue: new Uint8Array(STEPS).fill(1), place };
    const map = colourMap(look.map, colour);
    const { width, height, pixels } = paint(grid, { map, threshold: look.threshold, single: true });
    Object.assign(canvas.current!, { width, height });
    canvas.current!.getContext("2d")!.putImageData(new ImageData(pixels, width, height), 0, 0);
  }, [look.map, look.threshold, colour]);
  return (
    <div class="ramp">
      <span>cold</span>
      <canvas ref={canvas} aria-hidden="true" />
      <span>hottest</span>
    </div>
  );
}

function Boxes({ layer, view }: { layer: Layer; view: SlideView | null }) {
  const boxes = layer.found!.boxes;
  if (!boxes.length) return null;
  // Without a contrast, heat of patches sums to 1: a box holds a share of it.
  const heat = (box: HotBox) =>
    layer.contrast ? `heat ${box.score.toPrecision(2)}` : `${Math.round(100 * box.score)} % of the heat`;
  return (
    <ol class="boxes" aria-label={`Boxes of “${layer.text}”`}>
      {boxes.map((box) => (
        <li key={`${box.x0} ${box.y0}`}>
          <button
            type="button"
            onClick={() => {
              change(layer.key, { shown: true });
              view?.fly(box.x0, box.y0, box.w0, box.h0);
            }}
          >
            {lengthLabel(box.w_um, 3)} × {lengthLabel(box.h_um, 3)}, {heat(box)}
          </button>
        </li>
      ))}
    </ol>
  );
}

function Looks({ layer }: { layer: Layer }) {
  const { key, look, text } = layer;
  const id = useId();
  return (
    <details>
      <summary>Colours and export</summary>
      <div class="fields">
        <label for={`${id}map`}>Colours</label>
        <select
          id={`${id}map`}
          value={look.map}
          onChange={(event) => change(key, { map: event.currentTarget.value as MapName })}
        >
          {MAPS.map(({ name, label }) => (
            <option key={name} value={name}>
              {label}
            </option>
          ))}
        </select>
        <Slider id={`${id}opacity`} label="Opacity" value={look.opacity} set={(opacity) => change(key, { opacity })} />
        <Slider
          id={`${id}threshold`}
          label="Hide heat below"
          value={look.threshold}
          set={(threshold) => change(key, { threshold })}
        />
      </div>
      <label class="check">
        <input
          type="checkbox"
          checked={look.single}
          onChange={(event) => change(key, { single: event.currentTarget.checked })}
        />
        show single patches
      </label>
      <label class="check">
        <input
          type="checkbox"
          checked={look.boxes}
          onChange={(event) => change(key, { boxes: event.currentTarget.checked })}
        />
        outline boxes
      </label>
      <div class="row">
        <button type="button" aria-label={`Save boxes for QuPath, of “${text}”`} onClick={() => void save(layer, false)}>
          Save boxes for QuPath
        </button>
        <button type="button" aria-label={`Boxes and patches for QuPath, of “${text}”`} onClick={() => void save(layer, true)}>
          Boxes and patches
        </button>
      </div>
    </details>
  );
}

interface SliderProps {
  id: string;
  label: string;
  value: number;
  set: (value: number) => void;
}

function Slider({ id, label, value, set }: SliderProps) {
  return (
    <>
      <label for={id}>{label}</label>
      <span class="line">
        <input
          id={id}
          type="range"
          min={0}
          max={1}
          step={0.05}
          value={value}
          aria-valuetext={`${Math.round(100 * value)} %`}
          onInput={(event) => set(event.currentTarget.valueAsNumber)}
        />
        <output for={id}>{Math.round(100 * value)} %</output>
      </span>
    </>
  );
}

/** The boxes as the service writes them for QuPath, which crops slides that state bounds. */
async function save(layer: Layer, patches: boolean): Promise<void> {
  const { slideId: slide_id, text, contrast: less } = layer;
  try {
    const body = { slide_id, text, contrast: less, patches, format: "geojson" };
    const objects = await api.post<object>("/v1/ground", body);
    download(`${fileName(slide_id, text)}.geojson`, objects);
  } catch (error) {
    report(error);
  }
}
