// The frame of the console: which page is shown, who looks at it, light or dark.

import { askForKey } from "./access.js";
import { call, key } from "./api.js";
import { announce, h, icon, replace } from "./dom.js";
import * as mesh from "./mesh/page.js";
import * as models from "./models/page.js";
import * as playground from "./playground/page.js";
import { problem } from "./problem.js";
import * as requests from "./requests/page.js";
import { themeButton } from "./theme.js";
import * as usage from "./usage/page.js";

const PAGES = [
  { name: "playground", title: "Playground", page: playground },
  { name: "mesh", title: "Mesh", page: mesh },
  { name: "requests", title: "Requests", page: requests },
  { name: "models", title: "Models", page: models },
  { name: "usage", title: "Usage", page: usage },
];

const main = document.getElementById("main");
const nav = document.getElementById("pages");
let session = null;
let leave = () => {};

function show({ focus = true } = {}) {
  const name = location.hash.replace(/^#\//, "");
  const shown = PAGES.find((each) => each.name === name) ?? PAGES[0];
  leave();
  document.title = `${shown.title} · MeshServe`;
  for (const link of nav.children) {
    if (link.dataset.name === shown.name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  main.dataset.page = shown.name;
  replace(main);
  leave = shown.page.mount(main, session) ?? (() => {});
  if (focus) {
    main.focus({ preventScroll: true });
    window.scrollTo(0, 0);
    announce(shown.title);
  }
}

/** Finds out who asks, and asks for a key where one is needed. */
async function enter() {
  try {
    session = await call("/api/session");
  } catch (error) {
    if (["API_KEY_MISSING", "API_KEY_INVALID"].includes(error.reason)) return askForKey(error, enter);
    replace(main, problem(error, { retry: enter }));
    return undefined;
  }
  frame();
  return show({ focus: false });
}

function frame() {
  replace(
    nav,
    PAGES.map(({ name, title }) => h("a", { href: `#/${name}`, "data-name": name }, icon(name), h("span", {}, title))),
  );
  replace(
    document.getElementById("bar-end"),
    session.tenant !== "anonymous" || key.get()
      ? h("button", { class: "quiet", onclick: () => askForKey(null, enter), title: "Use another API key" }, icon("key"), session.tenant)
      : null,
    themeButton(),
    h("span", { class: "muted small wide" }, `MeshServe ${session.version}`),
  );
}

addEventListener("hashchange", () => {
  if (session !== null) show();
});
// A page that the browser keeps for going back must not keep what it watches, or a chat, going.
addEventListener("pagehide", () => leave());
addEventListener("pageshow", (event) => {
  if (event.persisted) enter();
});
// The link that skips the bar must not change the address, which names the page.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
enter();
