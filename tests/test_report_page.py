"""The report of a real search in headless Chromium, as its readers open it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from browser import Browser, Opened, Scheme, chromium, opened

from hwmodels import Roofline
from search.budget import Budget
from search.job import Job
from search.report import SECTIONS, write_report
from search.run import search
from search.rundir import RunDirectory
from search.strategies.solver import Solver
from search.tasks.digits import Digits

pytestmark = pytest.mark.system


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished search with its report."""
    job = Job(Digits(), Roofline("zen5"), Solver(8), Budget(size_ratio=0.14), tmp_path_factory.mktemp("run"))
    found = search(job).run
    write_report(found)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def loaded(browser: Browser, run: RunDirectory) -> Iterator[Opened]:
    with opened(browser) as seen:
        seen.open(run.file("report.html"))
        yield seen


@pytest.fixture
def report(loaded: Opened) -> Iterator[Opened]:
    """The report, as the test before left it: opening five megabytes takes longer than using them."""
    yield loaded
    loaded.assert_quiet()


@pytest.mark.parametrize("scheme", get_args(Scheme))
def test_everybody_can_read_the_report(browser: Browser, run: RunDirectory, scheme: Scheme, tmp_path: Path) -> None:
    with opened(browser, scheme) as seen:
        seen.open(run.file("report.html"))
        seen.page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
        assert seen.accessibility_faults() == []
        paper = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]
        glare = "[...document.querySelectorAll('img, .main-svg')].map((at) => getComputedStyle(at).backgroundColor)"
        assert set(seen.page.evaluate(glare)) <= {"rgba(0, 0, 0, 0)", paper}
        seen.assert_quiet()


def test_the_report_shows_what_the_run_found(report: Opened, run: RunDirectory) -> None:
    page, plan, front = report.page, run.plan(), run.table("front.csv")
    assert plan is not None
    assert front is not None
    assert page.locator("h1").inner_text() == "digits on zen5"
    assert [heading.get_attribute("id") for heading in page.locator("main h2").all()] == list(SECTIONS)
    layers = page.locator("#layer-rows tbody tr")
    assert layers.count() == len(plan.layers)
    assert page.locator("table.roles tbody tr").count() == len(front)
    traces = page.evaluate("document.getElementById('front-plot').data.map((trace) => trace.name)")
    assert {"front", "winner", "float and uniform"} <= set(traces)
    curves = page.evaluate("document.getElementById('convergence-plot').data.map((trace) => trace.name)")
    assert curves.count("hypervolume") == 2, "over evaluations and over seconds"
    caption = page.locator("section[aria-labelledby=convergence] figcaption").inner_text()
    assert "a drop as large as the float quality, at the float network's cost or twice the 8-bit network's" in caption
    for words in ("Bits of 10 layers", "The largest shares of each cost", "Divergence from the float outputs"):
        assert page.get_by_role("img", name=re.compile(words)).count() == 1
    assert page.get_by_role("figure", name=re.compile("The winner has accuracy 0.9")).count() == 1
    assert "uniform int4/uint4" in page.locator("section[aria-labelledby=uniform] p").first.inner_text()


def test_the_filter_of_layers_keeps_what_is_typed(report: Opened) -> None:
    page = report.page
    page.get_by_label("Show layers with").fill("stages.1 CONV2")
    shown = page.locator("#layer-rows tbody tr:visible")
    assert [row.locator("th").inner_text() for row in shown.all()] == ["stages.1.0.conv2"]
    assert page.locator("[data-count=layer-rows]").inner_text() == "1 of 10 shown"
    page.get_by_label("Show layers with").fill("")
    assert shown.count() == 10


def column(report: Opened, number: int) -> list[str]:
    return report.page.locator(f"#layer-rows tbody tr > :nth-child({number})").all_inner_texts()


def test_headers_sort_by_number_and_by_name(report: Opened, run: RunDirectory) -> None:
    plan, page = run.plan(), report.page
    assert plan is not None
    names = [layer.name for layer in plan.layers]
    energies = {layer.name: layer.energy_j for layer in plan.layers}
    head = page.locator("#layer-rows thead th", has_text="energy")
    head.get_by_role("button").click()
    assert column(report, 1) == sorted(names, key=lambda name: energies[name])  # nJ and µJ stand in one column
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").press("Enter")
    assert column(report, 1) == sorted(names, key=lambda name: energies[name], reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    page.locator("#layer-rows thead th").first.get_by_role("button").press("Space")
    assert column(report, 1) == sorted(names)
    assert head.get_attribute("aria-sort") is None
    page.locator("#layer-rows thead th", has_text="computes in").get_by_role("button").click()
    kinds = {layer.name: layer.compute for layer in plan.layers}
    assert column(report, 1) == sorted(sorted(names), key=lambda name: kinds[name]), "equals stay in order"


def test_what_is_not_known_comes_last_both_ways(report: Opened) -> None:
    page = report.page
    table = page.locator("table.roles")
    head = table.locator("thead th", has_text="predicted loss").get_by_role("button")
    for _ in range(2):
        head.click()
        cells = table.locator("tbody tr > :last-child").all_inner_texts()
        assert cells[-4:] == ["–"] * 4, "the float network and the uniform baselines"
        assert "–" not in cells[:-4]


def test_the_keyboard_reaches_every_control(report: Opened) -> None:
    stops = report.tab_stops()
    assert stops[0] == "a|#content|Skip to the content"
    shown = report.page.locator("main button:visible, main input:visible, main a[href]:visible, main summary:visible")
    controls = shown.count() + len(SECTIONS) + 1
    assert len([stop for stop in stops if not stop.startswith(("div", "main"))]) == controls
    report.page.keyboard.press("Tab")
    assert report.page.locator(".skip").evaluate("at => at.getBoundingClientRect().top") >= 0, "is seen with the focus"
    report.page.keyboard.press("Enter")
    assert report.page.evaluate("document.activeElement.id") == "content"


def test_figures_follow_the_scheme(report: Opened) -> None:
    page = report.page

    def colours() -> list[str]:
        return page.evaluate(
            """() => {
              const plot = document.getElementById("front-plot");
              const label = document.querySelector(".card > svg text");
              const winner = plot.data.find((trace) => trace.name === "winner");
              return [plot.layout.font.color, winner.marker.color, getComputedStyle(label).fill];
            }"""
        )

    def changed(from_: str) -> None:
        page.wait_for_function(f"document.getElementById('front-plot').layout.font.color !== '{from_}'")

    light = colours()
    page.emulate_media(color_scheme="dark")
    changed(light[0])
    dark = colours()
    assert not set(light) & set(dark)
    page.emulate_media(color_scheme="light")
    changed(dark[0])
    assert colours() == light


def test_the_report_fits_a_phone(browser: Browser, run: RunDirectory, tmp_path: Path) -> None:
    with opened(browser, width=390, height=800) as seen:
        seen.open(run.file("report.html"))
        seen.page.screenshot(path=tmp_path / "phone.png", full_page=True)
        assert seen.accessibility_faults() == []  # among them: that the page itself scrolls sideways
        seen.assert_quiet()


def test_the_report_prints_light_and_whole(browser: Browser, run: RunDirectory, tmp_path: Path) -> None:
    with opened(browser, "dark") as seen:
        seen.open(run.file("report.html"))
        printing = """() => new Promise((done) => addEventListener("beforeprint", () => done(
          [...document.querySelectorAll(".js-plotly-plot")].map((plot) => [plot.layout.font.color, plot.layout.width]))
        ))"""
        asked = f"window.printed = ({printing})()"
        seen.page.evaluate(f"() => {{ {asked}; }}")
        file = tmp_path / "report.pdf"
        seen.page.pdf(path=file, format="A4")
        assert file.read_bytes().startswith(b"%PDF")
        assert len(re.findall(rb"/Type\s*/Page\b", file.read_bytes())) > 3
        assert seen.page.evaluate("window.printed") == [["#1f2328", 680]] * 2
        ink = "document.getElementById('front-plot').layout.font.color"
        assert seen.page.evaluate(ink) == "#e6e8eb", "and the screen is dark again"
        seen.page.emulate_media(media="print")
        assert not seen.page.locator(".filter").first.is_visible()
        overflow = "getComputedStyle(document.getElementById('layer-rows').parentElement).overflowX"
        assert seen.page.evaluate(overflow) == "visible", "wide tables are not cut"
        seen.assert_quiet()
