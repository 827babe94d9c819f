// The same request as code: Python, grpcurl, curl.

import { copy, h, icon, replace } from "../dom.js";
import { chatRequest } from "./parameters.js";

/** A value as Python writes it. */
function python(value, indent = "") {
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "number") return String(value);
  if (typeof value === "string") return pythonText(value);
  const inner = `${indent}    `;
  if (Array.isArray(value)) return `[\n${value.map((each) => `${inner}${python(each, inner)},\n`).join("")}${indent}]`;
  return `{${Object.entries(value).map(([name, each]) => `${pythonText(name)}: ${python(each, inner)}`).join(", ")}}`;
}

/** JSON's escapes are Python's but for characters beyond U+FFFF, which stay as they are. */
const pythonText = (text) => JSON.stringify(text);
/** One word for a shell, whatever it holds. */
const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function pythonCode(request, session) {
  const target = session.grpc_port ? `${location.hostname}:${session.grpc_port}` : "unix:PATH";
  const tls = session.tls ? ", tls=True" : "";
  const options = { model: request.model, ...request.options };
  const lines = Object.entries(options).map(([name, value]) => `        ${name}=${name === "seed" ? value : python(value, "        ")},\n`);
  return `import meshserve

with meshserve.Client("${target}"${tls}) as client:
    stream = client.stream_chat(
        ${python(request.messages, "        ")},
${lines.join("")}    )
    with stream:
        for text in stream.iter_text():
            print(text, end="", flush=True)
`;
}

export function grpcurlCode(request, session, hasKey) {
  const target = session.grpc_port ? `${location.hostname}:${session.grpc_port}` : "unix:PATH";
  const key = hasKey ? ' -H "authorization: Bearer $MESHSERVE_API_KEY"' : "";
  const body = JSON.stringify({ request: chatRequest(request) }, null, 2);
  return `grpcurl${session.tls ? "" : " -plaintext"}${key} -d ${shell(body)} \\\n  ${target} meshserve.v1.InferenceService/StreamChat\n`;
}

export function curlCode(request, session, hasKey) {
  const key = hasKey ? ' \\\n  -H "authorization: Bearer $MESHSERVE_API_KEY"' : "";
  const body = JSON.stringify({ request: chatRequest(request) }, null, 2);
  return `curl --no-buffer ${location.origin}/api/chat \\\n  -H 'content-type: application/json'${key} \\\n  -d ${shell(body)}\n`;
}

const KINDS = [
  ["Python", pythonCode],
  ["grpcurl", grpcurlCode],
  ["curl", curlCode],
];

/** Opens a dialog with the code of a request. */
export function showCode(request, session, hasKey) {
  const code = h("code", {});
  const tabs = KINDS.map(([name, make]) =>
    h(
      "button",
      {
        class: "quiet",
        "aria-pressed": "false",
        onclick: (event) => {
          for (const tab of tabs) tab.setAttribute("aria-pressed", String(tab === event.currentTarget));
          replace(code, make(request, session, hasKey));
        },
      },
      name,
    ),
  );
  const copying = h("button", { class: "primary", onclick: () => copy(code.textContent, copying) }, icon("copy"), "Copy");
  const dialog = h(
    "dialog",
    { "aria-labelledby": "code-title" },
    h(
      "div",
      { class: "stack" },
      h("div", { class: "head" }, h("h2", { id: "code-title" }, "The same request as code"), h("div", { class: "actions", role: "group", "aria-label": "Language" }, tabs)),
      h("pre", { class: "code", tabindex: 0, role: "region", "aria-label": "Code" }, code),
      h("div", { class: "actions" }, copying, h("button", { onclick: () => dialog.close() }, "Close")),
    ),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  tabs[0].click();
  tabs[0].focus();
}
