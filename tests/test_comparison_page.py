"""The page of a comparison in Chromium: its numbers, its figures, its filters, and the keyboard alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from search.comparison.page import write_comparison
from search.rundir import RunDirectory
from search.units import significant
from tests.compared import failed, finished, many_arms, sweep

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.system

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(sweep(tmp_path_factory.mktemp("sweep"))).page


@pytest.fixture(scope="module")
def shared(browser: Browser, written: Path) -> Iterator[Page]:
    yield from opened(browser, written)


@pytest.fixture
def page(shared: Page) -> Page:
    """The page as it is at first; loading it takes seconds, hence once for all tests."""
    shared.evaluate("location.hash = ''; scrollTo(0, 0)")
    shared.evaluate("document.activeElement.blur()")
    shared.wait_for_function("shown.length === runs.length && !chosen.size")
    return shared


def opened(browser: Browser, path: Path, **options: Any) -> Iterator[Page]:
    """The page, which in the end must have said nothing on the console and asked the network for nothing."""
    context = browser.new_context(viewport={"width": 1300, "height": 900}, **options)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"{error}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    page.wait_for_timeout(50)
    context.close()
    assert said == []
    assert all(url.partition("#")[0] == path.as_uri() or url.startswith(("blob:", "data:")) for url in asked)


def visible_rows(page: Page) -> list[str]:
    return page.locator("#runs tbody tr:visible").all_inner_texts()


def traces(page: Page, kind: str, task: str = "digits", place: str = "zen5") -> list[dict[str, Any]]:
    """What a figure draws, once it was scrolled to."""
    box = f'[data-panel="{kind}"][data-task="{task}"][data-place="{place}"] .plot'
    page.locator(box).scroll_into_view_if_needed()
    page.wait_for_selector(f"{box}.js-plotly-plot .main-svg")
    page.wait_for_function("panels.every((panel) => !panel.isNear || !panel.isStale || panel.figure.hidden)")
    script = "box => JSON.stringify(box.data.map(({x, y, name, showlegend}) => ({x, y, name, showlegend})))"
    return list(json.loads(page.locator(box).evaluate(script)))


def test_quartiles_are_those_of_numpy(page: Page) -> None:
    rng = np.random.default_rng(0)
    for count in range(1, 9):
        values = rng.integers(0, 50, count) / 7
        for q in (0, 0.25, 0.5, 0.75, 1):
            found = page.evaluate("([values, q]) => quantile(values, q)", [values.tolist(), q])
            assert found == pytest.approx(np.quantile(values, q), rel=1e-12)
    assert page.evaluate("quantile([1, 2, Infinity], 0.5)") == 2
    assert page.evaluate("String(quantile([1, Infinity], 0.25))") == "Infinity", "a quarter of the way to nothing yet"


def test_numbers_are_rounded_as_python_rounds_them(page: Page) -> None:
    """Among them ties, which are halves of a power of two, and decimals that look like ties but are none."""
    rng = np.random.default_rng(5)
    values = [1002.5, 1003.5, 0.90625, -0.03125, 2.675, 1.005, 0.125, 9.995, 999.5, 1e-7, 1e21, -12345.5, 0.0, 512.0]
    values += (rng.integers(1, 4000, 300) / 2 ** rng.integers(0, 12, 300)).tolist()
    values += (10 ** rng.uniform(-9, 12, 300)).tolist()
    for digits in (1, 3, 4):
        found = page.evaluate("([values, digits]) => values.map((each) => significant(each, digits))", [values, digits])
        assert found == [significant(value, digits) for value in values]
    found = page.evaluate("values => values.map((each) => decimal(each, 4))", values)
    assert found == [f"{value:.4f}".replace("-", "−") for value in values]


def test_hypervolumes_over_different_costs_have_rows_of_their_own(page: Page) -> None:
    script = """known => growthRows(known.map(([primary, loss]) => (
      {primary, loss, growth: {hypervolume: [0.5], best_loss: [0.1]}}
    ))).map((row) => [row.title, row.runs.map((run) => run.primary)])"""
    known = [["weight_bytes", "drop"], ["latency_s", "drop"], ["weight_bytes", "weight_bytes"], ["", ""]]
    assert page.evaluate(script, known) == [
        ["hypervolume", [""]],
        ["hypervolume over latency", ["latency_s"]],
        ["hypervolume over stored size", ["weight_bytes", "weight_bytes"]],
        ["best drop (selection split)", ["weight_bytes", "latency_s"]],
        ["best stored size within the allowed drop", ["weight_bytes"]],
    ]


def test_the_band_of_steps_in_closed_form(page: Page) -> None:
    steps = [
        {"x": [1, 3], "y": [1, 3], "before": 0, "holds": True},
        {"x": [2, 4], "y": [2, 6], "before": 0, "holds": True},
        {"x": [1, 2], "y": [4, 5], "before": 0, "holds": False},  # cut short after 2
    ]
    band = page.evaluate("steps => quartileBand(steps)", steps)
    assert band["x"] == [1, 2, 3, 4]
    assert band["median"] == [1, 2, 2.5, 4.5]  # of 1 0 4; 1 2 5; then 3 2; 3 6
    assert band["low"] == [0.5, 1.5, 2.25, 3.75]
    assert band["high"] == [2.5, 3.5, 2.75, 5.25]
    assert band["count"] == [3, 3, 2, 2]
    steps[1]["holds"] = False
    steps[1] |= {"x": [2], "y": [2]}
    band = page.evaluate("steps => quartileBand(steps)", steps)
    assert band["x"] == [1, 2], "a third of the seeds is not enough to go on"


def test_the_band_is_that_of_a_brute_force_on_long_searches(page: Page) -> None:
    rng = np.random.default_rng(3)
    steps = []
    for _ in range(5):
        x = np.cumsum(rng.integers(1, 5, 150)) / 4
        steps.append({"x": x.tolist(), "y": rng.random(150).tolist(), "before": 0, "holds": True})
    band = page.evaluate("steps => quartileBand(steps)", steps)
    assert 125 <= len(band["x"]) <= 251
    assert band["x"][-1] == max(each["x"][-1] for each in steps)
    for at, x in enumerate(band["x"]):
        values = [dict(zip([0, *each["x"]], [0, *each["y"]], strict=True)) for each in steps]
        held = [each[max(place for place in each if place <= x)] for each in values]
        np.testing.assert_allclose(
            [band[name][at] for name in ("low", "median", "high")], np.quantile(held, [0.25, 0.5, 0.75])
        )


def test_what_no_point_beats(page: Page) -> None:
    rng = np.random.default_rng(1)
    points = rng.integers(0, 8, (30, 2)).tolist()
    for higher in (True, False):
        sign = 1 if higher else -1
        script = "([points, higher]) => [...undominated(points.map(([x, y]) => ({x, y})), higher)]"
        found = {tuple(points[place]) for place in page.evaluate(script, [points, higher])}
        beaten = {
            (x, y) for x, y in points if any(a <= x and sign * b >= sign * y and (a, b) != (x, y) for a, b in points)
        }
        assert found == {(x, y) for x, y in points} - beaten


def test_differences_add_up(page: Page) -> None:
    """Of the plans of `tests.compared`: 10 bytes a bit in every layer, and 7 beside them."""
    script = """() => {
      const [a, b] = ["random", "solver"].map((arm) => runs.find((run) => run.filter.strategy === arm && run.plan));
      return planDifference(a.plan, b.plan, data.networks[a.plan.network], ["weight_bytes", "energy_j"]);
    }"""
    found = page.evaluate(script)
    assert [layer["differences"]["weight_bytes"] for layer in found["layers"]] == [-10, 0]
    assert [layer["changed"] for layer in found["layers"]] == [True, True], "the input of the second"
    assert (found["rest"]["weight_bytes"], found["whole"]["weight_bytes"]) == (0, -10)
    assert found["whole"]["energy_j"] is None
    assert found["quality"] == pytest.approx(0.01)
    assert found["drop"] == pytest.approx(-0.01)


def test_figures_show_the_runs(page: Page) -> None:
    drawn = traces(page, "front")
    assert [trace["name"] for trace in drawn] == ["random", "random", "solver", "solver", "float and uniform"]
    assert sorted(drawn[2]["x"][:2]) == [77.0, 127.0], "the front of the first seed of solver"
    growth = traces(page, "growth")
    assert [trace["name"] for trace in growth if trace["showlegend"]] == ["random", "solver"]
    assert growth[2]["x"] == [1, 2.5, 3.5]
    assert growth[2]["y"] == [0.5, 0.6, 0.7], "the median of seeds alike, where it changes"
    bits = traces(page, "bits")
    assert [trace["y"] for trace in bits] == [[3], [-8], [4], [-8]], "the best plan, that of solver"
    assert [sum(trace["x"][:1]) for trace in traces(page, "cost")] == [40, 40, 7], "of random's first seed"


def test_a_filter_acts_on_everything_at_once(page: Page) -> None:
    rows, drawn = len(visible_rows(page)), len(traces(page, "front"))
    page.get_by_label("solver", exact=False).first.uncheck()
    assert page.locator("#shown").inner_text() == "6 of 12 runs shown"
    assert (rows, len(visible_rows(page))) == (12, 6)
    assert len(traces(page, "front")) == drawn - 2
    assert "solver" not in {trace["name"] for trace in traces(page, "growth")}
    assert not page.locator("#task-2").is_visible(), "nothing of the other task is left"
    assert [trace["y"] for trace in traces(page, "bits")] == [[4], [-8], [4], [-4]], "the best of what is left"
    page.reload()
    assert page.locator("#shown").inner_text() == "6 of 12 runs shown", "the address has it"
    page.locator("#reset").click()
    assert len(visible_rows(page)) == 12
    assert page.evaluate("location.hash") == ""


@pytest.mark.parametrize("key", ["", "Enter"])
def test_a_link_within_the_page_leaves_the_filters_in_the_address(page: Page, key: str) -> None:
    page.locator('input[name="strategy"][value="random"]').uncheck()
    address = page.evaluate("location.hash")
    assert address == "#-strategy=random"
    link = page.locator("nav a", has_text="text")
    if key:
        link.focus()
        page.keyboard.press(key)
    else:
        link.click()
    assert page.evaluate("document.activeElement.id") == "task-2"
    page.wait_for_function("Math.abs(document.activeElement.getBoundingClientRect().top) < innerHeight / 2")
    assert page.evaluate("location.hash") == address
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('section[data-task]').dataset.task") == "text"
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    page.reload()
    assert page.evaluate("location.hash") == address
    assert page.locator("#shown").inner_text() == "8 of 12 runs shown"
    page.locator("#reset").click()


def test_the_cost_of_figures_can_be_chosen(page: Page) -> None:
    before = traces(page, "front")[2]["x"]
    page.get_by_label("Cost in figures").select_option("latency_s")
    after = traces(page, "front")[2]["x"]
    assert sorted(after[:2]) == pytest.approx([size / 1e5 * 1e3 for size in sorted(before[:2])]), "milliseconds"
    assert "latency" in (page.locator('[data-panel="front"] .plot').first.get_attribute("aria-label") or "")
    assert page.evaluate("location.hash") == "#cost=latency_s"


def test_the_table_sorts_and_leaves_as_csv(page: Page) -> None:
    page.get_by_role("button", name="quality").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert page.locator('#runs th[aria-sort="descending"]').inner_text().startswith("quality")
    page.locator('input[name="task"][value="text"]').uncheck()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
    assert len(rows) == 10
    qualities = [float(row["quality"]) for row in rows if row["quality"]]
    assert qualities == sorted(qualities, reverse=True)
    assert {row["reason"] for row in rows if row["status"] == "failed"} == {"the budget cannot be met"}


def test_two_plans_are_held_side_by_side_by_keyboard(page: Page) -> None:
    section = page.locator('[data-part="difference"]').first
    said = "solver, seed 1 on storage (A) against random, seed 1 on storage (B)"
    assert said in section.inner_text(), "the best plan is the same on both devices"
    assert "2 of 2 layers differ" in section.inner_text()
    second = page.get_by_label("Plan B").first
    second.focus()
    page.keyboard.press("ArrowUp")
    assert second.evaluate("select => select.selectedOptions[0].textContent").startswith("solver, seed 1")
    assert "0 of 2 layers differ" in section.inner_text()
    page.keyboard.press("ArrowDown")
    assert section.locator("th[scope=col]").evaluate_all("all => all.every((head) => head.textContent)")
    cells = [row.split("\t") for row in section.locator("table.difference tr").all_inner_texts()]
    assert [cell.strip() for cell in cells[1][:5]] == ["conv", "pointwise", "int3/uint8", "int4/uint8", "+10.0 B"]
    assert [row[1].strip() for row in cells[3:]] == ["0 B", "+10.0 B"], "beside the layers, and in all"


def test_the_numbers_of_a_figure_are_a_table(page: Page) -> None:
    traces(page, "bits")
    panel = page.locator('[data-panel="bits"][data-task="digits"][data-place="zen5"]')
    panel.locator("summary").focus()
    page.keyboard.press("Enter")
    panel.locator("table").wait_for()
    rows = [row.split("\t") for row in panel.locator("tbody tr").all_inner_texts()]
    assert rows == [["conv", "pointwise", "int3", "uint8"], ["fc", "linear", "int4", "uint8"]]


def test_the_numbers_of_a_front_give_float_no_interval(page: Page) -> None:
    traces(page, "front")
    panel = page.locator('[data-panel="front"][data-task="digits"][data-place="zen5"]')
    panel.locator("summary").click()
    rows = [row.split("\t") for row in panel.locator("tbody tr").all_inner_texts()]
    assert {row[3].strip() for row in rows if row[1].strip() == "float"} == {"0.9600"}
    assert all(" [0." in row[3] for row in rows if row[1].strip() != "float")
    hovers = page.evaluate(
        "runs.filter((run) => run.front.length).map((run) => hoverOf(run, run.front[0]).split('<br>')[2])"
    )
    assert set(hovers) == {"accuracy 0.9600"}


def test_everything_that_acts_is_reached_with_tab(page: Page) -> None:
    reached = set()
    page.locator(".skip").focus()
    for _ in range(100):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(at => at.id || at.name && at.name + '=' + at.value || at.textContent)(document.activeElement)"
            )
        )
    assert {"cost", "task=digits", "strategy=solver", "copy", "download"} <= reached
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline not in ("none", ""), "what has the focus is seen to have it"


def test_a_narrow_window_scrolls_only_what_is_wide(page: Page) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    traces(page, "front")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    box = page.locator('[data-panel="front"] .plot').first
    drawn = box.evaluate(
        "box => [box, box.querySelector('.main-svg')].map((each) => each.getBoundingClientRect().bottom)"
    )
    assert drawn[1] <= drawn[0], "the figure stays within its frame"
    traces(page, "growth")
    growth = page.locator('[data-panel="growth"][data-place="zen5"] .plot').first
    titles = ".g-xtitle text, .g-x2title text, .g-x3title text, .g-x4title text"
    assert growth.locator(titles).all_text_contents() == ["evaluations", "seconds"] * 2, "one below the other"
    assert titles_on_ticks(growth) == []
    page.set_viewport_size({"width": 1300, "height": 900})


def test_titles_of_axes_stand_beside_their_ticks(page: Page) -> None:
    traces(page, "growth")
    assert titles_on_ticks(page.locator('[data-panel="growth"][data-place="zen5"] .plot').first) == []


def titles_on_ticks(figure: Locator) -> list[str]:
    """The titles of axes that lie over a label of a tick, or over another title, or outside of the figure."""
    script = """(figure) => {
      const box = (each) => each.getBoundingClientRect();
      const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
      const titles = [...figure.querySelectorAll("[class^=g-x] text, [class^=g-y] text")];
      const texts = [...titles, ...figure.querySelectorAll(".xtick text, .ytick text, [class*=tick] text")];
      const frame = box(figure);
      const isOut = ({ left, right }) => left < frame.left || right > frame.right;
      const bad = (title) => isOut(box(title)) || texts.some((text) => text !== title && meet(box(title), box(text)));
      if (titles.length < 3 || texts.length < 2 * titles.length) throw new Error("there are too few texts to judge");
      return titles.filter(bad).map((title) => title.textContent);
    }"""
    found: list[str] = figure.evaluate(script)
    return found


LEGENDS = """() => [...document.querySelectorAll(".js-plotly-plot")]
  .filter((box) => ["front", "growth"].includes(box.closest("figure").dataset.panel) && box.querySelector(".legend"))
  .map((box) => {
    const entries = [...box.querySelectorAll(".legend .traces")];
    const frame = box.querySelector(".legend .bg").getBoundingClientRect();
    const bars = [...box.querySelectorAll(".legend .scrollbar")];
    const isOut = (entry) => {
      const { right, bottom } = entry.querySelector("text").getBoundingClientRect();
      return right > frame.right + 1 || bottom > frame.bottom + 1;
    };
    return {
      entries: entries.length,
      cut: entries.filter(isOut).map((entry) => entry.textContent),
      scrolls: bars.some((bar) => Number(bar.getAttribute("height")) > 0),
      height: Math.round(box._fullLayout._size.h),
      isWhole: box.style.height === `${box._fullLayout.height}px`,
    };
  })"""


def test_figures_grow_with_their_legends(browser: Browser, tmp_path: Path) -> None:
    for page in opened(browser, write_comparison(many_arms(tmp_path)).page):
        place = "a device with a name of many words"
        for kind in ("front", "growth"):
            traces(page, kind, place=place)
        found = page.evaluate(LEGENDS)
        assert {each["entries"] for each in found} >= {12, 13}, "all arms, beside the stars of the front"
        assert max(each["height"] for each in found if each["entries"] == 13) >= 339, "as high as with one arm"
        for each in found:
            assert (each["cut"], each["scrolls"], each["isWhole"]) == ([], False, True)
        growth = page.locator('[data-panel="growth"] .plot').first
        assert growth.locator("[class^=g-y] text").count() == 4
        assert titles_on_ticks(growth) == []
        page.evaluate(f"addEventListener('beforeprint', () => {{ window.printed = ({LEGENDS})(); }})")
        page.pdf(format="A4")
        for each in page.evaluate("window.printed"):
            assert (each["cut"], each["scrolls"]) == ([], False)
            assert each["height"] > 300
        page.set_viewport_size({"width": 400, "height": 900})
        for kind in ("front", "growth"):
            traces(page, kind, place=place)
        page.wait_for_function("document.querySelector('[data-panel=front] .plot')._fullLayout.width < 400")
        for each in page.evaluate(LEGENDS):
            assert (each["scrolls"], each["height"] > 300) == (False, True)


def test_counts_of_filters_stay_in_one_line(browser: Browser, tmp_path: Path) -> None:
    for page in opened(browser, write_comparison(many_arms(tmp_path)).page):
        count = page.locator('input[name="device"][value^="a device"] ~ span').last
        assert count.inner_text().startswith("12")
        lines = """(at) => {
          const range = document.createRange();
          range.selectNodeContents(at.firstChild);
          return range.getClientRects().length;
        }"""
        assert count.evaluate(lines) == 1


def test_dark_and_print(browser: Browser, written: Path) -> None:
    for page in opened(browser, written, color_scheme="dark"):
        traces(page, "front")
        colour = "document.querySelector('[data-panel=front] .plot').layout.font.color"
        dark = page.evaluate(colour)
        assert dark == page.evaluate("cssColour('--ink')")
        count = "window.printed = document.querySelectorAll('.js-plotly-plot').length"
        page.evaluate(f"addEventListener('beforeprint', () => {{ {count} }})")
        assert len(page.pdf(format="A4")) > 50_000
        assert page.evaluate("window.printed") == page.locator("[data-panel]").count(), "all figures, seen or not"
        page.emulate_media(color_scheme="light")
        page.wait_for_function(f"{colour} !== '{dark}'")


@pytest.mark.parametrize("plans", [0, 1])
def test_few_runs_have_a_page_without_errors(browser: Browser, tmp_path: Path, plans: int) -> None:
    runs: list[RunDirectory] = [finished(tmp_path / "one")] if plans else [failed(tmp_path / "bad")]
    for page in opened(browser, write_comparison(runs).page):
        assert len(visible_rows(page)) == 1
        assert page.locator("fieldset").count() == 0
        assert not page.locator('[data-part="difference"]').is_visible()
        if plans:
            assert len(traces(page, "front")) == 3
        else:
            page.locator('[data-panel="cost"]').scroll_into_view_if_needed()
            page.locator('[data-panel="cost"] .nothing').wait_for()
