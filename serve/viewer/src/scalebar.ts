/** Scale in numbers: the bar, magnification and lengths as readers of slides write them. */

export interface Bar {
  /** Length on the slide. */
  um: number;
  /** Length on the screen, CSS px. */
  px: number;
  label: string;
}

/**
 * The longest bar of 1, 2 or 5 × 10^k µm that is at most `maxPx` wide.
 *
 * `umPerPx` is µm per CSS px on the screen. The bar is more than `0.4 * maxPx` wide: the steps of
 * 1, 2, 5, 10 are at most 2.5 apart.
 */
export function scaleBar(umPerPx: number, maxPx: number): Bar {
  const most = umPerPx * maxPx;
  const power = 10 ** Math.floor(Math.log10(most) + 1e-12);
  const um = [5, 2, 1].map((step) => step * power).find((length) => length <= most * (1 + 1e-9)) ?? power;
  return { um, px: um / umPerPx, label: lengthLabel(um, 3) };
}

/** A length in nm, µm, mm or cm with `digits` significant digits. */
export function lengthLabel(um: number, digits = 4): string {
  if (um >= 10_000) return `${round(um / 10_000, digits)} cm`;
  if (um >= 1000) return `${round(um / 1000, digits)} mm`;
  if (um >= 1 || um === 0) return `${round(um, digits)} µm`;
  return `${round(um * 1000, digits)} nm`;
}

/** An area in µm² or mm². */
export function areaLabel(um2: number, digits = 4): string {
  return um2 >= 1e5 ? `${round(um2 / 1e6, digits)} mm²` : `${round(um2, digits)} µm²`;
}

/** Objective power at which a screen px is this long: 10 / µm, as of a slide at level 0. */
export function powerLabel(umPerPx: number): string {
  return `${round(10 / umPerPx, 3)}×`;
}

export function mppLabel(umPerPx: number): string {
  return `${round(umPerPx, 4)} µm/px`;
}

/** Significant digits without an exponent, grouped by thousands. */
export function round(value: number, digits: number): string {
  return value.toLocaleString("en-GB", { maximumSignificantDigits: digits });
}
