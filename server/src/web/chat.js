// Talks to the API: streams of server-sent events, and errors that say what to do.

/** A failed request, with the server's own words. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function open(path, key, options = {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers: { ...headers(key), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const wait = response.headers.get("retry-after");
  const message = body.error?.message ?? `The server answered with status ${response.status}.`;
  throw new ApiError(wait && !message.includes(`${wait} s`) ? `${message} (after ${wait} s)` : message, response.status);
}

/** A JSON answer. */
export const get = async (path, key) => (await open(path, key)).json();

/** The objects of an event stream, as they arrive. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError("The connection ended before the answer did.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const object = JSON.parse(data);
      if (object.error) throw new ApiError(object.error.message);
      yield object;
    }
  }
}

/**
 * Streams an answer. `onText` gets each piece of text. Returns why it ended and how long what took; a stop by `signal`
 * is an end like others. Tokens are counted by the server where the stream comes to its end, else by pieces.
 */
export async function answer(request, { key, signal, onText }) {
  const path = request.messages ? "v1/chat/completions" : "v1/completions";
  const result = { finish: "stopped", pieces: 0, usage: null, firstMs: null, seconds: 0 };
  const start = performance.now();
  let first = start;
  try {
    const response = await open(path, key, {
      method: "POST",
      signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    });
    for await (const object of events(response.body)) {
      result.usage = object.usage ?? result.usage;
      const choice = object.choices?.[0];
      const text = choice?.delta?.content ?? choice?.text ?? "";
      if (text) {
        if (result.firstMs === null) {
          first = performance.now();
          result.firstMs = first - start;
        }
        result.pieces += 1;
        onText(text);
      }
      result.finish = choice?.finish_reason ?? result.finish;
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    result.finish = "stopped";
  } finally {
    result.seconds = (performance.now() - first) / 1000;
  }
  return result;
}

const reasons = {
  length: "cut at the limit",
  content_filter: "cut by the content filter",
  stopped: "stopped",
};

/** One line about how an answer went. */
export function timing({ finish, pieces, usage, firstMs, seconds }) {
  const tokens = usage?.completion_tokens ?? pieces;
  const parts = [];
  if (firstMs !== null) parts.push(`first token ${firstMs < 1000 ? `${Math.round(firstMs)} ms` : `${(firstMs / 1000).toFixed(1)} s`}`);
  parts.push(`${tokens} ${tokens === 1 ? "token" : "tokens"}`);
  // The first token ends the wait and begins the flow: the flow has one step less than tokens.
  if (tokens > 1 && seconds > 0) parts.push(`${rate((tokens - 1) / seconds)} tokens/s`);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (usage) parts.push(`prompt ${usage.prompt_tokens}${cached ? `, ${cached} from cache` : ""}`);
  if (reasons[finish]) parts.push(reasons[finish]);
  return parts.join(" · ");
}

/** Three digits are enough. */
export const rate = (value) => (value === 0 || value >= 100 ? Math.round(value) : value >= 10 ? value.toFixed(1) : value.toFixed(2)).toString();
