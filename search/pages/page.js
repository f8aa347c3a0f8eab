"use strict";
/*
What the pages share. It runs at the end of the document, before the scripts of the block `scripts`.

<table class="sortable">         The header cells in its <thead> become buttons that sort the body's rows: first rising,
                                 then falling, stable, with `aria-sort` on the header cell. A cell sorts by its
                                 `data-value` where it has one (wherever a unit is shown: "900 B" and "1.2 KiB"), else
                                 by its text; a column sorts by number where all that is known in it are numbers.
                                 Empty cells and those with "–" come last both ways. `<th data-sort="none">` stays plain.
                                 For a table made later, call makeSortable(table).
<input data-filter="TABLE_ID">   Shows the rows of that table in which every word typed occurs; an element with
                                 `data-count="TABLE_ID"` says how many those are.
<div class="scroll">             Can be reached and scrolled with the keyboard as long as what it holds is wider.
bitplanTheme()                   Gives every plotly figure (`.js-plotly-plot`) of the page the colours of the scheme,
                                 light or dark. Called on load, when the scheme changes and for printing; call it after
                                 drawing a figure, or changing one's data. Colours that search.figures.style.DARK names,
                                 white among them, become what they are on dark paper; others stay.
*/

const dark = matchMedia("(prefers-color-scheme: dark)");

function cssColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/* Tables */

const collator = new Intl.Collator("en", { numeric: true });

function cellValue(cell) {
  const text = (cell?.dataset.value ?? cell?.textContent ?? "").trim();
  return text === "–" || text === "nan" ? "" : text;
}

function asNumber(text) {
  const plain = text.replaceAll(",", "").replace("−", "-").replace(/\s*[×%]$/, "");
  return plain === "" ? NaN : Number(plain);
}

function sortTable(table, column, direction) {
  const sign = direction === "descending" ? -1 : 1;
  for (const body of table.tBodies) {
    const rows = [...body.rows].map((row) => ({ row, text: cellValue(row.cells[column]) }));
    const known = rows.filter(({ text }) => text !== "");
    const numeric = known.every(({ text }) => !Number.isNaN(asNumber(text)));
    const compare = numeric ? (a, b) => asNumber(a.text) - asNumber(b.text) : (a, b) => collator.compare(a.text, b.text);
    known.sort((a, b) => sign * compare(a, b));
    body.append(...[...known, ...rows.filter(({ text }) => text === "")].map(({ row }) => row));
  }
}

function makeSortable(table) {
  const heads = [...(table.tHead?.rows[table.tHead.rows.length - 1]?.cells ?? [])];
  for (const head of heads) {
    if (head.dataset.sort === "none" || head.textContent.trim() === "") continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const direction = head.ariaSort === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.ariaSort = direction;
      sortTable(table, head.cellIndex, direction);
    });
  }
}

function filterTable(input) {
  const rows = [...document.getElementById(input.dataset.filter).tBodies].flatMap((body) => [...body.rows]);
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of rows) {
    const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
  const shown = rows.filter((row) => !row.hidden).length;
  for (const count of document.querySelectorAll(`[data-count="${input.dataset.filter}"]`))
    count.textContent = words.length ? `${shown} of ${rows.length} shown` : `${rows.length} in all`;
}

function markScrollers() {
  for (const box of document.querySelectorAll(".scroll")) {
    const label = box.dataset.label ?? box.querySelector("caption")?.textContent.trim();
    if (box.scrollWidth > box.clientWidth + 1) {
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      if (label) box.setAttribute("aria-label", `${label}, scrolls sideways`);
    } else for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name);
  }
}

/* Figures */

const painted = new WeakMap(); // of every trace: the colours as given and as painted, by where they stand

const COLOURED = ["marker.color", "marker.line.color", "line.color", "textfont.color", "error_x.color", "error_y.color", "fillcolor"];

function themed(colour) {
  if (Array.isArray(colour)) return colour.map(themed);
  if (typeof colour !== "string") return colour;
  const hex = colour === "white" ? "ffffff" : colour.replace("#", "").toLowerCase();
  return (/^[0-9a-f]{6}$/.test(hex) && cssColour(`--c-${hex}`)) || colour;
}

function paintTrace(trace) {
  const known = painted.get(trace) ?? {};
  painted.set(trace, known);
  for (const path of COLOURED) {
    const steps = path.split(".");
    const last = steps.pop();
    const owner = steps.reduce((at, step) => at?.[step], trace);
    const now = owner?.[last];
    if (now === undefined) continue;
    if (known[path]?.painted !== now) known[path] = { given: now };
    known[path].painted = owner[last] = themed(known[path].given);
  }
}

function bitplanTheme() {
  const [ink, soft, line, grid, paper] = ["--ink", "--soft", "--line", "--grid", "--paper"].map(cssColour);
  const clear = "rgba(0,0,0,0)";
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const layout = plot.layout;
    Object.assign(layout, { paper_bgcolor: clear, plot_bgcolor: clear });
    layout.font = { ...layout.font, color: ink };
    layout.hoverlabel = { ...layout.hoverlabel, bgcolor: paper, bordercolor: line, font: { color: ink } };
    layout.modebar = { ...layout.modebar, bgcolor: clear, color: soft, activecolor: ink };
    layout.legend = { ...layout.legend, bgcolor: clear };
    for (const [name, axis] of Object.entries(layout))
      if (/^[xy]axis\d*$/.test(name)) Object.assign(axis, { gridcolor: grid, linecolor: soft, tickcolor: soft, zerolinecolor: line });
    for (const shape of layout.shapes ?? []) paintTrace(shape);
    plot.data.forEach(paintTrace);
    for (const svg of plot.querySelectorAll(".main-svg")) svg.ariaHidden = "true"; // what it shows is said beside it
    Plotly.redraw(plot);
  }
}

/* Printing: light, with all details open, figures as wide as the paper */

const PRINTED_WIDTH = 680; // CSS pixels that fit between the margins of A4 and of US letter
const closed = [];

function beforePrinting() {
  document.documentElement.classList.add("printing");
  for (const details of document.querySelectorAll("details:not([open])")) {
    closed.push(details);
    details.open = true;
  }
  for (const plot of document.querySelectorAll(".js-plotly-plot")) plot.layout.width = PRINTED_WIDTH;
  bitplanTheme();
}

function afterPrinting() {
  document.documentElement.classList.remove("printing");
  for (const details of closed.splice(0)) details.open = false;
  for (const plot of document.querySelectorAll(".js-plotly-plot")) delete plot.layout.width;
  bitplanTheme();
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
for (const input of document.querySelectorAll("input[data-filter]")) {
  input.addEventListener("input", () => filterTable(input));
  filterTable(input);
}
markScrollers();
addEventListener("resize", markScrollers);
dark.addEventListener("change", bitplanTheme);
addEventListener("beforeprint", beforePrinting);
addEventListener("afterprint", afterPrinting);
bitplanTheme();
