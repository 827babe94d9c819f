// Where services and their replicas stand on the map, and how the lines between them run.

const HEADER = 34;
const ROW = 30;
const ENGINE_ROW = 64;
const PROBLEM = 16;
const GAP = 22;
const PAD = 10;

const COLUMNS = { gateway: 1, tokenizer: 2, safety: 2, engine: 2, cache: 2, valkey: 3 };
const ORDER = ["gateway", "tokenizer", "safety", "engine", "cache", "valkey"];
const WIDE = { width: 1200, x: [1, 216, 566, 968], widths: [96, 232, 284, 231] };
const NARROW = { width: 400, left: 30 };

export const CLIENTS = "clients";

/** Boxes by service, each with its replicas' rows, and the size of the whole. */
export function layout(services, links, narrow) {
  const shown = ORDER.map((name) => services.find((each) => each.service === name)).filter(Boolean);
  const boxes = new Map(shown.map((service) => [service.service, box(service)]));
  const below = links.some((link) => link.from_service === "gateway" && link.to_service === "valkey");
  const size = narrow ? stack(boxes) : spread(boxes, below);
  for (const each of boxes.values()) for (const row of each.rows) row.y += each.y;
  return { boxes, narrow, ...size };
}

function box(service) {
  let height = HEADER;
  const rows = (service.replicas ?? []).map((replica) => {
    const tall = (service.service === "engine" ? ENGINE_ROW : ROW) + (replica.problem ? PROBLEM : 0);
    const row = { address: replica.address, y: height, height: tall };
    height += tall + 4;
    return row;
  });
  return { service: service.service, rows, height: height + PAD - 4 + (rows.length ? 0 : 12), x: 0, y: 0, width: 0 };
}

function spread(boxes, below) {
  const columns = [[], [], [], []];
  for (const each of boxes.values()) columns[COLUMNS[each.service]].push(each);
  const heightOf = (column) => column.reduce((sum, each) => sum + each.height + GAP, -GAP);
  const height = Math.max(...columns.map(heightOf)) + 24;
  columns.forEach((column, number) => {
    let y = (height - heightOf(column)) / 2;
    for (const each of column) {
      each.x = WIDE.x[number];
      each.width = WIDE.widths[number];
      each.y = y;
      y += each.height + GAP;
    }
  });
  boxes.set(CLIENTS, { service: CLIENTS, rows: [], x: 0, y: height / 2 - 24, width: WIDE.widths[0], height: 48 });
  // Room for the line that runs below everything, where there is one.
  return { width: WIDE.width, height: height + (below ? 26 : 0) };
}

function stack(boxes) {
  let y = 2;
  for (const each of boxes.values()) {
    each.x = each.service === "gateway" ? 1 : NARROW.left;
    each.width = NARROW.width - each.x - 1;
    each.y = y;
    y += each.height + 14;
  }
  return { width: NARROW.width, height: y - 10 };
}

/** The path of a line between two boxes, and where its label stands. */
export function route(plan, from, to) {
  const a = plan.boxes.get(from);
  const b = plan.boxes.get(to);
  if (plan.narrow) {
    const x = 14;
    const y = b.y + 17;
    return { path: `M${x} ${a.y + a.height}V${y - 10}Q${x} ${y} ${x + 10} ${y}H${b.x}`, label: null };
  }
  const begin = { x: a.x + a.width, y: a.y + a.height / 2 };
  const end = { x: b.x, y: b.y + b.height / 2 };
  if (from === "gateway" && to === "valkey") {
    const bottom = plan.height - 8;
    const x = a.x + a.width / 2;
    const right = b.x + b.width / 2;
    return {
      path: `M${x} ${a.y + a.height}V${bottom - 26}Q${x} ${bottom} ${x + 26} ${bottom}H${right - 26}Q${right} ${bottom} ${right} ${bottom - 26}V${b.y + b.height}`,
      label: { x: (a.x + a.width + WIDE.x[2]) / 2, y: bottom },
    };
  }
  const bend = (end.x - begin.x) / 2;
  return {
    path: `M${begin.x} ${begin.y}C${begin.x + bend} ${begin.y} ${end.x - bend} ${end.y} ${end.x} ${end.y}`,
    label: { x: (begin.x + end.x) / 2, y: (begin.y + end.y) / 2 },
  };
}
