// Light or dark: as the system says, until the reader chooses.

import { h, icon, replace } from "./dom.js";
import { forGood } from "./kept.js";

const CHOICE = "meshserve.theme";
const system = matchMedia("(prefers-color-scheme: dark)");

const current = () => forGood.get(CHOICE) ?? (system.matches ? "dark" : "light");

/** A button that changes it. */
export function themeButton() {
  const button = h("button", { class: "quiet" });
  const label = () => {
    const other = current() === "dark" ? "light" : "dark";
    replace(button, icon(other === "dark" ? "moon" : "sun"), h("span", { class: "wide" }, `${other === "dark" ? "Dark" : "Light"} colours`));
    button.setAttribute("aria-label", `${other === "dark" ? "Dark" : "Light"} colours`);
  };
  button.addEventListener("click", () => {
    const chosen = current() === "dark" ? "light" : "dark";
    forGood.set(CHOICE, chosen);
    document.documentElement.dataset.theme = chosen;
    label();
  });
  system.addEventListener("change", label);
  label();
  return button;
}
