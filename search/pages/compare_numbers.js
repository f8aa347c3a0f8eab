/* Numbers of the comparison: pure functions, without the page */

/* The q-quantile of numbers, linear between neighbours (Hyndman and Fan's type 7); Infinity where a neighbour is infinite. */
function quantile(values, q) {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (sorted.length - 1) * q;
  const [low, high] = [sorted[Math.floor(at)], sorted[Math.ceil(at)]];
  return low === high ? low : low + (high - low) * (at - Math.floor(at));
}

/* What a step function holds at x: its last value at or before x, or `before` where that is none. */
function stepAt(steps, x) {
  let [low, high] = [0, steps.x.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps.x[middle] <= x) low = middle + 1;
    else high = middle;
  }
  return low ? steps.y[low - 1] : steps.before;
}

const MOST_STEPS = 250;

/*
The median and the quartiles of step functions on the grid of all their steps.
A function that `holds` keeps its last value for ever; another is known up to its last step alone. The band ends where
fewer than half of the functions are known.
steps: [{x, y, before, holds}], x rising; returns {x, low, median, high, count}.
*/
function quartileBand(steps) {
  const all = [...new Set(steps.flatMap(({ x }) => x))].sort((a, b) => a - b);
  const every = Math.ceil(all.length / MOST_STEPS);
  const band = { x: [], low: [], median: [], high: [], count: [] };
  for (const x of all.filter((_, place) => place % every === 0 || place === all.length - 1)) {
    const known = steps.filter((each) => each.holds || (each.x.length && x <= each.x[each.x.length - 1]));
    if (2 * known.length < steps.length) break;
    const values = known.map((each) => stepAt(each, x));
    band.x.push(x);
    [["low", 0.25], ["median", 0.5], ["high", 0.75]].forEach(([name, q]) => band[name].push(quantile(values, q)));
    band.count.push(known.length);
  }
  return band;
}

/* Which points {x, y} no other beats in both: less x, and more y (or less, where less is better). Of equal ones the first. */
function undominated(points, higher) {
  const sign = higher ? 1 : -1;
  const order = points.map((_, place) => place).sort((a, b) => points[a].x - points[b].x || sign * (points[b].y - points[a].y) || a - b);
  let best = -Infinity;
  const kept = new Set();
  for (const place of order)
    if (sign * points[place].y > best) {
      best = sign * points[place].y;
      kept.add(place);
    }
  return kept;
}

/*
What changes from plan a to plan b: the layers, with the difference of every cost that both know (null otherwise), what
belongs to no layer, and the whole network.
*/
function planDifference(a, b, network, costs) {
  const minus = (after, before) => (after == null || before == null ? null : after - before);
  const each = (value) => Object.fromEntries(costs.map((cost) => [cost, value(cost)]));
  const layers = network.names.map((name, place) => ({
    name,
    kind: network.kinds[place],
    a: [a.weights[place], a.inputs[place]],
    b: [b.weights[place], b.inputs[place]],
    changed: a.weights[place] !== b.weights[place] || a.inputs[place] !== b.inputs[place],
    differences: each((cost) => minus(b.parts[cost]?.[place], a.parts[cost]?.[place])),
  }));
  return {
    layers,
    rest: each((cost) => minus(restOf(b, cost), restOf(a, cost))),
    whole: each((cost) => minus(b.totals[cost], a.totals[cost])),
    quality: b.quality - a.quality,
    drop: b.drop - a.drop,
  };
}

/* What of a plan's cost belongs to no layer; null where that is not known. */
function restOf(plan, cost) {
  const parts = plan.parts[cost];
  if (!parts || parts.includes(null) || plan.totals[cost] == null) return null;
  const rest = plan.totals[cost] - parts.reduce((sum, part) => sum + part, 0);
  return Math.abs(rest) < 1e-9 * Math.abs(plan.totals[cost]) ? 0 : rest;
}

/* A range that shows all of `focus`, and of the others those near it. */
function nearRange(focus, others) {
  const ends = focus.filter(Number.isFinite);
  if (!ends.length) return null;
  let [low, high] = [Math.min(...ends), Math.max(...ends)];
  const reach = 3 * (high - low) || 0.01 * Math.abs(high) || 0.01;
  const inside = others.filter((value) => low - reach <= value && value <= high + reach);
  [low, high] = [Math.min(low, ...inside), Math.max(high, ...inside)];
  const margin = 0.08 * (high - low) || reach;
  return [low - margin, high + margin];
}

/* The largest unit [symbol, size] that the largest of the values reaches. */
function unitFor(units, values) {
  const largest = Math.max(0, ...values.filter(Number.isFinite).map(Math.abs));
  return [...units].reverse().find(([, size]) => size <= largest) ?? units[0];
}

const formatters = new Map(); // by decimals: to make one takes longer than to use it many times

/* A number with that many decimals, rounded as Python does: what it holds exactly, and of two as near the even one. */
function decimal(value, decimals, grouped = false) {
  const key = `${decimals} ${grouped}`;
  if (!formatters.has(key)) {
    const options = { minimumFractionDigits: decimals, maximumFractionDigits: decimals, useGrouping: grouped, roundingMode: "halfEven" };
    formatters.set(key, new Intl.NumberFormat("en", options));
  }
  return formatters.get(key).format(value.toFixed(100)).replace("-", "−"); // a number would be rounded by its shortest digits
}

/* A number with that many significant digits and no exponent. */
function significant(value, digits = 3) {
  if (value == null || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const power = Math.floor(Math.log10(Math.abs(Number(value.toPrecision(digits)))));
  const decimals = Math.min(Math.max(digits - 1 - power, 0), 20);
  return decimal(value, decimals, true);
}

function signed(value, write) {
  if (value == null || !Number.isFinite(value)) return "–";
  return `${value > 0 ? "+" : value < 0 ? "−" : ""}${write(Math.abs(value))}`;
}

/* Ticks of a logarithmic axis: round numbers, the fewer to a power of ten the wider the range. */
function logTicks(low, high) {
  const width = Math.log10(high / low);
  const steps = width < 1.5 ? [1, 1.5, 2, 3, 5, 7] : width < 3 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let decade = Math.floor(Math.log10(low)); decade <= Math.ceil(Math.log10(high)); decade++)
    for (const step of steps) ticks.push(Number((step * 10 ** decade).toPrecision(12)));
  return ticks.filter((tick) => low <= tick && tick <= high);
}

/* Rows of text as CSV (RFC 4180). */
function asCsv(rows) {
  const cell = (value) => {
    const text = value == null ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(cell).join(",") + "\r\n").join("");
}
