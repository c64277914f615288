import type { SlideView } from "../slide.ts";

export function Search({ view: _view }: { view: SlideView | null }) {
  return null;
}
