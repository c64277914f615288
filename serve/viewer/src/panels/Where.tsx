import type { SlideView } from "../slide.ts";

export function Where({ view: _view }: { view: SlideView | null }) {
  return null;
}
