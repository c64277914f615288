import { defineConfig } from "vite";
import { strict } from "./strict.ts";

// `npm run dev` shows the page with the data of a service on this machine.
const service = process.env.PATHFLIP_SERVICE ?? "http://127.0.0.1:8000";

export default defineConfig({
  plugins: [strict()],
  server: { host: "127.0.0.1", proxy: { "/v1": service } },
  build: {
    target: "es2022",
    assetsInlineLimit: 0, // the page's policy has no data: for scripts and styles
    modulePreload: { polyfill: false },
    chunkSizeWarningLimit: 1024,
    license: { fileName: "licenses.md" }, // of the packages that are in the scripts
  },
});
