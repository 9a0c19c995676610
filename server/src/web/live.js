// The panel that shows what the machine is doing, from `admin/live.json`, once a second while somebody looks.

import { get, rate } from "./chat.js";

const SECOND = 1000;
const SAMPLES = 120;
const id = (name) => document.getElementById(name);

const bytes = (count) => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (count >= 1000 && at + 1 < units.length) {
    count /= 1000;
    at += 1;
  }
  return `${at === 0 || count >= 100 ? Math.round(count) : count.toFixed(1)} ${units[at]}`;
};
const percent = (value) => `${value >= 10 ? Math.round(value) : value.toFixed(1)} %`;

/** Tokens per second of the last two minutes, as a line that ends on the right. What was before is taken for nothing. */
function spark(history) {
  const samples = [...new Array(SAMPLES - history.length).fill(0), ...history];
  const most = Math.max(...samples, 1);
  const at = (value, index) => `${(index * 120 / (SAMPLES - 1)).toFixed(1)} ${(31 - 29 * value / most).toFixed(1)}`;
  const line = samples.map(at).join("L");
  id("spark").querySelector(".line").setAttribute("d", `M${line}`);
  id("spark").querySelector(".area").setAttribute("d", `M0 32L${line}L120 32Z`);
}

function cell(name, text, code = false) {
  const made = document.createElement(name);
  if (code) made.append(Object.assign(document.createElement("code"), { textContent: text }));
  else made.textContent = text;
  if (name === "th") made.scope = "row";
  return made;
}

/** Neighbours with the same schedule, as one: `2-4` and `5-8` are `2-8`, with `>8` they are `2 or more`. */
function joined(schedules) {
  const rows = [];
  for (const { tokens, schedule } of schedules) {
    const last = rows.at(-1);
    if (last?.schedule !== schedule) rows.push({ tokens, schedule, from: parseInt(tokens, 10) });
    else last.tokens = tokens.startsWith(">") ? `${last.from} or more` : `${last.from}-${tokens.split("-").at(-1)}`;
  }
  return rows;
}

/** A table for each shape: which schedule runs for how many tokens in a pass. */
function kernels(model) {
  return model.kernels.map(({ m, k, projections, schedules }) => {
    const table = document.createElement("table");
    const names = projections.map((name) => name.split(".").at(-1));
    table.createCaption().textContent = `${names.join(", ")} · ${m} × ${k}`;
    const body = table.createTBody();
    for (const { tokens, schedule } of joined(schedules)) body.insertRow().append(cell("th", tokens), cell("td", schedule, true));
    return table;
  });
}

/** Polls until the page is left. `settings` tells the model and the key; `onConnection` hears whether the server answers. */
export function watch(settings, onConnection) {
  const histories = new Map();
  let shown = "";

  function show(live) {
    for (const model of live.models) {
      const history = histories.get(model.name) ?? [];
      history.push(model.tokens_per_second);
      histories.set(model.name, history.slice(-SAMPLES));
    }
    const model = live.models.find(({ name }) => name === settings().model) ?? live.models[0];
    const speed = rate(model.tokens_per_second);
    const prompts = model.prompt_tokens;
    const texts = {
      speed,
      running: `${model.running} of ${model.parallel}`,
      waiting: `${model.waiting}`,
      batch: model.batch === null ? "–" : model.batch.toFixed(1),
      "prompt-speed": `${rate(model.prompt_tokens_per_second)}/s`,
      memory: bytes(live.memory_bytes),
      kv: bytes(model.kv_bytes),
      cpu: percent(live.cpu_percent),
      cached: prompts > 0 ? percent(100 * model.cached_tokens / prompts) : "–",
      roofline: model.roofline_percent === null ? "–" : percent(model.roofline_percent),
      "live-summary": `${speed} tokens/s · ${model.running} running`,
    };
    for (const [name, text] of Object.entries(texts)) id(name).textContent = text;
    const share = Math.min(100, model.roofline_percent ?? 0);
    id("roofline-meter").setAttribute("aria-valuenow", share.toFixed(0));
    id("roofline-meter").firstElementChild.style.width = `${share}%`;
    const bandwidth = live.memory_bandwidth ? `, memory gives ${bytes(live.memory_bandwidth)}/s` : "";
    id("roofline-note").textContent = `Each pass reads ${bytes(model.bytes_per_pass)} of weights${bandwidth}, with ${model.threads} ${model.threads === 1 ? "thread" : "threads"}. A model that fits into a cache may pass 100 %.`;
    spark(histories.get(model.name));
    const tables = JSON.stringify(model.kernels);
    if (tables !== shown) {
      shown = tables;
      id("kernels").replaceChildren(...kernels(model));
    }
  }

  async function look() {
    let problem = "";
    let state = "on";
    try {
      const live = await get("admin/live.json", settings().key);
      show(live);
      state = live.draining ? "stopping" : "on";
    } catch (error) {
      state = error.status ? "on" : "off";
      const forbidden = error.status === 401 || error.status === 403;
      problem = forbidden ? "These figures need a key with the role “admin”: enter it under Settings." : error.message;
      if (forbidden) id("live-summary").textContent = "";
    }
    id("live-problem").textContent = problem;
    id("live-problem").hidden = problem === "";
    id("live-figures").hidden = problem !== "" && state === "on";
    onConnection(state);
  }

  (async () => {
    for (;;) {
      if (!document.hidden) await look();
      await new Promise((next) => setTimeout(next, SECOND));
    }
  })();
}
