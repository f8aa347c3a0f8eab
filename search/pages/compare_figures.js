/* Figures of the comparison: from runs to what plotly draws, what is said of it, and its numbers as a table */

const data = JSON.parse(document.getElementById("data").textContent);

/* A strategy has one colour on the whole page, of a pair for light and dark paper; its arms differ in symbol and dash. */
const ARM_COLOURS = [
  ["#0072b2", "#5aa9e6"], ["#d55e00", "#f0843c"], ["#008060", "#2fc49a"], ["#cc79a7", "#e3a1c8"],
  ["#b07d00", "#e6b422"], ["#3f3f3f", "#d0d0d0"], ["#882255", "#d0669a"], ["#2a9fd6", "#8fd3ff"],
];
const narrow = matchMedia("(max-width: 599.98px)"); // where two figures find no room side by side
const ARM_SYMBOLS = ["circle", "square", "triangle-up", "cross", "triangle-down", "hexagon", "star-diamond", "x"];
const ARM_DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];

function isDark() {
  return dark.matches && !document.documentElement.classList.contains("printing");
}

function armStyle(name) {
  const { strategy, variant } = data.arms.find((arm) => arm.name === name);
  return {
    color: ARM_COLOURS[strategy % ARM_COLOURS.length][Number(isDark())],
    symbol: ARM_SYMBOLS[(strategy + variant) % ARM_SYMBOLS.length],
    dash: ARM_DASHES[(strategy + variant) % ARM_DASHES.length],
  };
}

function withAlpha(hex, alpha) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return `rgba(${red},${green},${blue},${alpha})`;
}

function escapeHtml(text) {
  return String(text).replace(/[&<>"]/g, (letter) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[letter]);
}

function quantity(cost, value, digits = 3) {
  if (value == null) return "–";
  const [symbol, size] = unitFor(data.costs[cost].units, [value]);
  return `${significant(value / size, digits)} ${symbol}`.trim();
}

function costLabel(cost, symbol) {
  return data.costs[cost].name + (symbol ? ` (${symbol})` : "");
}

function interval(value, low, high, sign = false) {
  const write = (number) => (sign ? signed(number, (size) => decimal(size, 4)) : decimal(number, 4));
  return write(value) + (low == null || high == null ? "" : ` [${write(low)}, ${write(high)}]`);
}

function byArm(runs) {
  return data.arms.map(({ name }) => [name, runs.filter((run) => run.filter.strategy === name)]).filter(([, found]) => found.length);
}

function runLabel(run) {
  return `${run.filter.strategy}, seed ${run.filter.seed}`;
}

/* The name of an arm in a legend, whose entries plotly cuts where they are wider than the figure. */
function legendName(arm) {
  const most = narrow.matches && !document.documentElement.classList.contains("printing") ? 30 : 64;
  const lines = [];
  for (const word of arm.split(/(?<=, )/)) {
    const last = lines[lines.length - 1] ?? "";
    if (last && (last + word).trimEnd().length <= most) lines[lines.length - 1] += word;
    else lines.push(word);
  }
  return lines.map((line) => escapeHtml(line.trimEnd())).join("<br>");
}

function axisStyle(more) {
  const [line, soft, grid] = ["--line", "--soft", "--grid"].map(cssColour);
  const ticks = { ticks: "outside", tickcolor: soft, linecolor: soft, showline: true, zeroline: false };
  return { ...ticks, gridcolor: grid || line, ...more };
}

function figureLayout(height, more) {
  const [ink, line, soft, paper] = ["--ink", "--line", "--soft", "--paper"].map(cssColour);
  const clear = "rgba(0,0,0,0)";
  return {
    height,
    paper_bgcolor: clear,
    plot_bgcolor: clear,
    font: { family: "system-ui, sans-serif", size: 12.5, color: ink },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, bgcolor: clear, tracegroupgap: 0, maxheight: 1 },
    margin: { l: 62, r: 22, t: 40, b: 50 },
    hoverlabel: { align: "left", bgcolor: paper, bordercolor: line, font: { color: ink } },
    modebar: { bgcolor: clear, color: soft, activecolor: ink },
    ...more,
  };
}

/* Fronts */

function hoverOf(run, point) {
  const lines = [`<b>${escapeHtml(runLabel(run))}</b>`, `${escapeHtml(point.name)} ${point.digest}`];
  lines.push(`${escapeHtml(run.metric)} ${interval(point.quality, point.low, point.high)}`);
  for (const [cost, value] of Object.entries(point.costs))
    if (["weight_bytes", "latency_s", "energy_j", "average_weight_bits"].includes(cost))
      lines.push(`${data.costs[cost].name} ${quantity(cost, value, 4)}`);
  return lines.join("<br>");
}

function frontFigure(runs, { cost }) {
  const known = (point) => point.costs[cost] != null;
  const drawn = runs.filter((run) => run.front.some((point) => known(point) && point.role !== "float"));
  if (!drawn.length) return null;
  const ofRole = (run, ...roles) => run.front.filter((point) => roles.includes(point.role) && known(point));
  const baselines = new Map();
  for (const run of drawn)
    for (const point of ofRole(run, "float", "uniform"))
      baselines.set(`${point.name} ${point.costs[cost]} ${point.quality}`, { run, point });
  const limits = [...new Set(drawn.map((run) => run.limits[cost]).filter((limit) => limit != null))];
  const costs = [...drawn.flatMap((run) => run.front.filter(known).map((point) => point.costs[cost])), ...limits];
  const [symbol, size] = unitFor(data.costs[cost].units, costs);
  const isLog = Math.min(...costs) > 0 && Math.max(...costs) / Math.min(...costs) > 4;
  const winners = drawn.flatMap((run) => ofRole(run, "winner"));
  const floats = drawn.flatMap((run) => ofRole(run, "float"));
  const members = drawn.flatMap((run) => ofRole(run, "front", "winner"));
  const view = nearRange(
    [...winners.flatMap(({ quality, low, high }) => [quality, low ?? quality, high ?? quality]), ...floats.map(({ quality }) => quality)],
    [...members, ...[...baselines.values()].map(({ point }) => point)].map(({ quality }) => quality),
  );
  const inView = (quality) => Math.min(Math.max(quality, view[0]), view[1]);
  const traces = [];
  for (const [arm, its] of byArm(drawn)) {
    const style = armStyle(arm);
    const line = { x: [], y: [], text: [] };
    for (const run of its) {
      const points = ofRole(run, "front", "winner").map((point) => ({ point, x: point.costs[cost] / size, y: point.quality }));
      const kept = undominated(points, run.higher);
      const joined = points.filter((_, place) => kept.has(place)).sort((a, b) => a.x - b.x);
      const alone = points.filter((_, place) => !kept.has(place)).flatMap((point) => [null, point]);
      for (const each of [...joined, ...alone, null]) {
        line.x.push(each ? each.x : null);
        line.y.push(each ? each.y : null);
        line.text.push(each ? hoverOf(run, each.point) : "");
      }
    }
    const usual = { type: "scatter", name: legendName(arm), legendgroup: arm, hoverinfo: "text" };
    traces.push({
      ...usual, x: line.x, y: line.y, hovertext: line.text, mode: "lines+markers", opacity: 0.75, connectgaps: false,
      line: { shape: "hv", width: 1.4, color: style.color, dash: style.dash },
      marker: { color: style.color, symbol: style.symbol, size: 6 },
    });
    const plans = its.flatMap((run) => ofRole(run, "winner").map((point) => ({ run, point })));
    const lengths = (end, sign) => plans.map(({ point }) => (point[end] == null ? 0 : sign * (point[end] - point.quality)));
    traces.push({
      ...usual, showlegend: false, mode: "markers", x: plans.map(({ point }) => point.costs[cost] / size), y: plans.map(({ point }) => point.quality),
      hovertext: plans.map(({ run, point }) => hoverOf(run, point)),
      error_y: { array: lengths("high", 1), arrayminus: lengths("low", -1), thickness: 1, width: 3, color: withAlpha(style.color, 0.6) },
      marker: { color: style.color, symbol: style.symbol, size: 12, line: { color: cssColour("--ink"), width: 1.3 } },
    });
  }
  const stars = [...baselines.values()].sort((a, b) => a.point.costs[cost] - b.point.costs[cost]);
  const label = ({ point }) => (inView(point.quality) === point.quality ? point.name : `${point.name} (${significant(point.quality)})`);
  traces.push({
    type: "scatter", name: "float and uniform", mode: "markers+text", hoverinfo: "text", cliponaxis: false,
    x: stars.map(({ point }) => point.costs[cost] / size), y: stars.map(({ point }) => inView(point.quality)),
    hovertext: stars.map(({ run, point }) => hoverOf(run, point).replace(/^.*?<br>/, "")),
    text: stars.map((star) => escapeHtml(label(star))), textposition: stars.map((_, place) => (place % 2 ? "bottom center" : "top center")),
    textfont: { size: 10.5, color: cssColour("--soft") },
    marker: { symbol: "star", size: 11, color: cssColour("--soft") },
  });
  const dash = { color: cssColour("--soft"), width: 1.2, dash: "dash" };
  const allowed = [...new Set(drawn.filter((run) => run.drop_limit != null).flatMap((run) => ofRole(run, "float").map((point) => point.quality - (run.higher ? 1 : -1) * run.drop_limit)))];
  const shapes = [
    ...limits.map((limit) => ({ type: "line", x0: limit / size, x1: limit / size, yref: "paper", y0: 0, y1: 1, line: dash })),
    ...allowed.map((quality) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: quality, y1: quality, line: dash })),
  ];
  const shown = costs.map((value) => value / size);
  const ticks = isLog ? logTicks(Math.min(...shown), Math.max(...shown)) : [];
  const across = isLog ? { type: "log", tickvals: ticks, ticktext: ticks.map((tick) => String(tick)) } : {};
  const metric = escapeHtml(drawn[0].metric) + (drawn[0].higher ? "" : ", lower is better");
  const rows = drawn.flatMap((run) => ofRole(run, "float", "uniform", "front", "winner").map((point) => [
    runLabel(run), point.role, point.name, interval(point.quality, point.low, point.high), quantity(cost, point.costs[cost], 4),
  ]));
  return {
    traces,
    layout: figureLayout(430, {
      shapes,
      xaxis: axisStyle({ title: { text: costLabel(cost, symbol) }, showgrid: false, ...across }),
      yaxis: axisStyle({ title: { text: metric }, range: view }),
    }),
    said: `${drawn[0].metric} over ${data.costs[cost].name}: fronts of ${drawn.length} run${drawn.length > 1 ? "s" : ""} beside float and uniform networks`,
    columns: ["run", "role", "plan", `${drawn[0].metric} [95% interval]`, data.costs[cost].name],
    rows,
  };
}

/* Bits of a plan */

const FLOAT_ABOVE = 2; // bits that `float` is drawn above the most bits of an integer: 32 would dwarf the rest
const MOST_NUMBERS = 64; // layers whose bars can bear a number

function bitsFigure(run, most) {
  const { plan } = run;
  const network = data.networks[plan.network];
  const float = most + FLOAT_ABOVE;
  const height = (format) => (format == null ? 0 : plan.bits[format] ?? float);
  const places = network.names.map((_, place) => place);
  const traces = [];
  for (const [kind, colour] of Object.entries(data.kinds)) {
    const its = places.filter((place) => network.kinds[place] === kind);
    if (!its.length) continue;
    [[plan.weights, 1, 1], [plan.inputs, -1, 0.55]].forEach(([formats, sign, opacity], side) => {
      const isFloat = its.map((place) => formats[place] != null && plan.bits[formats[place]] == null);
      traces.push({
        type: "bar", name: kind, legendgroup: kind, showlegend: !side, x: its, y: its.map((place) => sign * height(formats[place])), width: 0.8,
        marker: { color: themed(colour), opacity, line: { width: 0 }, pattern: { shape: isFloat.map((is) => (is ? "/" : "")), fgcolor: cssColour("--paper"), fillmode: "overlay", solidity: 0.25 } },
        text: network.names.length <= MOST_NUMBERS ? its.map((place) => (formats[place] == null ? "" : plan.bits[formats[place]] ?? "f")) : undefined,
        textposition: "outside", textangle: 0, textfont: { size: 10.5 }, cliponaxis: false, constraintext: "none",
        hoverinfo: "text", hovertext: its.map((place) => `<b>${escapeHtml(network.names[place])}</b><br>${kind}<br>weight ${plan.weights[place]}, input ${plan.inputs[place] ?? "not quantized"}`),
      });
    });
  }
  const marks = [2, 4, 6, 8, 12, 16].filter((bits) => bits <= most);
  const isUpright = network.short.join("").length >= 70;
  const every = Math.ceil(places.length / MOST_NUMBERS);
  const ticked = places.filter((place) => place % every === 0);
  return {
    traces,
    layout: figureLayout(300 + (isUpright ? 60 : 0), {
      barmode: "overlay", bargap: 0.2, margin: { l: 62, r: 22, t: 30, b: 30 },
      xaxis: axisStyle({ tickvals: ticked, ticktext: ticked.map((place) => escapeHtml(network.short[place])), tickangle: isUpright ? -55 : 0, automargin: true, range: [-0.6, places.length - 0.4], showgrid: false, ticks: "", tickfont: { size: 10.5 } }),
      yaxis: axisStyle({ title: { text: "← input bits    weight bits →" }, range: [-(float + 1.4), float + 1.4], tickvals: [...marks.map((bits) => -bits), 0, ...marks], ticktext: [...marks, 0, ...marks].map(String), zeroline: true, zerolinecolor: cssColour("--soft") }),
    }),
    said: `Weight and input bits of each of the ${places.length} layers of the plan of ${runLabel(run)}, ${significant(plan.totals.average_weight_bits)} bits per weight on average`,
    columns: ["layer", "kind", "weight", "input"],
    rows: places.map((place) => [network.names[place], network.kinds[place], plan.weights[place], plan.inputs[place] ?? "–"]),
  };
}

/* Where the cost goes */

function costFigure(runs, { cost: asked, stack }) {
  const cost = data.parts.includes(asked) ? asked : "weight_bytes";
  const drawn = runs.filter((run) => run.plan && restOf(run.plan, cost) !== null);
  if (!drawn.length) return null;
  const [symbol, size] = unitFor(data.costs[cost].units, drawn.map((run) => run.plan.totals[cost]));
  const segments = new Map(); // key -> {kind, name, values by run}
  const put = (key, kind, name, place, value) => {
    if (!segments.has(key)) segments.set(key, { kind, name, values: drawn.map(() => 0) });
    segments.get(key).values[place] += value;
  };
  drawn.forEach((run, place) => {
    const network = data.networks[run.plan.network];
    network.names.forEach((name, layer) => {
      const kind = network.kinds[layer];
      put(stack === "kind" ? kind : `layer ${name}`, kind, stack === "kind" ? kind : name, place, run.plan.parts[cost][layer]);
    });
  });
  drawn.forEach((run, place) => put("", "", "not in layers", place, restOf(run.plan, cost)));
  const names = drawn.map((run, place) => `${escapeHtml(runLabel(run))}${"\u200b".repeat(place)}`); // told apart where two are called the same
  const listed = new Set();
  const traces = [...segments.entries()].filter(([key, { values }]) => key || values.some((value) => value > 0)).map(([, { kind, name, values }]) => {
    const isFirst = !listed.has(kind);
    listed.add(kind);
    return {
      type: "bar", orientation: "h", name: kind || name, legendgroup: kind || name, showlegend: isFirst, y: names, x: values.map((value) => value / size),
      marker: { color: themed(kind ? data.kinds[kind] : data.rest), line: { color: cssColour("--paper"), width: stack === "layer" ? 1 : 0 } },
      hoverinfo: "text", hovertext: values.map((value, place) => `<b>${escapeHtml(name)}</b><br>${quantity(cost, value)}, ${significant((100 * value) / drawn[place].plan.totals[cost])}% of ${quantity(cost, drawn[place].plan.totals[cost])}`),
    };
  });
  const tier = [...new Set(drawn.map((run) => run.plan.tiers[cost]).filter((each) => each && each !== "exact"))].join(", ");
  return {
    traces,
    layout: figureLayout(110 + 26 * drawn.length, {
      barmode: "stack", bargap: 0.3,
      xaxis: axisStyle({ title: { text: costLabel(cost, [symbol, tier].filter(Boolean).join(", ")) } }),
      yaxis: axisStyle({ autorange: "reversed", automargin: true, ticks: "", tickfont: { size: 11.5 } }),
    }),
    said: `${data.costs[cost].name} of ${drawn.length} plan${drawn.length > 1 ? "s" : ""}, stacked by ${stack === "kind" ? "kind of layer" : "layer"}`,
    columns: ["plan", ...[...segments.values()].map(({ name }) => name), "whole network"],
    rows: drawn.map((run, place) => [runLabel(run), ...[...segments.values()].map(({ values }) => quantity(cost, values[place])), quantity(cost, run.plan.totals[cost])]),
  };
}
