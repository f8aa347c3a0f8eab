"""MLflow's own pages, served from a real sweep's database, in headless Chromium: what a reviewer of a sweep sees."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import INSIDE, Browser, Opened, chromium, opened
from playwright.sync_api import Page

pytestmark = pytest.mark.system

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
PATIENCE_S = 90.0

MLFLOWS_OWN = (
    # asks for the user of a server with accounts; this one has none
    re.compile(r"Failed to load resource: the server responded with a status of 404 .*/users/current"),
    # the runs table calls its grid in an old way
    re.compile(r"AG Grid: since v27\.1, `\w+` is deprecated"),
    # the parallel coordinates are drawn without a graphics card
    re.compile(r"GL Driver Message .* GPU stall due to ReadPixels"),
)
"""What MLflow 3.17 writes to the console whatever is logged."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two searches, mirrored to MLflow in SQLite while they ran."""
    root = tmp_path_factory.mktemp("sweep")
    overrides = ["strategy=solver,random", "strategy.evaluations=5", "budget.size_ratio=0.14", "quantizer.repair=none"]
    command = [sys.executable, "-m", "search", "-m", "task=digits", "hardware=zen5", *overrides]
    folders = [f"run_root={root}/runs", f"run_dir={root}/runs/sweep"]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, timeout=400, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning: cannot use MLflow" not in done.stderr
    return root / "runs"


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[str]:
    """The address of an MLflow server on the sweep's database."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = ["--backend-store-uri", f"sqlite:///{runs}/mlflow.db", "--artifacts-destination", str(runs / "mlartifacts")]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(port)]
    address, log = f"http://127.0.0.1:{port}", runs / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--workers", "1"],
            env=os.environ | QUIET,
            cwd=runs,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_for(f"{address}/health", process, log)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=PATIENCE_S)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer from MLflow:\n{log.read_text()}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def seen(browser: Browser, server: str) -> Iterator[Opened]:
    """An empty page; at the end, nothing on it may have gone wrong but what always does, or have left the machine."""
    with opened(browser, width=2200, height=1000) as seen:  # the grid leaves columns out that do not fit
        seen.page.set_default_timeout(1000 * PATIENCE_S)
        yield seen
        said = [f"{text} {url}" for url, text in seen.messages]
        assert [line for line in said if not any(known.search(line) for known in MLFLOWS_OWN)] == []
        assert seen.errors == []
        here = urlsplit(server).netloc
        assert [url for url in seen.requests if not url.startswith(INSIDE) and urlsplit(url).netloc != here] == []


def show_runs(page: Page, server: str) -> None:
    """Opens the table of runs of the experiment, from the list of experiments."""
    page.goto(f"{server}/#/experiments")
    home = page.get_by_role("link", name="bitplan/digits").first.get_attribute("href")
    assert home is not None
    page.goto(f"{server}/{home.partition('?')[0]}/runs")
    page.get_by_role("link", name="digits zen5 solver").wait_for()


def show_artifacts(page: Page, server: str) -> None:
    """Opens the artifact pane of the solver's search."""
    show_runs(page, server)
    page.get_by_role("link", name="digits zen5 solver").click()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("report.html", exact=True).first.wait_for()


def test_the_table_of_runs_names_searches_and_shows_chosen_metrics(seen: Opened, server: str, tmp_path: Path) -> None:
    page = seen.page
    show_runs(page, server)
    names = page.get_by_role("link", name=re.compile("^digits zen5"))
    assert sorted(names.all_inner_texts()) == [
        f"digits zen5 {name} size_ratio=0.14 seed 0" for name in ("random", "solver")
    ]
    page.get_by_role("button", name="Columns").click()
    for metric in ("quality", "size_ratio"):
        page.get_by_placeholder("Search columns").fill(metric)
        page.locator("[class*=treenode]", has_text=re.compile(f"^{metric}$")).locator("[class*=title]").click()
    page.keyboard.press("Escape")
    page.get_by_role("columnheader", name="quality", exact=True).first.wait_for()
    cells = page.locator("[role=gridcell]").all_inner_texts()
    assert len([cell for cell in cells if re.fullmatch(r"0\.9\d+", cell)]) == 2, "the qualities of two searches"
    page.screenshot(path=tmp_path / "runs.png")


def test_the_page_of_a_run_leads_to_its_front(seen: Opened, server: str, tmp_path: Path) -> None:
    page = seen.page
    show_runs(page, server)
    page.get_by_role("link", name="digits zen5 solver").click()
    page.get_by_text("hypervolume").first.wait_for()
    page.screenshot(path=tmp_path / "run.png")
    page.get_by_role("link", name=re.compile("^winner, trial")).first.click()
    page.get_by_role("heading", name=re.compile("^winner, trial")).first.wait_for()


def test_the_artifact_pane_renders_report_pictures_and_tables(seen: Opened, server: str, tmp_path: Path) -> None:
    page = seen.page
    show_artifacts(page, server)
    page.get_by_text("report.html", exact=True).first.click()
    report = page.frame_locator("iframe")
    report.get_by_role("heading", name="digits on zen5").wait_for()
    report.locator("#front-plot .main-svg").first.wait_for()
    report.get_by_label("Show layers with").fill("stages.1 conv2")
    assert report.locator("#layer-rows tbody tr:visible").count() == 1
    page.screenshot(path=tmp_path / "report.png")

    page.get_by_text("figures", exact=True).click()
    page.get_by_text("front.png", exact=True).click()
    page.wait_for_function(
        "[...document.images].some((image) => image.src.startsWith('blob:') && image.naturalWidth > 1000)"
    )
    page.screenshot(path=tmp_path / "picture.png")

    page.get_by_text("tables", exact=True).click()
    page.get_by_text("front.json", exact=True).click()
    page.get_by_text("View as table").wait_for()
    page.get_by_text("uniform int4/uint4").first.wait_for()
    page.screenshot(path=tmp_path / "table.png")


def test_two_searches_are_compared(seen: Opened, server: str, tmp_path: Path) -> None:
    page = seen.page
    show_runs(page, server)
    for box in page.locator("[role=row]:has(a[href*='/runs/']) input[type=checkbox]:visible").all():
        box.check()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_role("heading", name="Comparing 2 Runs").wait_for()
    page.get_by_text("Parallel Coordinates Plot").wait_for()
    page.locator(".js-plotly-plot").first.wait_for()
    page.screenshot(path=tmp_path / "compare.png")
