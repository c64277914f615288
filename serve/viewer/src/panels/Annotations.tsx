import type { SlideView } from "../slide.ts";

export function Annotations({ view: _view }: { view: SlideView | null }) {
  return null;
}
