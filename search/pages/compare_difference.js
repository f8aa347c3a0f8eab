/* Difference of two plans */

const differences = [...document.querySelectorAll('[data-part="difference"]')].map((section) => ({
  section,
  task: section.parentElement.dataset.task,
  selects: [...section.querySelectorAll("select")],
  result: section.querySelector("[data-result]"),
}));

/* The best run of the first device, and that of another device with another plan; else of another strategy, or seed. */
function usualPair(some) {
  const firstDevice = some.map((run) => run.filter.device).sort()[0];
  const ranked = byRank(some).sort((one, other) => (other.filter.device === firstDevice) - (one.filter.device === firstDevice));
  const [best, ...others] = ranked;
  const isOther = (run) => run.plan.digest !== best.plan.digest;
  for (const key of ["device", "strategy", "seed"]) {
    const firsts = new Map();
    for (const run of others) if (run.filter[key] !== best.filter[key] && !firsts.has(run.filter[key])) firsts.set(run.filter[key], run);
    const partner = [...firsts.keys()].sort().map((value) => firsts.get(value)).find(isOther);
    if (partner) return [best.id, partner.id];
  }
  return [best.id, (others.find(isOther) ?? others[0]).id];
}

function fillDifference(difference) {
  const its = shown.filter((run) => run.filter.task === difference.task && run.plan);
  difference.section.hidden = its.length < 2;
  if (its.length < 2) return;
  const devices = [...new Set(its.map((run) => run.filter.device))];
  const usual = usualPair(its);
  difference.selects.forEach((select, place) => {
    select.replaceChildren(
      ...devices.map((device) => element("optgroup", { label: device }, ...byRank(its.filter((run) => run.filter.device === device)).map(planOption))),
    );
    applyChosen(select, usual[place]);
  });
  showDifference(difference);
}

const DIFFERENCES = [["weight_bytes", "size"], ["latency_s", "latency"], ["energy_j", "energy"], ["bit_ops", "bit operations"]];

function planName(run) {
  return `${runLabel(run)} on ${run.filter.device}`;
}

function formatPair([weight, input]) {
  return input === null ? weight : `${weight}/${input}`;
}

function change(cost, value) {
  return signed(value, (size) => quantity(cost, size));
}

function showDifference({ selects: [selectA, selectB], result }) {
  const [a, b] = [selectA, selectB].map(({ value }) => runs.find((run) => run.id === value));
  if (a.plan.network !== b.plan.network) {
    result.replaceChildren(element("p", { role: "status" }, "These plans are about different layers, and cannot be held side by side."));
    return;
  }
  const costs = DIFFERENCES.map(([cost]) => cost);
  const found = planDifference(a.plan, b.plan, data.networks[a.plan.network], costs);
  const changed = found.layers.filter((layer) => layer.changed).length;
  const drop = ({ plan }) => interval(plan.drop, plan.drop_low, plan.drop_high, true);
  const totals = [...DIFFERENCES, ["average_weight_bits", "average weight bits"]].filter(([cost]) => a.plan.totals[cost] != null && b.plan.totals[cost] != null);
  const better = (value) => (value === 0 ? "" : value < 0 ? "better" : "worse");
  const mark = (text, kind) => (kind ? element("span", { class: kind }, text, element("span", { class: "visually-hidden" }, ` (${kind})`)) : text);
  const summary = numbersTable(
    `${planName(a)} (A) against ${planName(b)} (B)`,
    [element("span", { class: "visually-hidden" }, "cost"), "A", "B", "B − A"],
    [
      [`${a.metric} (report split)`, decimal(a.plan.quality, 4), decimal(b.plan.quality, 4), signed(found.quality, (size) => decimal(size, 4))],
      ["drop from float [95% interval]", drop(a), drop(b), signed(found.drop, (size) => decimal(size, 4))],
      ...totals.map(([cost, name]) => {
        const value = b.plan.totals[cost] - a.plan.totals[cost];
        const ratio = a.plan.totals[cost] ? ` (× ${significant(b.plan.totals[cost] / a.plan.totals[cost])})` : "";
        return [name, quantity(cost, a.plan.totals[cost], 4), quantity(cost, b.plan.totals[cost], 4), mark(change(cost, value) + ratio, better(value))];
      }),
    ],
  );
  const known = DIFFERENCES.filter(([cost]) => found.layers.some((layer) => layer.differences[cost] !== null));
  const head = element("thead", {}, element("tr", {}, ...["layer", "kind", "A", "B"].map((name) => element("th", { scope: "col", class: "text" }, name)), ...known.map(([, name]) => element("th", { scope: "col" }, name))));
  const cells = (differencesOf) => known.map(([cost]) => element("td", { "data-value": differencesOf[cost] ?? "" }, change(cost, differencesOf[cost])));
  const rows = found.layers.map((layer) =>
    element(
      "tr",
      layer.changed ? { class: "changed" } : {},
      element("th", { scope: "row", class: "text" }, layer.name),
      element("td", { class: "text" }, layer.kind),
      element("td", { class: "text code" }, formatPair(layer.a)),
      element("td", { class: "text code" }, layer.changed ? formatPair(layer.b) : "same"),
      ...cells(layer.differences),
    ),
  );
  const foot = element(
    "tfoot",
    {},
    ...[["not in layers", found.rest], ["whole network", found.whole]].map(([name, values]) =>
      element("tr", {}, element("th", { scope: "row", class: "text", colspan: "4" }, name), ...cells(values)),
    ),
  );
  const table = element("table", { class: "difference sortable" }, element("caption", {}, "Layer by layer, B − A"), head, element("tbody", {}, ...rows), foot);
  makeSortable(table);
  const notes = [`${changed} of ${found.layers.length} layers differ.`];
  if (a.filter.device !== b.filter.device) notes.push("The plans are for different devices, so that latencies and energies differ by device as well as by format.");
  notes.push("Each drop has its interval against float; that of the difference is not known.");
  result.replaceChildren(
    element("p", { role: "status" }, notes.join(" ")),
    element("div", { class: "scroll" }, summary),
    element("div", { class: "scroll tall" }, table),
  );
  markScrollers();
}
