"""Pages in headless Chromium: what they say on the console and ask of the network, and whether all can use them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import Browser, Page, sync_playwright

Scheme = Literal["light", "dark"]

INSIDE = ("data:", "blob:", "about:")
"""Addresses that ask nobody for anything."""

CONTRAST = 4.5
"""What WCAG 2.2 asks of text at level AA; of large text, 3."""

ON_CELLS = ["rgb(34, 34, 34)", "rgb(254, 254, 254)"]
"""Fills of the numbers that drawings write on coloured cells (`style.text_on`), which a test of their own measures."""


@dataclass
class Opened:
    """A page in the browser, and everything that was noticed since it was opened.

    Attributes:
        page: The page of Playwright.
        messages: What was written to the console as warning or error, as pairs of its address and text.
        errors: Exceptions that no script caught.
        requests: The address of everything that was asked for.
    """

    page: Page
    messages: list[tuple[str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, path: Path) -> None:
        """Opens a file and waits until its figures are drawn."""
        self.page.goto(path.resolve().as_uri())
        self.page.wait_for_function("[...document.querySelectorAll('.js-plotly-plot')].every(plot => plot._fullLayout)")

    def assert_quiet(self) -> None:
        """No warning, no error, and no request but that of the page itself."""
        assert not self.messages
        assert not self.errors
        own = self.page.url.partition("#")[0]
        assert [url for url in self.requests if not url.startswith(INSIDE) and url != own] == []

    def accessibility_faults(self) -> list[str]:
        """What keeps people with screen readers, keyboards or weak eyes from the page; a line for each fault."""
        found: list[str] = self.page.evaluate(FAULTS)
        return [*found, *self.contrast_faults()]

    def contrast_faults(self) -> list[str]:
        """Texts that stand out too little from what is behind them."""
        found: list[dict[str, Any]] = self.page.evaluate(TEXT_COLOURS, ON_CELLS)
        return [
            f"{item['text']!r}: {contrast(item['ink'], item['paper']):.2f}"
            for item in found
            if contrast(item["ink"], item["paper"]) < (3 if item["large"] else CONTRAST)
        ]

    def tab_stops(self, most: int = 500) -> list[str]:
        """Presses Tab from the top of the page until the focus leaves it; returns a name for each that took it."""
        stops = []
        self.page.evaluate(
            "document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')"
        )
        for _ in range(most):
            self.page.keyboard.press("Tab")
            name = self.page.evaluate(FOCUSED)
            if name is None or (stops and name == stops[0]):
                return stops
            stops.append(name)
        raise AssertionError(f"the focus never left the page: {stops[-5:]}")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium, the system's own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(
    browser: Browser,
    scheme: Scheme = "light",
    width: int = 1280,
    height: int = 900,
    levels: tuple[str, ...] = ("warning", "error"),
) -> Iterator[Opened]:
    """An empty page that remembers what happens on it.

    Args:
        browser: The browser.
        scheme: What the reader prefers.
        width: CSS pixels across.
        height: CSS pixels down.
        levels: Levels of console messages that are remembered.
    """
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
    page = context.new_page()
    seen = Opened(page)
    page.on("console", lambda m: seen.messages.append((m.location["url"], m.text)) if m.type in levels else None)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("request", lambda request: seen.requests.append(request.url))
    try:
        yield seen
    finally:
        context.close()


def luminance(colour: tuple[float, float, float]) -> float:
    """Relative luminance of a colour in [0, 255], as WCAG counts it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """Contrast ratio of two colours, as WCAG counts it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


FOCUSED = """() => {
  const at = document.activeElement;
  if (!at || at === document.body) return null;
  const label = at.labels?.[0]?.textContent ?? at.getAttribute("aria-label") ?? at.textContent;
  const box = at.closest("table, nav, section")?.id ?? "";
  return [at.tagName.toLowerCase(), at.id || at.getAttribute("href") || box, label.trim().slice(0, 60)].join("|");
}"""

FAULTS = """() => {
  const faults = [];
  const say = (what, at) => faults.push(`${what}: ${at.outerHTML.slice(0, 100)}`);
  const name = (at) => (at.getAttribute("aria-label") ?? at.getAttribute("alt") ?? at.textContent).trim();
  const isShown = (at) => at.checkVisibility();
  if (!document.documentElement.lang) faults.push("the page says no language");
  if (!document.title) faults.push("the page has no title");
  for (const [selector, count] of [["main", 1], ["h1", 1]])
    if (document.querySelectorAll(selector).length !== count) faults.push(`not one ${selector}`);
  let level = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    const own = Number(heading.tagName[1]);
    if (own > level + 1) say("a heading skips a level", heading);
    if (!name(heading)) say("an empty heading", heading);
    level = own;
  }
  for (const image of document.querySelectorAll("img"))
    if (!image.hasAttribute("alt")) say("an image without alt", image);
  for (const image of document.querySelectorAll("[role=img]")) if (!name(image)) say("a picture without name", image);
  for (const svg of document.querySelectorAll("svg"))
    if (svg.checkVisibility({ visibilityProperty: true }) && !svg.closest("[role=img], [aria-hidden=true], button"))
      say("a drawing without name", svg);
  for (const input of document.querySelectorAll("input, select, textarea"))
    if (!input.labels.length && !input.getAttribute("aria-label")) say("an input without label", input);
  for (const button of document.querySelectorAll("button, a[href], summary"))
    if (isShown(button) && !name(button)) say("a control without name", button);
  for (const table of document.querySelectorAll("table")) {
    if (!table.caption?.textContent.trim() && !table.getAttribute("aria-label")) say("a table without caption", table);
    for (const head of table.querySelectorAll("th")) {
      if (!head.scope) say("a header without scope", head);
      if (!name(head)) say("an empty header", head);
    }
    const widths = new Set([...table.rows].map((row) => [...row.cells].reduce((sum, cell) => sum + cell.colSpan, 0)));
    if (widths.size > 1) say("rows of different length", table);
  }
  const ids = [...document.querySelectorAll("[id]")].map((at) => at.id);
  for (const id of new Set(ids.filter((id, place) => ids.indexOf(id) !== place)))
    faults.push(`two elements are called ${id}`);
  for (const at of document.querySelectorAll("[aria-labelledby], [aria-describedby], label[for], a[href^='#']")) {
    const given = ["aria-labelledby", "aria-describedby", "for"].map((name) => at.getAttribute(name));
    const named = given.find((ids) => ids) ?? at.getAttribute("href").slice(1);
    for (const id of named.split(" ")) if (!document.getElementById(id)) say(`nothing is called ${id}`, at);
  }
  for (const box of document.querySelectorAll("*")) {
    const scrolls = ["auto", "scroll"].includes(getComputedStyle(box).overflowX);
    if (!scrolls || box.scrollWidth <= box.clientWidth + 1 || !isShown(box)) continue;
    if (box.tabIndex < 0 && !box.querySelector("a[href], button, input")) say("scrolls, but not by keyboard", box);
  }
  if (document.documentElement.scrollWidth > innerWidth + 1) faults.push("the page itself scrolls sideways");
  return faults;
}"""

TEXT_COLOURS = """(ON_CELLS) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const over = (colour, paper) => {
    canvas.fillStyle = `rgb(${paper})`; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const behind = (at) => {
    const above = at.parentElement ? behind(at.parentElement) : [255, 255, 255];
    return over(getComputedStyle(at).backgroundColor, above);
  };
  const faint = (at) => at ? Number(getComputedStyle(at).opacity) * faint(at.parentElement) : 1;
  const found = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const at = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || at.closest("script, style, noscript, .visually-hidden, .skip") || !at.checkVisibility()) continue;
    const style = getComputedStyle(at), paper = behind(at);
    const given = at instanceof SVGElement ? style.fill : style.color;
    if (ON_CELLS.includes(given)) continue;
    const parts = over(given, paper).map((part, i) => paper[i] + (part - paper[i]) * faint(at));
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    found.set(`${parts}|${paper}|${large}`, { text: text.slice(0, 40), ink: parts, paper, large });
  }
  return [...found.values()];
}"""
