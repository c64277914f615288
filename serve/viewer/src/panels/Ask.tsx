import type { SlideView } from "../slide.ts";

export function Ask({ view: _view }: { view: SlideView | null }) {
  return null;
}
