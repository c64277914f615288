/** The page's keys, and the window that explains them. */

import { useEffect, useRef } from "preact/hooks";
import type { Ruler } from "./measure.ts";
import type { SlideView } from "./slide.ts";
import { Dialog, fullScreen, hotkeys, store } from "./ui.tsx";

interface Keys {
  /** The view that keys act on, asked for at each key. */
  view: () => SlideView | null;
  ruler: Ruler | null;
  onHelp: () => void;
  onTurn: () => void;
}

const TYPED = "input, textarea, select, [contenteditable=true]";
const OWN_ARROWS = "[role=tablist], [role=slider], [role=listbox], [role=radiogroup]";
const STEP = 0.2; // of the screen, for an arrow

/** Keys of a slide, wherever the keyboard is, except in fields and open windows. */
export function useKeys(keys: Keys): void {
  const latest = useRef(keys);
  latest.current = keys;
  useEffect(() => {
    const pressed = (event: KeyboardEvent) => {
      const target = event.target instanceof Element ? event.target : document.body;
      if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
      if (document.querySelector("dialog[open]") || target.closest(TYPED)) return;
      const onSlide = target === document.body || Boolean(target.closest(".slide"));
      if (act(event, onSlide, target)) event.preventDefault();
    };

    function act(event: KeyboardEvent, onSlide: boolean, target: Element): boolean {
      const { ruler, onHelp, onTurn } = latest.current;
      const view = latest.current.view();
      const measuring = Boolean(ruler?.kind.peek());
      if (measuring && event.key === "Escape") return done(ruler!.start(null));
      if (measuring && event.key === "Backspace") return done(ruler!.undo());
      if (measuring && onSlide && event.key === "Enter") return done(ruler!.finish());
      if (measuring && onSlide && event.key === " ") return done(ruler!.addMiddle());
      if (!view) return false;
      const [right, down] = ARROWS[event.key] ?? [0, 0];
      if (right || down) {
        if (target.closest(OWN_ARROWS)) return false;
        return done(view.panBy(right * STEP, down * STEP));
      }
      if (!hotkeys.peek()) return false;
      switch (event.key) {
        case "+":
        case "=":
          return done(view.zoomBy(1.5));
        case "-":
        case "_":
          return done(view.zoomBy(1 / 1.5));
        case "0":
          return done(view.moveTo(view.whole(view.place().rot), false));
        case "f":
          return done(fullScreen());
        case "r":
          return done(onTurn());
        case "R":
          return done(view.turnTo(view.place().rot - 90));
        case "m":
          return done(ruler?.start(ruler.kind.peek() === "length" ? null : "length"));
        case "a":
          return done(ruler?.start(ruler.kind.peek() === "area" ? null : "area"));
        case "?":
          return done(onHelp());
        default:
          return false;
      }
    }

    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, []);
}

function done(_: void | undefined): true {
  return true;
}

const ARROWS: Record<string, [number, number]> = {
  ArrowLeft: [-1, 0],
  ArrowRight: [1, 0],
  ArrowUp: [0, -1],
  ArrowDown: [0, 1],
};

const HELP: [string, string][] = [
  ["Arrows", "Move"],
  ["+  and  −", "Zoom in and out"],
  ["0", "Whole slide"],
  ["r  and  Shift r", "Rotate right and left"],
  ["f", "Full screen"],
  ["m", "Measure a length"],
  ["a", "Measure an area"],
  ["Space", "While measuring: set a point at the cross"],
  ["Backspace", "While measuring: take back a point"],
  ["Enter", "While measuring: finish"],
  ["Escape", "Stop measuring, close a window"],
  ["?", "This help"],
];

export function HelpDialog({ onClose }: { onClose: () => void }) {
  return (
    <Dialog title="Help and keys" onClose={onClose}>
      <p>
        Drag to move, scroll or pinch to zoom, double-click to go nearer. The address keeps the view: copy it to come back or
        to show it to somebody.
      </p>
      <table class="keys">
        <caption class="hidden">Keys</caption>
        <thead>
          <tr>
            <th scope="col">Key</th>
            <th scope="col">What it does</th>
          </tr>
        </thead>
        <tbody>
          {HELP.map(([key, meaning]) => (
            <tr key={key}>
              <th scope="row">
                <kbd>{key}</kbd>
              </th>
              <td>{meaning}</td>
            </tr>
          ))}
        </tbody>
      </table>
      <label class="check">
        <input
          type="checkbox"
          checked={hotkeys.value}
          onChange={(event) => {
            hotkeys.value = event.currentTarget.checked;
            store("pathflip.keys", hotkeys.value ? "on" : "off");
          }}
        />
        Letters and signs are keys (the arrows always are)
      </label>
    </Dialog>
  );
}
