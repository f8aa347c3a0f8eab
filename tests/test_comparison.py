"""Comparing searches: what is read of runs, what is compared with what, and the page's data."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.cli import main
from search.comparison.data import growth_data, page_data
from search.comparison.gather import Growth, gather, read_run
from search.comparison.groups import sort_runs
from search.comparison.page import page_values, run_notes, write_comparison
from search.errors import BitplanError
from search.events import EventLog
from search.rundir import RunDirectory, find_runs
from tests.compared import FLOAT, failed, finished, sweep, unfinished, write_run


def test_a_finished_run_is_read_whole(tmp_path: Path) -> None:
    run = read_run(finished(tmp_path / "run", hardware="zen5", strategy="tpe", seed=3))
    assert (run.hardware, run.strategy, run.seed, run.status, run.problems) == ("zen5", "tpe", 3, "finished", ())
    assert [point.name for point in run.front] == ["float", "int8/uint8", "int4/uint8", "trial 0", "trial 3"]
    assert run.front[3].costs == {"latency_s": 127e-5, "weight_bytes": 127.0, "average_weight_bits": 6.35}
    assert run.growth is not None
    assert run.growth.hypervolume == (0.5, 0.5, 0.6, 0.7), "of the primary cost, which compares different fronts"
    assert run.hypervolume == 0.7
    assert run.kinds == {"conv": "pointwise", "fc": "linear"}


@pytest.mark.parametrize("higher", [True, False])
def test_intervals_of_the_front_are_the_float_quality_less_the_drop(tmp_path: Path, higher: bool) -> None:
    point = read_run(finished(tmp_path / "run", higher_is_better=higher)).front[3]
    drops = [FLOAT - 0.955 - 0.01, FLOAT - 0.955 + 0.01]  # as the front's table has them
    expected = sorted(FLOAT - drop if higher else FLOAT + drop for drop in drops)
    np.testing.assert_allclose([point.low, point.high], expected)


def test_the_float_network_has_no_interval_against_itself(tmp_path: Path) -> None:
    directory = finished(tmp_path / "run")
    points = {point.name: point for point in read_run(directory).front}
    assert math.isnan(points["float"].low)
    assert math.isnan(points["float"].high)
    assert all(point.low < point.quality < point.high for name, point in points.items() if name != "float")
    data = json.loads(page_data(sort_runs([read_run(directory)]), tmp_path))
    drawn = data["runs"][0]["front"][0]
    assert (drawn["role"], drawn["low"], drawn["high"]) == ("float", None, None)


def test_an_unfinished_run_tells_how_far_it_came(tmp_path: Path) -> None:
    run = read_run(unfinished(tmp_path / "run"))
    assert run.evaluations == 1 + 0.5 + 1 + 1  # the infeasible policy of tests.rundirs spends nothing
    assert run.plan is None
    assert run.growth is None
    assert run.front == ()
    assert run.seconds is None


def test_the_reason_is_the_last_error_of_the_log(tmp_path: Path) -> None:
    directory = failed(tmp_path / "run", "ConfigError: first")
    EventLog(directory.file("log.jsonl")).write("failed", error="MemoryError: second", kind="MemoryError")
    assert read_run(directory).reason == "second"
    directory.update(status="running")
    directory.claim()
    assert read_run(directory).reason == "", "it was started again"
    directory.release()


@pytest.mark.parametrize(
    ("event", "error", "kind", "reason"),
    [
        ("failed", "InfeasibleError: budget: too small", "InfeasibleError", "budget: too small"),
        ("failed", "budget: too small", "InfeasibleError", "budget: too small"),
        ("failed", "MemoryError: ", "MemoryError", "MemoryError"),
        ("interrupted", "KeyboardInterrupt: ", "KeyboardInterrupt", ""),
    ],
)
def test_a_reason_is_in_words_without_the_name_of_a_class(
    tmp_path: Path, event: str, error: str, kind: str, reason: str
) -> None:
    directory = write_run(tmp_path / "run", status=event)
    EventLog(directory.file("log.jsonl")).write(event, error=error, kind=kind)
    entry = sort_runs([read_run(directory)])[0]
    assert entry.run.reason == reason
    assert page_values([entry], (), 0, tmp_path)["rows"][0][-1] == event


def test_a_run_that_says_it_runs_was_killed_where_nobody_is_at_work(tmp_path: Path) -> None:
    directory = unfinished(tmp_path / "run")
    directory.claim()
    alive = sort_runs([read_run(directory)])[0]
    assert (alive.run.status, run_notes(alive)) == ("running", ["run is still running"])
    shutil.copytree(directory.path, tmp_path / "a copy")
    assert [run.status for run in gather(find_runs([tmp_path])).runs] == ["running"], "nobody is at work in the copy"
    directory.release()
    killed = sort_runs([read_run(directory)])[0]
    assert (killed.run.status, run_notes(killed)) == ("interrupted", ["run was interrupted: it was killed"])


@pytest.mark.parametrize("name", ["plan.json", "history.csv", "front.csv", "layers.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\x00", b'{"a": 1', b"[1]"])
def test_a_damaged_file_is_a_problem_of_its_run_alone(tmp_path: Path, name: str, content: bytes) -> None:
    directory = finished(tmp_path / "run")
    directory.file(name).write_bytes(content)
    run = read_run(directory)
    assert len(run.problems) == 1
    assert run.problems[0].startswith(f"{name} cannot be read (")
    entries = sort_runs([run, read_run(finished(tmp_path / "whole"))])
    assert [run_notes(entry) for entry in entries if entry.name == "run"] == [[f"run: {run.problems[0]}"]]
    assert page_values(entries, (), 0, tmp_path)["rows"], "it is shown"


def test_a_run_json_that_cannot_be_read_leaves_the_others(tmp_path: Path) -> None:
    finished(tmp_path / "whole")
    for name, text in (("cut", '{"task": '), ("empty", ""), ("other", "{}"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    found = gather(find_runs([tmp_path]))
    assert [run.path.name for run in found.runs] == ["whole"]
    assert [re.search(r"(\w+) is left out", note)[1] for note in found.notes] == ["cut", "empty", "list", "other"]  # type: ignore[index]


def test_copies_are_read_once_and_from_where_the_report_is(tmp_path: Path) -> None:
    run = finished(tmp_path / "m" / "run")
    shutil.copytree(run.path, tmp_path / "a" / "artifacts")
    (tmp_path / "a" / "artifacts" / "report.html").unlink()
    found = gather(find_runs([tmp_path]))
    assert [each.path for each in found.runs] == [tmp_path / "m" / "run"]
    assert found.copies == 1


def arms(*runs: RunDirectory) -> list[str]:
    """The arm of every run, in the order given."""
    entries = {entry.run.path: entry for entry in sort_runs([read_run(run) for run in runs])}
    return [entries[run.path].arm for run in runs]


def test_seeds_are_one_arm(tmp_path: Path) -> None:
    assert arms(*(finished(tmp_path / str(seed), strategy="tpe", seed=seed) for seed in (0, 1))) == ["tpe", "tpe"]


def test_settings_that_differ_part_arms_and_name_them(tmp_path: Path) -> None:
    few = finished(tmp_path / "few", strategy="tpe")
    many = finished(tmp_path / "many", strategy="tpe", config={"strategy": {"evaluations": 9}})
    small = finished(tmp_path / "small", strategy="tpe", budget={"size_ratio": 0.1})
    other = finished(tmp_path / "other", strategy="random", hardware="npu", config={"strategy": {"evaluations": 9}})
    assert arms(few, many, small, other) == [
        "tpe, evaluations=4, size ≤ 0.14 × float",
        "tpe, evaluations=9, size ≤ 0.14 × float",
        "tpe, evaluations=4, size ≤ 0.1 × float",
        "random",
    ]


def test_arms_that_differ_in_many_settings_have_different_names(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / str(i), strategy="tpe", config={"quantizer": {name: i for name in "abcd"} | {"e": i // 2}})
        for i in range(3)
    ]
    names = arms(*runs)
    assert len(set(names)) == 3
    assert names[0] == "tpe, quantizer.a=0, quantizer.b=0, quantizer.c=0, 2 more"


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ([["int4", "int8"], ["int8"]], ["[int4,int8]", "[int8]"]),
        ([[f"int{i}" for i in range(2, 9)], ["int8"]], ["[int2,int3,…,int7,int8]", "[int8]"]),
        (["a" * 24, "b" * 30], ["a" * 24, "b" * 11 + "…" + "b" * 11]),
        (
            ["a" * 12 + "-" + "a" * 12, "a" * 12 + "+" + "a" * 12],
            ["a" * 12 + "-" + "a" * 12, "a" * 12 + "+" + "a" * 12],
        ),
        ([1, 2.5], ["1", "2.5"]),
    ],
)
def test_long_values_lose_their_middle_where_that_keeps_arms_apart(
    tmp_path: Path, values: list[Any], written: list[str]
) -> None:
    runs = [
        finished(tmp_path / str(i), strategy="tpe", config={"space": {"weight": value}})
        for i, value in enumerate(values)
    ]
    assert arms(*runs) == [f"tpe, space.weight={text}" for text in written]


def test_settings_that_not_all_runs_have_part_no_arms(tmp_path: Path) -> None:
    new = [{"strategy": {"batch": 1, "study": None}}, {"strategy": {"batch": 1}}, {}]
    runs = [finished(tmp_path / str(i), strategy="tpe", config=config) for i, config in enumerate(new)]
    assert arms(*(run for run in runs)) == ["tpe"] * 3
    other = finished(tmp_path / "other", strategy="tpe", config={"strategy": {"batch": 8, "study": "mine"}})
    names = arms(*runs, other)
    assert names == ["tpe, batch=1", "tpe, batch=1", "tpe", "tpe, batch=8, study=mine"], "what is not set has no name"


def test_a_run_without_results_does_not_lengthen_names(tmp_path: Path) -> None:
    bad = failed(tmp_path / "bad", strategy="tpe", budget={"size_ratio": 0.001})
    assert arms(finished(tmp_path / "good", strategy="tpe"), bad) == ["tpe", "tpe"]


def test_workloads_part_places_and_fingerprints_part_groups(tmp_path: Path) -> None:
    one = finished(tmp_path / "one")
    batch = finished(tmp_path / "batch", config={"workload": {"batch": 8}})
    model = finished(tmp_path / "model", model={"name": "ResNet", "fingerprint": "abcdef012"})
    found = {e.run.path.name: (e.group, e.place) for e in sort_runs([read_run(run) for run in (one, batch, model)])}
    assert found == {
        "one": ("digits (model f00d)", "zen5, workload.batch=1"),
        "batch": ("digits (model f00d)", "zen5, workload.batch=8"),
        "model": ("digits (model abcdef)", "zen5, workload.batch=1"),
    }


@pytest.mark.parametrize("budget", [{"size_ratio": 0.14}, {"quality_drop": 0.01}])
def test_the_best_run_is_the_least_of_all(tmp_path: Path, budget: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    runs, merits = [], {}
    for seed in range(12):
        verdict = rng.choice(["met", "missed", "undecided"], p=[0.5, 0.3, 0.2])
        bits, drop = int(rng.integers(2, 6)), float(rng.integers(0, 3)) / 100
        runs.append(
            finished(
                tmp_path / str(seed), (f"int{bits}/uint8",) * 2, 0.95, drop, str(verdict), seed=seed, budget=budget
            )
        )
        losses = (drop, bits) if "size_ratio" in budget else (bits, drop)
        merits[str(seed)] = (["met", "undecided", "missed"].index(verdict), *losses)
    entries = sort_runs([read_run(run) for run in runs])
    best = [entry.run.path.name for entry in entries if entry.is_best]
    assert len(best) == 1
    assert merits[best[0]] == min(merits.values())
    ranked = [merits[entry.run.path.name] for entry in sorted(entries, key=lambda entry: entry.rank)]
    assert ranked == sorted(ranked)


def test_every_budget_has_its_best(tmp_path: Path) -> None:
    runs = [finished(tmp_path / str(i), budget={"size_ratio": ratio}) for i, ratio in enumerate((0.1, 0.1, 0.2))]
    runs.append(failed(tmp_path / "bad", budget={"size_ratio": 0.01}))
    entries = sort_runs([read_run(run) for run in runs])
    assert [entry.budget for entry in entries if entry.is_best] == ["size ≤ 0.1 × float", "size ≤ 0.2 × float"]


def test_runs_have_the_shortest_names_that_tell_them_apart(tmp_path: Path) -> None:
    def names(*folders: str) -> list[str]:
        entries = sort_runs([read_run(write_run(tmp_path / folder)) for folder in folders])
        return sorted(entry.name for entry in entries)

    assert names("sweep/0", "sweep/1") == ["0", "1"]
    assert names("a/0", "b/0") == ["a/0", "b/0"]
    assert names("alone") == ["alone"]


def step(across: Any, values: Any, x: float) -> float | None:
    """What a step function holds at x, by definition."""
    at = [value for place, value in zip(across, values, strict=True) if place <= x]
    return at[-1] if at else None


def test_curves_on_the_page_hold_what_the_history_holds(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    seconds = np.cumsum(rng.integers(1, 9, 60)) / 4
    volumes = np.maximum.accumulate(rng.integers(0, 5, 60) / 8)
    losses = np.fmin.accumulate(np.where(rng.random(60) < 0.7, math.nan, rng.integers(0, 9, 60) / 8))
    growth = Growth(tuple(np.arange(1.0, 61)), tuple(seconds), tuple(losses), tuple(volumes))
    data = growth_data(growth)
    assert len(data["seconds"]) < 30
    assert data["evaluations"][-1] == 60
    for x in np.linspace(0, seconds[-1] + 1, 200):
        assert step(data["seconds"], data["hypervolume"], x) == step(seconds, volumes, x)
        np.testing.assert_equal(step(data["seconds"], data["best_loss"], x), step(seconds, losses, x))


class Outline(HTMLParser):
    """What a page is made of: headings, ids, what labels are for, what needs one, links, and the data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.levels: list[int] = []
        self.ids: list[str] = []
        self.labelled: set[str] = set()
        self.fields: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.named_by: list[str] = []
        self.data = ""
        self._in_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if "id" in found:
            self.ids.append(found["id"])
        if "aria-labelledby" in found:
            self.named_by.append(found["aria-labelledby"])
        if tag == "label" and "for" in found:
            self.labelled.add(found["for"])
        if tag == "select":
            self.fields.append(found["id"])
        if tag == "a":
            self.links.append(found["href"])
        self.sources += [found[name] for name in ("src", "href") if name in found and tag != "a"]
        self._in_data = tag == "script" and found.get("type") == "application/json"

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs = sweep(folder / "a sweep")
    runs.append(finished(folder / "odd", task='</script><b>"&', strategy="<i>solver"))
    return write_comparison(runs).page


def test_the_page_stands_alone_and_can_be_read_aloud(page: Path) -> None:
    outline = Outline(page.read_text(encoding="utf-8"))
    assert outline.levels[0] == 1
    assert outline.levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(outline.levels, outline.levels[1:], strict=False))
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.fields) <= outline.labelled
    assert set(outline.named_by) <= set(outline.ids)
    assert all(source.startswith("data:") for source in outline.sources), "nothing is fetched"
    anchors = {link for link in outline.links if link.startswith("#")}
    assert {link[1:] for link in anchors} <= set(outline.ids)
    reports = [link for link in outline.links if link not in anchors]
    assert "a%20sweep/0/report.html" in reports
    assert len(reports) == 11, "every finished run"


def test_the_data_of_the_page_is_json_whatever_names_are(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    data = json.loads(Outline(text).data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert len(data["runs"]) == 13
    odd = next(run for run in data["runs"] if run["name"] == "odd")
    assert (odd["filter"]["task"], odd["filter"]["strategy"]) == ('</script><b>"&', "<i>solver")
    assert "<i>solver" not in text, "names are escaped wherever they are written"
    assert [run["reason"] for run in data["runs"] if run["filter"]["status"] == "failed"] == [
        "the budget cannot be met"
    ]
    assert sum(map(len, data["networks"][0].values())) == 3 * 2, "one network for all plans"


def test_the_table_says_what_files_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    table = text[text.index('id="runs"') : text.index("</table>")]
    rows = [[re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)]
            for row in re.findall(r"<tr.*?</tr>", table, re.S)]  # fmt: skip
    found = dict(zip(rows[0], next(row for row in rows if row[1:5] == ["digits", "zen5", "solver", "1"]), strict=True))
    del found["run"]
    assert found == {
        "task": "digits",
        "device": "zen5",
        "strategy": "solver",
        "seed": "1",
        "budget": "size ≤ 0.14 × float",
        "verdict": "met",
        "quality": "0.9510",
        "drop [95% interval]": "+0.0090 [−0.0010, +0.0190]",
        "bits": "4.00",
        "size": "77.0 B",
        "latency": "1.00 ms (datasheet)",
        "energy": "–",
        "evaluations": "4",
        "seconds": "60.0",
        "hypervolume": "0.7000 (stored size)",
        "status": "finished",
    }


def test_a_hypervolume_says_of_which_cost_it_is(tmp_path: Path) -> None:
    runs = [finished(tmp_path / cost, primary_cost=cost) for cost in ("latency_s", "weight_bytes", "")]
    values = page_values(sort_runs([read_run(run) for run in runs]), (), 0, tmp_path)
    cells = {run["name"]: row[values["columns"].index("hypervolume")] for run, row in
             zip(json.loads(values["data"])["runs"], values["rows"], strict=True)}  # fmt: skip
    assert cells == {run.path.name: (text, 0.7) for run, text in
                     zip(runs, ("0.7000 (latency)", "0.7000 (stored size)", "0.7000"), strict=True)}  # fmt: skip
    assert {run["name"]: run["primary"] for run in json.loads(values["data"])["runs"]} == {
        run.path.name: cost for run, cost in zip(runs, ("latency_s", "weight_bytes", ""), strict=True)
    }


def test_the_page_says_how_far_the_box_of_hypervolumes_reaches(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "a drop as large as the float quality, at the float network's cost or twice the 8-bit network's" in text
    assert "no quality" not in text[text.index("<main") : text.index("</main>")]


@pytest.mark.parametrize("higher", [True, False])
def test_a_metric_keeps_its_letters(tmp_path: Path, higher: bool) -> None:
    text = write_comparison([finished(tmp_path / "run", metric="mAP50", higher_is_better=higher)]).page.read_text()
    lower = "" if higher else ", lower is better"
    assert f'<p class="soft">Metric: mAP50{lower}; the float network has 0.9600 on the report split.</p>' in text
    assert "Map50" not in text


def test_the_page_holds_plotly_once_and_little_else(page: Path) -> None:
    from plotly.offline import get_plotlyjs

    text = page.read_text(encoding="utf-8")
    assert text.count(get_plotlyjs()[:2000]) == 1
    assert len(text) - len(get_plotlyjs()) < 200_000


def test_the_command_writes_beside_the_runs_and_prints_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(tmp_path / "sweep")
    assert main(["compare", str(tmp_path / "sweep")]) == 0
    said = capsys.readouterr().out
    assert f"Wrote {tmp_path / 'sweep' / 'compare.html'}: 12 runs compared" in said
    assert (tmp_path / "sweep" / "compare.html").is_file()
    rows = [line.split() for line in said.splitlines() if "≤" in line]
    assert [(row[0], row[1], row[row.index("float") + 1], row[row.index("float") + 2]) for row in rows] == [
        ("digits", "storage", "solver", "1"),
        ("digits", "zen5", "solver", "1"),
        ("text", "zen5", "solver", "1"),
    ]
    assert "Mind: 10 failed: the budget cannot be met" in said
    assert "Mind: 11 was interrupted: it was killed" in said


def test_one_run_and_runs_without_plans_have_pages(tmp_path: Path) -> None:
    one = write_comparison([finished(tmp_path / "one")])
    assert one.page == tmp_path / "compare.html"
    assert one.notes == ()
    none = write_comparison([failed(tmp_path / "none" / "a"), unfinished(tmp_path / "none" / "b")])
    assert len(none.notes) == 2
    assert none.page == tmp_path / "none" / "compare.html"
    assert 'id="cost"' in none.page.read_text(encoding="utf-8")


def test_what_cannot_be_compared_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path / "missing")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    assert main(["compare", str(tmp_path / "bad")]) == 2
    assert "nothing to compare" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    with pytest.raises(BitplanError, match="folder"):
        write_comparison([finished(tmp_path / "run")], tmp_path / "folder")
