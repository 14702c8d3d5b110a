/** Builds src/ into ../genmed/viewer/page.js and page.css: the two files that GenMed puts into every page. */

import { createHash } from "node:crypto";
import { readFileSync, readdirSync } from "node:fs";
import { defineConfig } from "vite";

/** SHA-256 over the sources by name, so that a test without Node can tell whether the bundle is up to date. */
function sources(): string {
  const digest = createHash("sha256");
  for (const name of readdirSync("src").sort()) digest.update(readFileSync(`src/${name}`));
  return digest.digest("hex");
}

export default defineConfig({
  build: {
    outDir: "../genmed/viewer",
    emptyOutDir: false,
    target: "es2022",
    lib: { entry: "src/main.ts", formats: ["iife"], name: "genmed", fileName: () => "page.js", cssFileName: "page" },
    rolldownOptions: {
      output: {
        postBanner: `/*! GenMed's comparison page, Apache-2.0, no third-party code. Sources ${sources()} in viewer/src. */`,
      },
    },
  },
});
