// Asks for an API key.

import { key } from "./api.js";
import { h } from "./dom.js";

/** Opens the dialog; `done` is called once a key is set or taken away. */
export function askForKey(error, done) {
  const field = h("input", { type: "password", id: "api-key", autocomplete: "off", spellcheck: "false", value: key.get() });
  const submit = (value) => {
    key.set(value.trim());
    dialog.remove();
    done();
  };
  const dialog = h(
    "dialog",
    { class: "narrow", "aria-labelledby": "key-title" },
    h(
      "form",
      {
        class: "stack",
        method: "dialog",
        onsubmit: (event) => {
          event.preventDefault();
          submit(field.value);
        },
      },
      h("h2", { id: "key-title" }, "API key"),
      h("p", { class: "muted" }, "This gateway answers those who have a key. It is kept until this tab is closed, and sent to this gateway alone."),
      error?.reason === "API_KEY_INVALID" ? h("div", { class: "problem", role: "alert" }, h("strong", {}, "The key is not known."), h("span", {}, error.remedy)) : null,
      h("div", {}, h("label", { for: "api-key" }, "Key"), field),
      h(
        "div",
        { class: "actions" },
        h("button", { class: "primary", type: "submit" }, "Use this key"),
        key.get() && !error ? h("button", { type: "button", onclick: () => submit("") }, "Forget it") : null,
        error ? null : h("button", { type: "button", onclick: () => dialog.remove() }, "Cancel"),
      ),
    ),
  );
  if (error) dialog.addEventListener("cancel", (event) => event.preventDefault());
  else dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  field.focus();
}
