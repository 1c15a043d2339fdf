// Runs llama.cpp on token ids: node llama_cpp.mjs NODE_FOLDER JOBS.json OUT.json
import fs from "fs";
import {pathToFileURL} from "url";

const [folder, jobs, out] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(`${folder}/node_modules/node-llama-cpp/dist/index.js`));
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error", maxThreads: 1});
const {prompt, count, runs} = JSON.parse(fs.readFileSync(jobs));
const found = {};
for (const {name, model: file, lora} of runs) {
  const model = await llama.loadModel({modelPath: file});
  const context = await model.createContext({
    contextSize: 64, sequences: 1, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
    ...(lora ? {lora: {adapters: [{filePath: lora, scale: 1}]}} : {}),
  });
  const sequence = context.getSequence();
  const tokens = [];
  let probabilities, current = prompt;
  while (tokens.length < count) {
    const wanted = {generateNext: {probabilities: true, token: true, options: {temperature: 0}}};
    const result = await sequence.controlledEvaluate(current.map((t, i) => i === current.length - 1 ? [t, wanted] : t));
    const {next} = result[result.length - 1];
    probabilities ??= [...next.probabilities.entries()];
    tokens.push(next.token);
    current = [next.token];
  }
  found[name] = {tokens, probabilities};
  await context.dispose();
  await model.dispose();
}
fs.writeFileSync(out, JSON.stringify({version: llama.llamaCppRelease.release, found}));
process.exit(0);
