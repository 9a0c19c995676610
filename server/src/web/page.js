// The page: a conversation, its settings, and the machine beside it. Nothing is fetched from anywhere but this server.

import { ApiError, answer, get, timing } from "./chat.js";
import { watch } from "./live.js";
import { markdown } from "./markdown.js";

const id = (name) => document.getElementById(name);
const form = id("settings-form");
const wide = matchMedia("(min-width: 56rem)");

/** Storage may be forbidden; then things are forgotten with the page. */
const stored = (storage, name) => {
  try {
    return JSON.parse(window[storage].getItem(`ternion.${name}`));
  } catch {
    return null;
  }
};
const store = (storage, name, value) => {
  try {
    window[storage].setItem(`ternion.${name}`, JSON.stringify(value));
  } catch { /* Forgotten, then. */ }
};

// Settings

const NUMBERS = ["temperature", "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];
const KEPT = [...NUMBERS, "model", "mode", "system"];

const settings = () => ({ model: form.model.value, key: form.key.value.trim(), mode: form.mode.value });

/** What a request says besides its text. An empty field is left to the model and the server. */
function options() {
  const chosen = { model: form.model.value };
  for (const name of NUMBERS) {
    if (form[name].value !== "") chosen[name] = form[name].valueAsNumber;
  }
  chosen.seed ??= Math.floor(Math.random() * 2 ** 32);
  return chosen;
}

function recall() {
  const kept = stored("localStorage", "settings") ?? {};
  for (const name of KEPT) if (name in kept && name !== "model") form[name].value = kept[name];
  form.key.value = stored("sessionStorage", "key") ?? "";
}

function keep() {
  store("localStorage", "settings", Object.fromEntries(KEPT.map((name) => [name, form[name].value])));
  store("sessionStorage", "key", form.key.value.trim());
}

/** Fills the list of models, and tells whether the server let us in. */
async function models() {
  const { data } = await get("v1/models", settings().key);
  const able = data.filter(({ kind }) => kind !== "embedding");
  const before = form.model.value || stored("localStorage", "settings")?.model;
  form.model.replaceChildren(...able.map((model) => new Option(model.id, model.id)));
  if (able.some((model) => model.id === before)) form.model.value = before;
  mode();
}

function mode() {
  const chat = form.mode.value === "chat";
  form.system.disabled = !chat;
  id("message").placeholder = chat ? "Message" : "The beginning of a text";
  id("empty-model").textContent = form.model.value || "the model";
  const ideas = chat
    ? ["Tell me a story about a dragon who was afraid of fire.", "What is a ternary weight?", "Name three things to do on a rainy day."]
    : ["Once upon a time", "The old fox looked at the moon and", "On the highest mountain there lived"];
  id("ideas").replaceChildren(...ideas.map((text) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.addEventListener("click", () => say(text));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
}

// Conversation

/** `{role, content, mode, note}`, as it was said. */
let turns = [];
/** Ends the answer that is being written. */
let running = null;

const announce = (text) => { id("announcer").textContent = text; };
const scroller = () => (wide.matches ? id("scroll") : document.scrollingElement);
const atEnd = () => scroller().scrollHeight - scroller().scrollTop - scroller().clientHeight < 80;
const toEnd = () => scroller().scrollTo({ top: scroller().scrollHeight });

function button(name, label, action) {
  const made = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: name });
  made.setAttribute("aria-label", label);
  made.addEventListener("click", () => action(made));
  return made;
}

async function copy(text, pressed) {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied");
    pressed.textContent = "Copied";
  } catch {
    announce("The browser does not let this page copy");
    pressed.textContent = "Not allowed";
  }
  setTimeout(() => { pressed.textContent = "Copy"; }, 1500);
}

/** Writes a turn's words. A text that goes on from its beginning is shown with it, unchanged. */
function write(item, turn, given) {
  const text = item.querySelector(".text");
  const plain = turn.role === "user" || turn.mode === "complete";
  text.classList.toggle("plain", plain);
  if (plain && given) {
    text.replaceChildren(Object.assign(document.createElement("span"), { className: "given", textContent: given }), turn.content);
  } else {
    text.replaceChildren(...(plain ? [turn.content] : markdown(turn.content)));
  }
}

/** Puts a turn into the list. */
function add(turn, at) {
  const item = document.createElement("li");
  item.className = `turn ${turn.role}`;
  const title = document.createElement("h3");
  title.textContent = turn.role === "user" ? "You" : turn.model;
  const text = Object.assign(document.createElement("div"), { className: "text" });
  item.append(title, text);
  write(item, turn, turn.mode === "complete" && turn.role === "assistant" ? turns[at - 1].content : "");
  if (turn.role === "assistant" && turn.note !== undefined) finish(item, turn, at);
  id("turns").append(item);
  return item;
}

/** What stands under a finished answer: how it went, and what can be done with it. */
function finish(item, turn, at) {
  const foot = document.createElement("footer");
  const note = Object.assign(document.createElement("span"), { className: "timing", textContent: turn.note });
  foot.append(note);
  if (turn.content) foot.append(button("Copy", "Copy this answer", (pressed) => copy(turn.content, pressed)));
  foot.append(button("Retry", "Ask again from here", () => retry(at)));
  if (turn.problem) {
    const problem = Object.assign(document.createElement("p"), { className: "problem", textContent: turn.problem });
    item.append(problem);
  }
  item.append(foot);
}

function show() {
  id("turns").replaceChildren();
  turns.forEach(add);
  id("empty").hidden = turns.length > 0;
  // Kept without half an answer: after a reload nothing is being written.
  store("sessionStorage", "turns", turns);
}

function busy(state) {
  id("send").hidden = state;
  id("stop").hidden = !state;
  id("new").disabled = state;
  for (const retry of document.querySelectorAll(".turn footer button[aria-label^='Ask']")) retry.disabled = state;
}

function request() {
  const last = turns.at(-1);
  if (last.mode === "complete") return { ...options(), prompt: last.content };
  const messages = [];
  for (const { role, mode, content } of turns) {
    if (mode !== "chat") continue;
    // A question that got no answer is not asked again along with the next: templates want turns to alternate.
    if (content) messages.push({ role, content });
    else messages.pop();
  }
  const system = form.system.value.trim();
  return { ...options(), messages: system ? [{ role: "system", content: system }, ...messages] : messages };
}

/** Asks for the answer to the last turn. */
async function ask() {
  const given = turns.at(-1);
  const turn = { role: "assistant", mode: given.mode, model: form.model.value, content: "" };
  const body = request();
  turns.push(turn);
  const at = turns.length - 1;
  const item = add(turn, at);
  item.classList.add("busy");
  running = new AbortController();
  busy(true);
  id("stop").focus();
  announce("Answering");
  toEnd();
  const start = given.mode === "complete" ? given.content : "";
  let frame = 0;
  const draw = () => {
    frame = 0;
    const follow = atEnd();
    write(item, turn, start);
    if (follow) toEnd();
  };
  try {
    const result = await answer(body, {
      key: settings().key,
      signal: running.signal,
      onText: (text) => {
        turn.content += text;
        frame ||= requestAnimationFrame(draw);
      },
    });
    turn.note = timing(result);
  } catch (error) {
    turn.note = "";
    turn.problem = error instanceof ApiError ? error.message : `This page made a mistake: ${error.message}`;
  }
  cancelAnimationFrame(frame);
  const follow = atEnd();
  draw();
  running = null;
  item.classList.remove("busy");
  finish(item, turn, at);
  busy(false);
  if (follow) toEnd();
  const held = document.activeElement === document.body || document.activeElement === id("stop");
  if (held) id("message").focus();
  announce(turn.problem ? `No answer: ${turn.problem}` : `${item.querySelector(".text").innerText} (${turn.note})`);
  store("sessionStorage", "turns", turns);
}

function say(text) {
  if (running || !text.trim()) return;
  const wrong = form.querySelector(":invalid");
  if (wrong) {
    id("settings").open = true;
    wrong.reportValidity();
    return;
  }
  const { mode } = settings();
  // The beginning of a text is taken as it stands; a message without the space around it.
  turns.push({ role: "user", mode, content: mode === "complete" ? text : text.trim() });
  show();
  ask();
}

function retry(at) {
  if (running) return;
  turns.length = at;
  show();
  ask();
}

// The composer

function grow() {
  const box = id("message");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

id("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = id("message").value;
  if (running || !text.trim()) return;
  id("message").value = "";
  grow();
  say(text);
});
id("message").addEventListener("input", grow);
id("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    id("composer").requestSubmit();
  }
});
id("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
id("new").addEventListener("click", () => {
  turns = [];
  show();
  id("message").focus();
});

// The settings

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", () => {
  keep();
  mode();
});
form.key.addEventListener("change", connect);
id("defaults").addEventListener("click", () => {
  const { model, key } = settings();
  form.reset();
  [form.model.value, form.key.value] = [model, key];
  keep();
  mode();
  announce("Settings are the defaults again");
});

// The theme

const THEMES = ["auto", "light", "dark"];
function theme(name) {
  document.documentElement.dataset.theme = name;
  id("theme").textContent = `Theme: ${name}`;
  store("localStorage", "theme", name);
}
id("theme").addEventListener("click", () => {
  theme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
});

// The connection

async function connect() {
  try {
    await models();
    return true;
  } catch (error) {
    if (error.status === 401) {
      id("settings").open = true;
      id("announcer").textContent = "This server needs an API key: enter it under Settings.";
      if (!form.key.value) form.key.focus();
    }
    return false;
  }
}

let connected = false;
const STATES = { on: "Connected", stopping: "Stopping", off: "No connection" };
function connection(state) {
  const text = STATES[state];
  if (id("connection").textContent !== text) id("connection").textContent = text;
  id("connection").dataset.state = state;
  // The server is back, perhaps with other models.
  if (state === "on" && !connected) connect().then((open) => { connected ||= open; });
  if (state === "off") connected = false;
}

theme(THEMES.find((name) => name === stored("localStorage", "theme")) ?? "auto");
recall();
mode();
turns = (stored("sessionStorage", "turns") ?? []).filter((turn) => typeof turn?.content === "string");
show();
id("live").open = wide.matches;
id("settings").open = wide.matches;
connected = await connect();
watch(settings, connection);
