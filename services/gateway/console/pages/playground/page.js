// The playground: a conversation with a model, and what its answers tell of themselves.

import { call, CallError, key } from "../api.js";
import { announce, h, icon, replace } from "../dom.js";
import { notice, problem } from "../problem.js";
import { Conversation } from "./conversation.js";
import { blank, generate } from "./generation.js";
import { messageView } from "./message.js";
import { asked, chatRequest, parametersForm, restored } from "./parameters.js";
import { showCode } from "./snippets.js";

const IDEAS = ["Tell me a story about a lighthouse.", "Why is the sky blue? Answer in two sentences.", "Write a haiku about tokens."];

export function mount(main, session) {
  const parameters = restored();
  let conversation = Conversation.restored();
  let running = null;
  // What was running when the tab was left has ended.
  for (const node of conversation.nodes.values()) if (node.state === "running") node.state = "stopped";

  const log = h("div", { class: "log", role: "log", "aria-label": "Conversation" });
  const aside = h("div", { class: "aside" });
  const input = h("textarea", {
    id: "prompt",
    rows: 2,
    placeholder: "Ask the model something",
    "aria-label": "Your message",
    "aria-keyshortcuts": "Enter",
    onkeydown: (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    },
  });
  const go = h("button", { class: "primary", type: "submit" });
  const composer = h(
    "form",
    {
      class: "composer card",
      onsubmit: (event) => {
        event.preventDefault();
        if (running) running.abort();
        else send();
      },
    },
    input,
    h("div", { class: "actions" }, h("span", { class: "muted small hint" }, "Enter sends, Shift+Enter breaks the line, Escape stops"), go),
  );
  const fresh = h("button", { class: "quiet", onclick: begin }, icon("plus"), "New conversation");
  replace(
    main,
    h(
      "div",
      { class: "playground" },
      h("section", { class: "talk", "aria-label": "Conversation" }, h("div", { class: "head" }, h("h1", {}, "Playground"), fresh), log, composer),
      aside,
    ),
  );

  const actions = {
    edit: (node, text) => answer(conversation.add(node.parent, { role: "user", content: text })),
    regenerate: (node) => answer(conversation.nodes.get(node.parent)),
    turn: (node, step) => {
      if (running) return;
      conversation.turn(node, step);
      conversation.save();
      show();
    },
    code: (node) => showCode(asked(parameters, conversation.pathTo(node.parent)), session, key.get() !== ""),
  };

  function begin() {
    running?.abort();
    conversation = new Conversation();
    conversation.save();
    show();
    input.focus();
  }

  function send() {
    const text = input.value;
    if (running || text.trim() === "") return;
    input.value = "";
    answer(conversation.add(conversation.path().at(-1)?.id ?? 0, { role: "user", content: text }));
  }

  /** Asks for an answer to a message. */
  async function answer(question) {
    if (running) return;
    const request = chatRequest(asked(parameters, conversation.pathTo(question.id)));
    const node = conversation.add(question.id, blank(parameters.model));
    const stopping = new AbortController();
    running = stopping;
    const view = show().at(-1);
    view.scrollIntoView({ block: "end" });
    announce("The model is answering.");
    let painted = 0;
    const changed = () => {
      // Once a frame is enough, however fast tokens come.
      painted ||= requestAnimationFrame(() => {
        painted = 0;
        following(() => view.update());
      });
    };
    try {
      await generate(request, node, { signal: stopping.signal, changed });
      announce("The answer is complete.");
    } catch (error) {
      if (error.name === "AbortError") {
        node.state = "stopped";
        announce("Stopped.");
      } else {
        node.state = "failed";
        const { reason = "CONSOLE_DEFECT", message, remedy = "", retryAfterS = null, requestId = "" } = error;
        node.error = { reason, message, remedy, retryAfterS, requestId };
        if (!(error instanceof CallError)) console.error(error);
      }
    }
    cancelAnimationFrame(painted);
    running = null;
    conversation.save();
    following(show);
  }

  /** Changes the page, and stays at its end if it was there. */
  function following(change) {
    const page = document.documentElement;
    const atEnd = innerHeight + scrollY >= page.scrollHeight - 160;
    change();
    if (atEnd) scrollTo(0, page.scrollHeight);
  }

  function show() {
    const path = conversation.path();
    const views = path.map((node) => messageView(node, conversation, actions));
    replace(log, views.length ? views : welcome());
    log.setAttribute("aria-busy", String(running !== null));
    fresh.disabled = path.length === 0;
    replace(go, icon(running ? "stop" : "send"), running ? "Stop" : "Send");
    return views;
  }

  const welcome = () =>
    h(
      "div",
      { class: "welcome" },
      h("p", { class: "big" }, "Ask something, and watch each token come."),
      h("p", { class: "muted" }, "What you send goes through the gateway like any other request: limits, cache and safety filter included."),
      h(
        "div",
        { class: "actions" },
        IDEAS.map((idea) =>
          h("button", { onclick: () => { input.value = idea; send(); } }, idea),
        ),
      ),
    );

  const onEscape = (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) running.abort();
  };
  addEventListener("keydown", onEscape);

  async function begun() {
    try {
      const { models = [] } = await call("/api/models");
      const chats = models.filter((model) => !model.capabilities?.length || model.capabilities.includes("MODEL_CAPABILITY_CHAT"));
      parameters.model ||= (chats.find((model) => model.is_default) ?? chats[0])?.name ?? "";
      const wide = matchMedia("(min-width: 1100px)").matches;
      replace(
        aside,
        chats.length
          ? h("details", { class: "card", open: wide }, h("summary", {}, icon("sliders"), h("h2", {}, "Parameters"), icon("down")), parametersForm(parameters, chats))
          : notice("No model can chat", "None of the models that this key may use has a chat template."),
      );
    } catch (error) {
      replace(aside, problem(error, { retry: begun }));
    }
  }

  show();
  begun();
  input.focus();
  return () => {
    running?.abort();
    removeEventListener("keydown", onEscape);
  };
}
