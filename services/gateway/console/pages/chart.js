// Small charts. Each says in words what it draws.

import { s } from "./dom.js";

/** Bars of values, as many as the width holds, the latest on the right. */
export function bars(values, { label, widest = 180, height = 26 }) {
  const shown = values.slice(-Math.floor(widest / 3));
  const largest = Math.max(...shown, 1e-9);
  const width = Math.min(widest, shown.length * 6);
  const step = width / shown.length;
  return s(
    "svg",
    { class: "bars", role: "img", "aria-label": label, viewBox: `0 0 ${width} ${height}`, width, height },
    shown.map((value, position) => {
      const tall = Math.max(1.5, (value / largest) * (height - 1));
      return s("rect", { x: (position * step).toFixed(2), y: (height - tall).toFixed(2), width: Math.max(1, step - 1).toFixed(2), height: tall.toFixed(2), rx: 0.8 });
    }),
  );
}

/** A line of values over a soft ground. */
export function line(values, { label, width = 120, height = 32 }) {
  const largest = Math.max(...values, 1e-9);
  const step = width / Math.max(values.length - 1, 1);
  const points = values.map((value, position) => `${(position * step).toFixed(1)},${(height - 2 - (value / largest) * (height - 4)).toFixed(1)}`);
  return s(
    "svg",
    { class: "line", role: "img", "aria-label": label, viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" },
    points.length > 1 ? s("polygon", { points: `0,${height} ${points.join(" ")} ${width},${height}` }) : null,
    points.length > 1 ? s("polyline", { points: points.join(" "), "vector-effect": "non-scaling-stroke" }) : null,
  );
}
