/**
 * Makes Annotorious fit the page's policy, which allows neither functions made of texts nor style
 * attributes.
 *
 * Annotorious carries a copy of Pixi inside, out of reach of @pixi/unsafe-eval, the part of Pixi
 * that does without; and its layers write style attributes. The build puts both right, and fails
 * where a newer Annotorious no longer has what is replaced here.
 */

import type { Plugin } from "vite";

const BUNDLE = "annotorious-openseadragon.es.js";
const PIXI = "../../../@pixi/unsafe-eval/lib/syncUniforms.mjs";

const CHANGES: readonly [what: string, from: RegExp, to: string][] = [
  [
    "Pixi's check",
    /systemCheck\(\) \{\s+if \(!\w+\(\)\)\s+throw new Error\("Current environment does not allow unsafe-eval[^"]*"\);\s+\}/g,
    "systemCheck() {}",
  ],
  [
    "Pixi's uniforms",
    /(syncUniforms\((\w+), (\w+), \w+\) \{)\s+\(\w+\.syncUniforms\[this\.shader\.program\.id\] \|\|[^;]+;\s+\}/g,
    "$1 syncUniformsPlainly($2, this.shader.program.uniformData, $3.uniformData, $2.uniforms, this.renderer); }",
  ],
  [
    "style attributes",
    /(\w+)\.getAttribute\((\w+)\) !== (\w+) && \1\.setAttribute\(\2, \3\)/g,
    '($2 === "style" ? ($1.style.cssText = $3) : $1.getAttribute($2) !== $3 && $1.setAttribute($2, $3))',
  ],
];

export function strict(): Plugin {
  return {
    name: "strict-annotorious",
    enforce: "pre",
    transform(code, id) {
      if (!id.split("?")[0]!.endsWith(BUNDLE)) return null;
      let made = code;
      for (const [what, from, to] of CHANGES) {
        const before = made;
        made = before.replace(from, to);
        if (made === before) this.error(`${BUNDLE} has changed: ${what} are not where they were.`);
      }
      return { code: `import { syncUniforms as syncUniformsPlainly } from "${PIXI}";\n${made}`, map: null };
    },
  };
}
