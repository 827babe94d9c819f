// Lets a reader hold a page that changes by itself.

import { h, icon, replace } from "./dom.js";

/** A button; `changed` is told whether the page is held. */
export function pauseButton(changed) {
  let paused = false;
  const button = h("button", { class: "quiet" });
  const label = () => replace(button, icon(paused ? "play" : "pause"), paused ? "Go on" : "Pause");
  button.addEventListener("click", () => {
    paused = !paused;
    label();
    changed(paused);
  });
  label();
  return button;
}
