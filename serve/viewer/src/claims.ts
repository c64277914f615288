/** Sentences of an answer, each of which can be looked for on the slide. */

export interface Claim {
  /** As it stands in the answer, with the white space around it. */
  shown: string;
  /** As it is looked for; empty where there is nothing to look for. */
  text: string;
}

/** What a model says that has learned to abstain (pathflip/text.py). */
export const CANNOT_TELL = "cannot be told from this slide";
/** Answers that say nothing which a slide could show. */
const NO_CLAIMS = new Set([CANNOT_TELL, "yes", "no", "none"]);
/** Characters of a sentence that the service takes. */
const MAX_TEXT = 2000;

/** Cut an answer into sentences; joined, what is shown is the answer again. */
export function toClaims(answer: string): Claim[] {
  return answer
    .split(/(?<=\n)/)
    .flatMap(sentencesOf)
    .map((shown) => ({ shown, text: claimOf(shown) }));
}

function sentencesOf(line: string): string[] {
  const found: string[] = [];
  for (const { segment } of new Intl.Segmenter("en", { granularity: "sentence" }).segment(line)) {
    const before = found.at(-1);
    // No sentence ends at the point of "approx. 4 mm", or at that of "1." before an item of a list.
    const goesOn = before !== undefined && (/^[\p{Ll}\d]/u.test(segment) || !/\p{L}/u.test(before));
    if (goesOn) found[found.length - 1] = before + segment;
    else found.push(segment);
  }
  return found;
}

/** A sentence without the marks of a list or of emphasis; empty without a word. */
function claimOf(shown: string): string {
  const bare = shown.replace(/^\s*(?:[-*•]|\d+[.)])\s+/u, "").replace(/\*\*|__|`/g, "").trim();
  if (!/\p{L}{2}/u.test(bare) || NO_CLAIMS.has(bare.replace(/\.$/, "").toLowerCase())) return "";
  return bare.slice(0, MAX_TEXT);
}
