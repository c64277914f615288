/** Small parts that several panels use. */

import type { ComponentChildren } from "preact";
import { session } from "../state.ts";
import "./panels.css";

/** Why a panel has nothing to offer: the token's fault, or the service's. */
export function Refused({ scope, doing, lacks }: { scope: string; doing: string; lacks: string }) {
  const signedIn = session.value;
  const mayNot = signedIn && !signedIn.scopes.includes(scope);
  return (
    <p class="hint">
      {mayNot ? `Your token does not allow ${doing}: it lacks the scope “${scope}”.` : lacks}
    </p>
  );
}

/** An error as a sentence, read out at once. Present when empty, so that a change is noticed. */
export function Failed({ text, children }: { text: string | null; children?: ComponentChildren }) {
  return (
    <div role="alert" class={text ? "panel-error" : "panel-error empty"}>
      {text && <p>{text}</p>}
      {text && children}
    </div>
  );
}

/** Give the keyboard another place, once it is there: what had it is gone. */
export function focusSoon(id: string): void {
  setTimeout(() => document.getElementById(id)?.focus());
}

/** A score with a minus that is one. */
export function scoreText(score: number): string {
  return score.toFixed(3).replace("-", "\u2212");
}

/** A colour as a dot. */
export function Swatch({ colour }: { colour: string }) {
  return (
    <svg class="swatch" viewBox="0 0 10 10" aria-hidden="true">
      <circle cx="5" cy="5" r="4.5" fill={colour} />
    </svg>
  );
}

/** Give the reader a file that the page has made. */
export function download(name: string, document_: unknown): void {
  const data = new Blob([JSON.stringify(document_)], { type: "application/geo+json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(data);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** A name that every file system takes. */
export function fileName(...parts: string[]): string {
  return parts.map((part) => part.replace(/[^\p{L}\p{N}_-]+/gu, "_").replace(/_+$/, "").slice(0, 80)).join("-");
}
