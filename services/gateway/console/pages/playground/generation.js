// One answer as it comes: its text, its tokens, and when they came.

import { stream } from "../api.js";

/** What a message of the model begins as. */
export const blank = (model) => ({
  role: "assistant",
  content: "",
  model,
  state: "running",
  tokens: [],
  // Of each event with text: seconds since the request, and its number of tokens.
  arrivals: [],
  usage: null,
  // How long the engine worked on it.
  timings: null,
  finish: "",
  cached: false,
  requestId: "",
  durationS: null,
});

/** Fills a message from a stream, calling `changed` after each event. Throws CallError. */
export async function generate(request, message, { signal, changed }) {
  const began = performance.now();
  // The ids tell how many tokens an event brought.
  const body = { request: { ...request, output: { ...request.output, token_ids: true } } };
  try {
    for await (const event of stream("/api/chat", { body, signal })) {
      const now = (performance.now() - began) / 1000;
      message.requestId = event.request_id ?? message.requestId;
      for (const delta of event.chunk?.deltas ?? []) {
        message.content += delta.content ?? "";
        const positions = delta.logprobs?.positions ?? [];
        message.tokens.push(...positions.map((position) => token(position)));
        message.arrivals.push([now, delta.token_ids?.length ?? 1]);
      }
      if (event.complete) {
        message.usage = event.complete.usage ?? {};
        message.timings = event.complete.timings ?? null;
        message.finish = event.complete.finish_reason.replace("FINISH_REASON_", "").toLowerCase();
        message.cached = event.complete.cached ?? false;
      }
      changed();
    }
    message.state = "done";
  } finally {
    message.durationS = (performance.now() - began) / 1000;
  }
}

/** A token with its text, and the likeliest ones at its place. */
function token(position) {
  const chosen = position.chosen ?? {};
  return {
    text: textOf(chosen.text),
    logprob: chosen.logprob ?? 0,
    top: (position.top ?? []).map((each) => ({
      text: textOf(each.text),
      logprob: each.logprob ?? 0,
      chosen: each.token_id === chosen.token_id,
    })),
  };
}

const textOf = (base64) => new TextDecoder().decode(Uint8Array.from(atob(base64 ?? ""), (character) => character.charCodeAt(0)));

/** Time to first token, rate after it and the times between tokens, of the arrivals so far. */
export function timing(message) {
  const [first, ...rest] = message.arrivals;
  if (first === undefined) return null;
  const gaps = [];
  let before = first[0];
  for (const [at, tokens] of rest) {
    if (tokens > 0) gaps.push([(at - before) / tokens, tokens]);
    if (tokens > 0) before = at;
  }
  const later = rest.reduce((sum, [, tokens]) => sum + tokens, 0);
  const spanS = (rest.at(-1)?.[0] ?? first[0]) - first[0];
  return { firstS: first[0], perSecond: spanS > 0 ? later / spanS : null, gaps };
}
