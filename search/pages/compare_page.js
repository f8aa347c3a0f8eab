/* The page: what is shown, and everything that follows from it */

const runs = data.runs;
const tableRows = [...document.querySelectorAll("#runs tbody tr")]; // in the order of `runs` until they are sorted
const boxes = [...document.querySelectorAll("#controls input[type=checkbox]")];
const selects = () => [...document.querySelectorAll("main select")];
const chosen = new Map(); // what was picked in each select, by its id
let shown = runs;

/* What is shown, as the address has it: `-strategy=random` for what is filtered out, and what was picked by its id */

function writeAddress() {
  const words = new URLSearchParams();
  for (const box of boxes) if (!box.checked) words.append(`-${box.name}`, box.value);
  for (const [id, value] of chosen) words.append(id, value);
  history.replaceState(null, "", `${words}` ? `#${words}` : location.pathname + location.search);
}

function readAddress() {
  const text = location.hash.slice(1);
  if (text && !text.includes("=")) return false; // a heading of the page
  const words = new URLSearchParams(text);
  for (const box of boxes) box.checked = !words.getAll(`-${box.name}`).includes(box.value);
  chosen.clear();
  for (const select of selects()) if (words.has(select.id)) chosen.set(select.id, words.get(select.id));
  return true;
}

function offered(select) {
  return [...select.options].map((option) => option.value);
}

function applyChosen(select, usual) {
  const wanted = [chosen.get(select.id), usual].find((value) => offered(select).includes(value));
  if (wanted !== undefined) select.value = wanted;
  const printed = select.parentElement.querySelector(".printed");
  if (printed) printed.textContent = select.selectedOptions[0]?.textContent ?? "";
}

/* Filters */

function filterRuns() {
  const out = new Map();
  for (const box of boxes) if (!box.checked) out.set(box.name, (out.get(box.name) ?? new Set()).add(box.value));
  shown = runs.filter((run) => [...out].every(([key, values]) => !values.has(run.filter[key])));
  const visible = new Set(shown);
  tableRows.forEach((row, place) => (row.hidden = !visible.has(runs[place])));
  document.getElementById("shown").textContent = `${shown.length} of ${runs.length} run${runs.length === 1 ? "" : "s"} shown`;
  document.getElementById("reset").hidden = !out.size;
  document.getElementById("printed-filters").textContent = out.size
    ? `${shown.length} of ${runs.length} runs; left out: ${[...out].map(([key, values]) => `${key} ${[...values].join(", ")}`).join("; ")}`
    : "";
}

/* Panels: drawn when they come into sight, and again when what they show has changed */

function setting(id) {
  return document.getElementById(id)?.value;
}

const FIGURES = {
  front: (its) => frontFigure(its, { cost: setting("cost") }),
  growth: (its) => growthFigure(its),
  bits: (its, panel) => {
    const run = runs.find((each) => each.id === panel.figure.querySelector("select").value);
    const inTask = shown.filter((each) => each.plan && each.filter.task === panel.task);
    return run && its.includes(run) ? bitsFigure(run, Math.max(...inTask.flatMap((each) => Object.values(each.plan.bits)))) : null;
  },
  cost: (its, panel) => costFigure(its, { cost: setting("cost"), stack: panel.figure.closest("section").querySelector("select").value }),
};
const HAS = {
  front: (run) => run.front.length > 0,
  growth: (run) => run.growth !== null,
  bits: (run) => run.plan !== null,
  cost: (run) => run.plan !== null,
};
const NOTHING = "None of the runs shown is far enough to draw this.";

const panels = [...document.querySelectorAll("[data-panel]")].map((figure) => ({
  figure,
  kind: figure.dataset.panel,
  task: figure.dataset.task,
  place: figure.dataset.place,
  box: figure.querySelector(".plot"),
  details: figure.querySelector("details"),
  isStale: true,
  isNear: false,
  built: null,
}));

function runsOf(panel) {
  return shown.filter((run) => run.filter.task === panel.task && run.filter.device === panel.place && HAS[panel.kind](run));
}

function drawPanel(panel) {
  if (!panel.isStale || panel.figure.hidden) return;
  panel.isStale = false;
  panel.built = FIGURES[panel.kind](runsOf(panel), panel);
  panel.details.hidden = !panel.built;
  if (!panel.built) {
    Plotly.purge(panel.box);
    panel.box.style.height = "";
    panel.box.innerHTML = `<p class="nothing">${NOTHING}</p>`;
    panel.box.removeAttribute("role");
    return;
  }
  panel.box.querySelector(".nothing")?.remove();
  panel.box.setAttribute("role", "img");
  panel.box.setAttribute("aria-label", `${panel.place}: ${panel.built.said}. The numbers are in the table below.`);
  const { traces, layout } = panel.built;
  panel.box.style.height = `${layout.height}px`; // which plotly asks for when it fits a new width
  if (document.documentElement.classList.contains("printing")) layout.width = PRINTED_WIDTH;
  panel.fitted = { usual: layout.height };
  const isNew = !panel.box.on; // a figure that was purged has lost what listens to it
  Plotly.react(panel.box, traces, layout, { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] });
  fitHeight(panel);
  if (isNew) panel.box.on("plotly_afterplot", () => fitHeight(panel));
  if (panel.details.open) fillNumbers(panel);
}

/* Gives a figure the height that its legend takes more than one row's: plotly would take it from the axes. */
function fitHeight({ box, fitted }) {
  const { width, height, margin, _size: size } = box._fullLayout;
  const wanted = Math.round(fitted.usual + size.t - margin.t + size.b - margin.b);
  if (fitted.width === width && wanted <= fitted.height) return; // else two heights might take turns
  Object.assign(fitted, { width, height: wanted });
  box.style.height = `${wanted}px`;
  if (wanted === height) return;
  box.layout.height = wanted; // not by `Plotly.relayout`, which would hold on to the width as well
  Plotly.redraw(box);
}

function fillNumbers(panel) {
  const { columns, rows, said } = panel.built;
  panel.details.querySelector("div").replaceChildren(numbersTable(`${panel.place}: ${said}`, columns, rows));
  markScrollers();
}

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function numbersTable(caption, columns, rows) {
  const head = element("thead", {}, element("tr", {}, ...columns.map((column, place) => element("th", place ? { scope: "col" } : { scope: "col", class: "text" }, column))));
  const body = element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((cell, place) => (place ? element("td", {}, cell) : element("th", { scope: "row", class: "text" }, cell))))));
  return element("table", {}, element("caption", {}, caption), head, body);
}

const sight = new IntersectionObserver(
  (changes) => {
    for (const { target, isIntersecting } of changes) {
      const panel = panels.find(({ figure }) => figure === target);
      panel.isNear = isIntersecting;
    }
    drawNear();
  },
  { rootMargin: "200px 0px" },
);

/* Selects of plans */

function planOption(run) {
  const { plan } = run;
  const words = `${runLabel(run)}: ${run.metric} ${decimal(plan.quality, 4)}, ${quantity("weight_bytes", plan.totals.weight_bytes)}`;
  return element("option", { value: run.id }, `${words}${run.best ? " (best)" : ""}`);
}

function byRank(some) {
  return some.filter((run) => run.plan).sort((a, b) => a.rank - b.rank);
}

function fillBitsSelect(panel) {
  const select = panel.figure.querySelector("select");
  const its = byRank(runsOf(panel));
  select.replaceChildren(...its.map(planOption));
  applyChosen(select, its[0]?.id);
}

/* All at once */

function update() {
  filterRuns();
  for (const select of document.querySelectorAll("#cost, [data-choice=stack]")) applyChosen(select);
  for (const panel of panels) {
    const its = shown.filter((run) => run.filter.task === panel.task && run.filter.device === panel.place);
    panel.figure.hidden = !its.length;
    panel.isStale = true;
    if (panel.kind === "bits") fillBitsSelect(panel);
  }
  for (const section of document.querySelectorAll("main section[data-task]")) section.hidden = !shown.some((run) => run.filter.task === section.dataset.task);
  differences.forEach(fillDifference);
  drawNear();
}

function redraw(...which) {
  for (const panel of panels) if (!which.length || which.includes(panel.kind)) panel.isStale = true;
  drawNear();
}

let waiting = 0;

/* Draws what is in sight one by one, so that the page answers in between. */
function drawNear() {
  clearTimeout(waiting);
  const next = panels.find((panel) => panel.isNear && panel.isStale && !panel.figure.hidden);
  if (!next) return;
  waiting = setTimeout(() => {
    drawPanel(next);
    drawNear();
  });
}

/* The table as CSV, as it is sorted and filtered */

const CSV = ["run", ...Object.keys(runs[0].filter), "metric", "quality", "float", "drop", "drop_low", "drop_high", "average_weight_bits", "effective_bits", "weight_bytes", "latency_s", "latency_tier", "energy_j", "energy_tier", "activation_bytes", "bit_ops", "evaluations", "search_seconds", "hypervolume", "primary_cost", "digest", "reason", "path"];

function csvRow(run) {
  const { plan } = run;
  const known = {
    ...run, ...run.filter, ...plan?.totals, run: run.name, search_seconds: run.seconds, primary_cost: run.primary, digest: plan?.digest,
    latency_tier: plan?.tiers.latency_s, energy_tier: plan?.tiers.energy_j,
    ...Object.fromEntries(["quality", "float", "drop", "drop_low", "drop_high"].map((name) => [name, plan?.[name]])),
  };
  return CSV.map((name) => known[name]);
}

function runsAsCsv() {
  const order = [...document.querySelector("#runs tbody").rows].filter((row) => !row.hidden);
  return asCsv([CSV, ...order.map((row) => csvRow(runs[tableRows.indexOf(row)]))]);
}

document.getElementById("copy").addEventListener("click", async () => {
  const said = document.getElementById("copied");
  try {
    await navigator.clipboard.writeText(runsAsCsv());
    said.textContent = `${shown.length} runs copied`;
  } catch {
    said.textContent = "The browser does not let this page copy; download the file instead.";
  }
});
document.getElementById("download").addEventListener("click", () => {
  const link = element("a", { href: URL.createObjectURL(new Blob([runsAsCsv()], { type: "text/csv" })), download: "runs.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  document.getElementById("copied").textContent = `${shown.length} runs written to runs.csv`;
});

/* What people do */

/* The address holds what is shown, so that a link within the page must not take its place. */
function goTo(event) {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  const target = document.getElementById(event.currentTarget.hash.slice(1));
  target.tabIndex = -1;
  target.focus({ preventScroll: true });
  target.scrollIntoView();
}

for (const link of document.querySelectorAll('a[href^="#"]')) link.addEventListener("click", goTo);
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
for (const box of boxes)
  box.addEventListener("change", () => {
    writeAddress();
    update();
  });
for (const button of document.querySelectorAll("[data-toggle]"))
  button.addEventListener("click", () => {
    const its = boxes.filter((box) => box.name === button.dataset.toggle);
    const check = its.some((box) => !box.checked);
    its.forEach((box) => (box.checked = check));
    writeAddress();
    update();
  });
document.getElementById("reset").addEventListener("click", () => {
  boxes.forEach((box) => (box.checked = true));
  writeAddress();
  update();
  boxes[0]?.focus();
});
document.querySelector("main").addEventListener("change", ({ target }) => {
  if (target.tagName !== "SELECT") return;
  chosen.set(target.id, target.value);
  writeAddress();
  applyChosen(target);
  const difference = differences.find(({ selects: its }) => its.includes(target));
  if (difference) showDifference(difference);
  else redraw(...(target.id === "cost" ? ["front", "cost"] : [target.dataset.choice === "stack" ? "cost" : "bits"]));
});
for (const panel of panels) {
  panel.details.addEventListener("toggle", () => panel.details.open && panel.built && fillNumbers(panel));
  sight.observe(panel.figure);
}
addEventListener("hashchange", () => readAddress() && update());
dark.addEventListener("change", () => redraw());
narrow.addEventListener("change", () => redraw("front", "growth"));
addEventListener("beforeprint", () => panels.forEach((panel) => { panel.isStale = true; drawPanel(panel); }));
addEventListener("afterprint", () => redraw());
readAddress();
update();
