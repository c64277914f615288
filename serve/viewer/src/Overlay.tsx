/** What stands over a slide: the scale bar, magnification, and where the pointer is. */

import { useEffect, useState } from "preact/hooks";
import { mppLabel, powerLabel, round, scaleBar } from "./scalebar.ts";
import type { SlideView } from "./slide.ts";

const WIDEST = 150;

/** Level-0 px per CSS px of a view, kept up to date; null while nothing is open. */
export function useScale(view: SlideView | null): number | null {
  const [scale, setScale] = useState<number | null>(null);
  useEffect(() => {
    if (!view) return;
    const update = () => setScale(view.level0PerPixel());
    update();
    return view.onMove(update);
  }, [view]);
  return scale;
}

/** Scale bar, magnification and µm per px as shown, and the pointer's place in level-0 px. */
export function ScaleStrip({ view }: { view: SlideView | null }) {
  const px0 = useScale(view);
  const [at, setAt] = useState<[number, number] | null>(null);
  useEffect(() => view?.onPointer(setAt), [view]);
  if (!view || px0 === null) return null;
  const { mpp } = view.info;
  const bar = scaleBar(px0 * (mpp ?? 1), WIDEST);
  const length = mpp === null ? `${round(bar.um, 3)} px` : bar.label;
  const inside = at && at[0] >= 0 && at[1] >= 0 && at[0] < view.info.width && at[1] < view.info.height;
  return (
    <div class="scale-strip">
      <div class="scalebar" role="img" aria-label={`Scale bar: ${length}`} style={{ width: `${bar.px}px` }}>
        {length}
      </div>
      <p>
        {mpp === null ? (
          <span class="scale-mpp">The file states no scale</span>
        ) : (
          <>
            <span class="scale-power">{powerLabel(mpp * px0)}</span> <span class="scale-mpp">{mppLabel(mpp * px0)}</span>
          </>
        )}
        {inside && (
          <span class="scale-at" aria-hidden="true">
            {Math.floor(at[0])}, {Math.floor(at[1])}
          </span>
        )}
      </p>
    </div>
  );
}
