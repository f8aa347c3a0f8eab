/* How searches went */

const OVER = { evaluations: "evaluations", seconds: "seconds" };

function stepsOf(run, over, value, before) {
  const known = run.growth[value].map((each, place) => [run.growth[over][place], each]).filter(([, each]) => each != null);
  return { x: known.map(([x]) => x), y: known.map(([, y]) => y), before, holds: run.ended, of: run };
}

/* The two lines of an axis' title. */
function lossLines(kind) {
  return kind === "drop" ? ["best drop", "(selection split)"] : [`best ${data.costs[kind].name}`, "within the allowed drop"];
}

function volumeLines(primary) {
  return primary ? ["hypervolume", `over ${data.costs[primary].name}`] : ["hypervolume"];
}

/* What is drawn below one another: a row holds what compares. A cost is not known of a run that was killed early. */
function growthRows(runs) {
  const kinds = (of) => [...new Set(runs.map(of))].sort();
  const volumes = kinds((run) => run.primary).map((primary) => (
    { lines: volumeLines(primary), value: "hypervolume", before: 0, runs: runs.filter((run) => run.primary === primary), cost: null }
  ));
  const losses = kinds((run) => run.loss).filter(Boolean).map((kind) => (
    { lines: lossLines(kind), value: "best_loss", before: Infinity, runs: runs.filter((run) => run.loss === kind), cost: kind === "drop" ? null : kind }
  ));
  return [...volumes, ...losses].map((row) => ({ ...row, title: row.lines.join(" ") })).filter((row) =>
    row.runs.some((run) => run.growth[row.value].some((each) => each != null)),
  );
}

function bandTraces(arm, band, axes, size, write) {
  const style = armStyle(arm);
  const usual = { type: "scatter", name: legendName(arm), legendgroup: arm, legendrank: 1000 + data.arms.findIndex(({ name }) => name === arm), showlegend: false, ...axes };
  const traces = [];
  const from = band.high.findIndex(Number.isFinite);
  if (from >= 0 && band.count.some((count) => count > 1)) {
    const edge = { ...usual, x: band.x.slice(from), mode: "lines", hoverinfo: "skip", line: { shape: "hv", width: 0, color: style.color } };
    traces.push({ ...edge, y: band.high.slice(from).map((value) => value / size) });
    traces.push({ ...edge, y: band.low.slice(from).map((value) => value / size), fill: "tonexty", fillcolor: withAlpha(style.color, 0.16) });
  }
  traces.push({
    ...usual, x: band.x, y: band.median.map((value) => (Number.isFinite(value) ? value / size : null)),
    mode: band.x.length === 1 ? "markers" : "lines", line: { shape: "hv", width: 2, color: style.color, dash: style.dash }, marker: { color: style.color, symbol: style.symbol },
    hoverinfo: "text",
    hovertext: band.x.map((x, place) => `<b>${escapeHtml(arm)}</b> at ${significant(x)}<br>median ${write(band.median[place])}<br>quartiles ${write(band.low[place])}, ${write(band.high[place])}<br>${band.count[place]} run${band.count[place] > 1 ? "s" : ""}`),
  });
  return traces;
}

const EARLY = 0.25; // share of a search after which figures show it whole

function growthFigure(allRuns) {
  const runs = allRuns.filter((run) => run.growth);
  const rows = growthRows(runs);
  if (!rows.length) return null;
  const traces = [];
  const overs = Object.keys(OVER);
  const isStacked = narrow.matches && !document.documentElement.classList.contains("printing");
  const lines = rows.length * (isStacked ? overs.length : 1);
  const margin = { l: 84, r: 22, t: 36, b: 48 };
  const layout = figureLayout(70 + 235 * lines, { margin });
  const gap = (isStacked ? 76 : 40) / (layout.height - margin.t - margin.b);
  const height = (1 - gap * (lines - 1)) / lines;
  const table = [];
  const named = new Set();
  rows.forEach((row, below) => {
    const found = overs.map((over) =>
      byArm(row.runs)
        .map(([arm, its]) => [arm, its.map((run) => stepsOf(run, over, row.value, row.before)).filter(({ x }) => x.length)])
        .filter(([, steps]) => steps.length)
        .map(([arm, steps]) => [arm, quartileBand(steps)])
    );
    const values = found.flat().flatMap(([, band]) => [...band.median, ...band.low, ...band.high]).filter(Number.isFinite);
    const [symbol, size] = row.cost ? unitFor(data.costs[row.cost].units, values) : ["", 1];
    const write = (value) => (!Number.isFinite(value) ? "none yet" : row.cost ? quantity(row.cost, value) : significant(value));
    const ends = found[0].flatMap(([, { x, low, median, high }]) =>
      [x.findIndex((at) => at >= EARLY * x[x.length - 1]), x.length - 1].flatMap((at) => [low[at], median[at], high[at]]),
    );
    const range = nearRange(ends.map((value) => value / size), values.map((value) => value / size));
    overs.forEach((over, beside) => {
      const number = 2 * below + beside + 1;
      const [x, y] = [`x${number > 1 ? number : ""}`, `y${number > 1 ? number : ""}`];
      for (const [arm, band] of found[beside]) {
        for (const trace of bandTraces(arm, band, { xaxis: x, yaxis: y }, size, write)) traces.push(trace);
        if (!named.has(arm)) traces[traces.length - 1].showlegend = true;
        named.add(arm);
        const last = band.x.length - 1;
        if (last >= 0) table.push([row.title, over, arm, significant(band.x[last]), write(band.median[last]), write(band.low[last]), write(band.high[last]), String(band.count[last])]);
      }
      const line = isStacked ? overs.length * below + beside : below;
      const top = 1 - line * (height + gap);
      const across = isStacked ? [0, 1] : beside ? [0.53, 1] : [0, 0.47];
      layout[x.replace("x", "xaxis")] = axisStyle({
        anchor: y, domain: across, rangemode: "tozero", showgrid: false,
        ...(isStacked || line === lines - 1 ? { title: { text: OVER[over], standoff: 6 } } : {}),
      });
      const [first, ...others] = row.lines;
      const title = [first + (symbol ? ` (${symbol})` : ""), ...others].join("<br>");
      layout[y.replace("y", "yaxis")] = axisStyle({
        anchor: x, domain: [Math.max(top - height, 0), top], range: range ?? undefined, automargin: true,
        ...(beside && !isStacked ? { showticklabels: false } : { title: { text: title, font: { size: 13 }, standoff: 8 } }),
      });
    });
  });
  return {
    traces,
    layout,
    said: `${new Intl.ListFormat("en-GB").format(rows.map((row) => row.title))} over evaluations and over seconds, median and quartiles of ${named.size} ${named.size === 1 ? "strategy" : "strategies"}`,
    columns: ["what", "over", "strategy", "at", "median", "lower quartile", "upper quartile", "runs"],
    rows: table,
  };
}
