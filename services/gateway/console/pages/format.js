// Numbers and times as people read them.

/** Seconds as `41 ms`, `1.32 s` or `2 min 5 s`. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 0.01) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds % 60)} s`;
  if (minutes < 2880) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 1440)} days`;
}

export const milliseconds = (value) => (value === null || value === undefined ? "–" : duration(value / 1000));

/** A count with separators. */
export const count = (value) => Number(value ?? 0).toLocaleString("en-GB");

/** A large count in three digits: `1.2k`, `135M`. */
export function compact(value) {
  const number = Number(value ?? 0);
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (number >= size) return `${(number / size).toPrecision(3).replace(/\.0+$/, "")}${unit}`;
  }
  return number.toLocaleString("en-GB", { maximumFractionDigits: 1 });
}

/** A rate with the digits that mean something. */
export function rate(value) {
  const number = Number(value ?? 0);
  if (number === 0) return "0";
  if (number < 0.1) return "<0.1";
  return number < 10 ? number.toFixed(1) : compact(Math.round(number));
}

export function percent(ratio) {
  if (ratio === null || ratio === undefined) return "–";
  const value = ratio * 100;
  if (value === 0 || value === 100) return `${value} %`;
  if (value < 0.1) return "<0.1 %";
  return `${value < 10 ? value.toFixed(1) : Math.round(Math.min(value, 99.9))} %`;
}

export function bytes(value) {
  if (!value) return "–";
  const mebibytes = Number(value) / 2 ** 20;
  return mebibytes < 1024 ? `${Math.round(mebibytes)} MiB` : `${(mebibytes / 1024).toFixed(1)} GiB`;
}

export const clock = (unixMs) => new Date(unixMs).toLocaleTimeString("en-GB");

/** `DEADLINE_EXCEEDED` as `Deadline exceeded`. */
export function words(name) {
  const text = String(name).toLowerCase().replaceAll("_", " ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** An amount in a currency by its ISO 4217 code. */
export const money = (value, currency) =>
  new Intl.NumberFormat("en-GB", { style: "currency", currency, currencyDisplay: "narrowSymbol", maximumSignificantDigits: 4 }).format(value);
