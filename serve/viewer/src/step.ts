/** Two views that move as one, whatever the scales of their slides. */

import type { Place } from "./route.ts";

/** How two places stood when the views were joined: centres in level-0 px and degrees, µm per level-0 px. */
export interface Join {
  from: Place;
  to: Place;
  fromMpp: number;
  toMpp: number;
}

/**
 * Where the other view belongs when this one is at `now`.
 *
 * A view turned by θ shows a step v of the slide as R(θ)v. Both show the same step on the screen when
 * the other slide's step is R(θ_from − θ_to)v in µm; turning one turns the other by as much about its
 * middle, and both have the same µm per pixel: `widths` are those of the two elements, CSS px.
 */
export function follow(now: Place, { from, to, fromMpp, toMpp }: Join, widths: [number, number]): Place {
  const turn = ((from.rot - to.rot) * Math.PI) / 180;
  const [dx, dy] = [(now.x - from.x) * fromMpp, (now.y - from.y) * fromMpp];
  return {
    x: to.x + (dx * Math.cos(turn) - dy * Math.sin(turn)) / toMpp,
    y: to.y + (dx * Math.sin(turn) + dy * Math.cos(turn)) / toMpp,
    w: (now.w * fromMpp * widths[1]) / widths[0] / toMpp,
    rot: (((to.rot + now.rot - from.rot) % 360) + 360) % 360,
  };
}
