// node prove.mjs BUNDLE PACKAGE: runs a bundle's proof in onnxruntime-node, whose package lies at PACKAGE. One line of JSON.
// Exit 0: passed, 1: failed, 2: wrong use, 3: it could not be run.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { prove, readSafetensors, withDecisions } from "./tokexport.mjs";

const [folder, place] = process.argv.slice(2);

async function bytes(...name) {
  const content = await readFile(join(folder, ...name));
  return content.buffer.slice(content.byteOffset, content.byteOffset + content.byteLength);
}

async function run() {
  const ort = createRequire(import.meta.url)(place);
  const manifest = JSON.parse(await readFile(join(folder, "tokexport.json"), "utf8"));
  const file = withDecisions(await bytes(manifest.file.name), await bytes("web", "decisions.pb"));
  const session = await ort.InferenceSession.create(file, { logSeverityLevel: 3 });
  const report = await prove(ort, session, manifest, readSafetensors(await bytes(manifest.proof.file.name)));
  console.log(JSON.stringify(report));
  return report.passed ? 0 : 1;
}

if (!folder || !place) {
  console.error("usage: node prove.mjs BUNDLE PACKAGE");
  process.exitCode = 2;
} else {
  try {
    process.exitCode = await run();
  } catch (e) {
    console.error(`Error: ${String(e.message).split("\n")[0]}`);
    process.exitCode = 3;
  }
}
