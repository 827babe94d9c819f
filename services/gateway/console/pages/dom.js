// Elements, made without markup: what comes from a model or a caller can only ever be text.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `on…` properties listen, `class` and the rest are attributes; false leaves one out. */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** An SVG element. */
export function s(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== false && child !== undefined));
  return element;
}

/** Replaces all that an element holds. */
export function replace(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== false && child !== undefined));
  return element;
}

const ICONS = {
  playground: "M4 5h16v11H9l-5 4z",
  mesh: "M12 4v5M12 9l-6 5M12 9l6 5M6 14v4M18 14v4M12 9v9",
  requests: "M4 6h9M4 12h16M9 18h11",
  models: "M12 3l8 4.500-8 4.500-8-4.500zM4 12l8 4.500 8-4.500M4 16.500 12 21l8-4.500",
  usage: "M5 20V11M10 20V5M15 20v-7M20 20V8",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.400 1.400M17.600 17.600 19 19M5 19l1.400-1.400M17.600 6.400 19 5",
  moon: "M20 14.500A8 8 0 1 1 9.500 4 6.500 6.500 0 0 0 20 14.500z",
  key: "M14.500 9.500a4 4 0 1 0-4 4 4 4 0 0 0 4-4M13.500 12.500 20 19M17 16l2-2",
  send: "M5 12h13M12 6l6 6-6 6",
  stop: "M7 7h10v10H7z",
  again: "M19 12a7 7 0 1 1-2-5M19 4v4h-4",
  edit: "M5 19h3L18.500 8.500l-3-3L5 16z",
  copy: "M9 9h10v10H9zM5 15V5h10",
  code: "M9 8l-4 4 4 4M15 8l4 4-4 4",
  left: "M14 7l-5 5 5 5",
  right: "M10 7l5 5-5 5",
  plus: "M12 5v14M5 12h14",
  sliders: "M4 8h9M17 8h3M4 16h3M11 16h9M13 6v4M7 14v4",
  down: "M7 10l5 5 5-5",
  pause: "M9 6v12M15 6v12",
  play: "M8 6l10 6-10 6z",
};

/** One of the console's icons; what it stands beside says what it means. */
export function icon(name) {
  return s("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, s("path", { d: ICONS[name] }));
}

/** Says something to screen readers. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** Copies text and says so on the button for a moment. */
export async function copy(text, button) {
  const label = button.lastChild;
  const before = label.textContent;
  try {
    await navigator.clipboard.writeText(text);
    label.textContent = "Copied";
  } catch {
    label.textContent = "Not allowed";
  }
  announce(label.textContent);
  setTimeout(() => (label.textContent = before), 1500);
}
