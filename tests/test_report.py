from __future__ import annotations

import io
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import contrast, luminance
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from tiny import TinyTask

from hwmodels import FLOAT, Format, Roofline, StorageModel
from search.budget import Budget
from search.errors import DataError
from search.figures import style
from search.figures.bits import (
    AllocationInfo,
    MembersInfo,
    allocation_info,
    draw_allocation,
    draw_members,
    members_info,
    stages,
)
from search.figures.convergence import convergence_info, draw_convergence
from search.figures.front import ELSEWHERE, FrontInfo, Point, draw_front, front_infos
from search.figures.interactive import error_bars, hover_text, plot_convergence, plot_front
from search.figures.layer_costs import LayerCostsInfo, draw_layer_costs, layer_costs_info
from search.figures.sensitivity import Panel, SensitivityInfo, draw_sensitivity, sensitivity_info
from search.figures.words import (
    allocation_words,
    convergence_words,
    front_words,
    layer_costs_words,
    members_words,
    sensitivity_words,
)
from search.job import Job, SpaceSettings
from search.plan import PlannedRepair
from search.policy import Policy
from search.report import write_report
from search.report.sentences import notes
from search.report.tables import front_rows, layer_rows, winner_rows
from search.run import search
from search.rundir import RunDirectory
from search.strategies.baselines import RandomSearch
from search.strategies.solver import Solver
from search.terminal import front_table
from search.trials import Trial
from search.units import interval, log_ticks, quantity, significant, unit_for

SPACE = SpaceSettings(weight=["int2", "int4", "int8"], input=["uint4", "uint8"])
FIGURES = {"front", "allocation", "members", "sensitivity", "layer_costs", "convergence"}


class OddlyNamed(TinyTask):
    name = "<b>odd</b> & task"


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished search on a device that knows every cost."""
    run_dir = tmp_path_factory.mktemp("solved")
    config = {"seed": 0, "note": "<script>alert(1)</script>"}
    job = Job(OddlyNamed(), Roofline("zen5"), Solver(12), Budget(size_ratio=0.3), run_dir, SPACE, config=config)
    run = search(job).run
    write_report(run)
    return run


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished search without sensitivities, on a target that knows neither time nor energy."""
    run_dir = tmp_path_factory.mktemp("sampled")
    run = search(Job(TinyTask(), StorageModel(), RandomSearch(6), Budget(quality_drop=0.5), run_dir, SPACE)).run
    write_report(run)
    return run


def page(run: RunDirectory) -> str:
    return run.file("report.html").read_text(encoding="utf-8")


def text(run: RunDirectory) -> str:
    """What the page says, without the scripts."""

    class Reader(HTMLParser):
        said = ""
        is_silent = False

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.is_silent = tag in ("script", "style")

        def handle_endtag(self, tag: str) -> None:
            self.is_silent = False

        def handle_data(self, data: str) -> None:
            self.said += "" if self.is_silent else f"{data} "

    reader = Reader()
    reader.feed(page(run))
    return re.sub(r"\s+", " ", reader.said)


def about(**changes: object) -> dict[str, object]:
    return {
        "primary_cost": "weight_bytes",
        "limits": {"weight_bytes": 4096.0},
        "metric": "accuracy",
        "higher_is_better": True,
        "budget": {"size_ratio": 0.2},
        "status": "finished",
        "has_interval": True,
        "rank_correlation": 0.9,
    } | changes


def row(
    role: str, size: float, drop: float, margin: float = 0.01, name: str = "", latency: float = 0.0
) -> dict[str, object]:
    return {
        "role": role,
        "name": name or role,
        "digest": name or role,
        "quality": 0.9 - drop,
        "drop": drop,
        "drop_low": drop - margin,
        "drop_high": drop + margin,
        "weight_bytes": size,
        "latency_s": latency or size * 1e-6,
        "selection_quality": 0.9 - drop,
        "average_weight_bits": 4.0,
        "policy": json.dumps({"a": "int4/uint8", "b": "int2/float"}),
    }


FRONT = pd.DataFrame(
    [
        row("float", 32768, 0.0),
        row("uniform", 8192, 0.01, name="uniform int8/uint8"),
        row("uniform", 4096, 0.8, name="uniform int4/uint4"),
        row("winner", 4000, 0.02, name="trial 1"),
        row("front", 3000, 0.05, name="trial 2"),
        row("front", 2000, 0.85, name="trial 3"),
    ]
)


TWO = ["weight_bytes", "latency_s"]
TWO_COSTS = pd.DataFrame(
    [
        row("float", 32768, 0.0, latency=0.009),
        row("uniform", 8192, 0.01, name="uniform int8/uint8", latency=0.004),
        row("winner", 4000, 0.02, name="trial 1", latency=0.005),
        row("front", 3000, 0.05, name="trial 2", latency=0.006),
        row("front", 3500, 0.06, name="trial 3", latency=0.003),
        row("front", 6000, 0.01, name="trial 4", latency=0.004),
    ]
)


def plane(front: pd.DataFrame, trials: list[Trial], said: dict[str, object]) -> FrontInfo:
    """The only plane of a front of one cost."""
    (info,) = front_infos(front, trials, said)
    return info


def trial(
    number: int, quality: float | None, size: float = 3500.0, seconds: float = 1.0, fidelity: float = 1.0
) -> Trial:
    metrics = {} if quality is None else {"quality": quality, "drop": 0.9 - quality}
    costs = {"weight_bytes": size, "latency_s": size * 1e-6, "average_weight_bits": 4.0}
    policy = Policy.from_dict({"a": f"int{2 + number % 7}/uint8"})
    return Trial(number, policy, fidelity, metrics, costs, seconds, "infeasible" if quality is None else "complete")


# Numbers


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (1234.5, "1,234"),
        (12.345, "12.3"),
        (-0.012345, "−0.0123"),
        (9.999, "10.0"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_significant_digits(value: float | None, expected: str) -> None:
    assert significant(value) == expected


@given(st.floats(1e-12, 1e15), st.integers(1, 8))
def test_significant_digits_are_right_to_half_a_unit_of_the_last(value: float, digits: int) -> None:
    read = float(significant(value, digits).replace(",", ""))
    assert abs(read - value) <= 0.5001 * 10.0 ** (math.floor(math.log10(value)) - digits + 1)


def test_quantities_take_the_unit_that_fits() -> None:
    assert quantity("weight_bytes", 1023) == "1,023 B"
    assert quantity("weight_bytes", 1536) == "1.50 KiB"
    assert quantity("latency_s", 9.362e-5, 4) == "93.62 µs"
    assert quantity("bit_ops", 7.7e6) == "7.70 M"
    assert quantity("average_weight_bits", 3.0) == "3.00"
    assert quantity("energy_j", None) == quantity("energy_j", math.nan) == "–"
    assert unit_for("weight_bytes", [3.0, 2048.0, math.nan]).symbol == "KiB"


def test_intervals_that_do_not_exist_are_not_shown() -> None:
    assert interval(0.01, -0.005, 0.025, signed=True) == "+0.0100 [−0.0050, +0.0250]"
    assert interval(0.01, None, None) == interval(0.01, math.nan, math.nan) == "0.0100"
    assert interval(0.01, -math.inf, math.inf) == "0.0100"


@given(st.floats(1e-6, 1e6), st.floats(4.5, 1e5))
def test_log_axes_have_some_ticks_and_not_too_many(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert ticks == sorted(ticks)
    assert 2 <= len(ticks) <= 12
    assert low <= ticks[0] <= ticks[-1] <= low * ratio


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.lists(st.floats(-100, 100), max_size=5))
def test_views_hold_their_focus_whatever_else_there_is(focus: list[float], others: list[float]) -> None:
    low, high = style.near(focus, others)
    assert low < min(focus) <= max(focus) < high
    assert high - low <= 10 * max(max(focus) - min(focus), 0.01 * max(focus), 0.01)


def test_names_lose_what_they_share_and_the_middle() -> None:
    assert style.short_names(["net.a.x", "net.a.y", "net.b"]) == ["a.x", "a.y", "b"]
    assert style.short_names(["conv", "conv.x"]) == ["conv", "conv.x"]
    (short,) = style.short_names(["a" * 40 + "z" * 40], longest=11)
    assert short == "aaaaa…zzzzz"


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ({"kind": "conv2d", "groups": 8, "weight_shape": [8, 1, 3, 3], "kernel": [3, 3]}, "depthwise"),
        ({"kind": "conv2d", "groups": 2, "weight_shape": [8, 4, 3, 3], "kernel": [3, 3]}, "conv"),
        ({"kind": "conv1d", "groups": 1, "weight_shape": [8, 4, 1], "kernel": [1]}, "pointwise"),
        ({"kind": "lstm", "groups": 1, "weight_shape": [8, 4], "kernel": []}, "lstm"),
    ],
)
def test_layer_kinds(layer: dict[str, object], kind: str) -> None:
    assert style.layer_kind(layer | {"channel_axis": 0}) == kind


def bytes_of(colour: str | tuple[float, ...]) -> tuple[float, float, float]:
    """Red, green and blue in [0, 255] of a colour as matplotlib takes it."""
    red, green, blue = to_rgb(colour)
    return 255 * red, 255 * green, 255 * blue


def test_text_can_be_read_on_every_bit_colour_and_few_bits_are_lighter() -> None:
    found = [style.bits_colour(bits) for bits in (2, 3, 4, 5, 6, 8, 32)]
    brightness = [luminance(bytes_of(colour)) for colour in found]
    assert brightness == sorted(brightness, reverse=True)
    for colour in found:
        assert contrast(bytes_of(colour), bytes_of(style.text_on(colour))) > 4.5


def test_lines_and_bars_stand_out_from_dark_paper() -> None:
    paper = bytes_of(style.DARK["#ffffff"])
    bars = [*style.KIND_COLOURS.values(), *style.COMPUTE_COLOURS.values(), *style.SPARE_COLOURS]
    for colour in [*bars, style.WINNER, style.FRONT, style.BASELINE, style.TRIAL, style.INK, style.REST]:
        shown = bytes_of(style.DARK.get(colour, colour))
        assert contrast(shown, paper) > 3, f"{colour} on dark paper"  # WCAG 2.2, 1.4.11
    assert contrast(bytes_of(style.DARK[style.INK]), paper) > 7


def test_drawings_take_their_colours_from_the_page_and_share_no_names() -> None:
    info = plane(FRONT, [trial(7, 0.88)], about())
    one, other = style.svg(draw_front([info]), "one"), style.svg(draw_front([info]), "other")
    assert one == style.svg(draw_front([info]), "one")
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for reference in re.findall(r'(?:url\(|href=")#([^)"]+)', one):
        assert reference in ids[0]
    for colour in (style.INK, style.FRONT, style.WINNER):
        assert f"var(--c-{colour[1:]}, {colour})" in one
        assert not re.search(f"(?<!, ){colour}", one)
    assert ">stored size (KiB)</text>" in one, "text stays text"


# The front


def test_front_info_scales_costs_and_turns_drops_into_quality() -> None:
    trials = [trial(7, 0.88), trial(8, None, 9000), trial(9, 0.1), trial(10, 0.9, fidelity=0.5)]
    info = plane(FRONT, trials, about())
    assert info.unit == ("KiB", 1024.0)
    assert [p.name for p in info.members] == ["trial 3", "trial 2", "trial 1"]
    assert info.winner.cost == 4000 / 1024
    assert (info.winner.low, info.winner.high) == pytest.approx((0.87, 0.89))
    assert [p.name for p in info.baselines] == ["float", "int8/uint8", "int4/uint4"]
    assert math.isnan(info.baselines[0].low)
    assert [p.name for p in info.tried] == ["trial 7", "trial 9"]
    assert info.infeasible == (9000 / 1024,)
    assert (info.cost_limit, info.quality_limit) == (4.0, None)
    assert info.is_log


def test_failures_do_not_squash_the_view_and_are_counted() -> None:
    info = plane(FRONT, [trial(7, 0.88), trial(9, 0.1)], about())
    assert 0.8 < info.view[0] < 0.85
    assert 0.9 < info.view[1] < 0.93
    assert info.hidden == 2  # trials 3 and 9
    failure = info.baselines[2]
    assert info.height(failure) == info.view[0]
    assert info.label(failure) == "int4/uint4\n(0.1)"
    assert info.label(info.baselines[1]) == "int8/uint8"


def test_lower_is_better_turns_intervals_round() -> None:
    table = FRONT.assign(quality=2.0 + FRONT["drop"])
    info = plane(table, [], about(higher_is_better=False, budget={"quality_drop": 0.03}, limits={}))
    assert (info.winner.low, info.winner.quality, info.winner.high) == pytest.approx((2.01, 2.02, 2.03))
    assert info.quality_limit == pytest.approx(2.03)
    assert info.cost_limit is None
    assert "lower is better" in info.labels[1]


def test_fronts_without_interval_or_with_one_member_are_drawn() -> None:
    table = FRONT[FRONT["role"].isin(["float", "uniform", "winner"])].assign(drop_low=math.nan, drop_high=math.inf)
    info = plane(table, [], about())
    assert info.members == (info.winner,)
    assert math.isnan(info.winner.low)
    assert math.isnan(info.winner.high)
    assert inside(draw_front([info]))
    assert plot_front([info]).data[0].error_y.array == (0.0,)


def test_interactive_front_shows_the_same_as_the_picture() -> None:
    trials = [trial(7, 0.88), trial(8, None, 9000)]
    info = plane(FRONT, trials, about())
    traces = {trace.name: trace for trace in plot_front([info]).data}
    assert list(traces) == [
        *("over budget, not measured", "other trials (selection split)", "front", "float and uniform"),
        *("winner", "budget"),
    ]
    assert traces["budget"].x == (4.0, 4.0)
    assert traces["front"].x == tuple(p.cost for p in info.members)
    assert traces["front"].error_y.array[-1] == pytest.approx(0.01)
    assert traces["float and uniform"].y[2] == info.view[0]
    assert traces["float and uniform"].error_y.array[2] == 0  # drawn at the edge, hence without its interval
    figure = draw_front([info])
    labels = [entry.get_text() for entry in figure.legends[0].get_texts()]
    assert sorted(labels) == sorted(traces)
    assert inside(figure), "the legend of everything there is fits"


def test_hover_text_is_escaped_and_complete() -> None:
    costs = {"weight_bytes": 4096.0, "latency_s": 0.002, "average_weight_bits": 3.5}
    point = Point("<trial>", "abc", 4.0, 0.88, 0.87, 0.89, 3.5, costs)
    info = plane(FRONT, [], about(primary_cost="latency_s", limits={}))
    said = hover_text(point, info)
    for part in ("&lt;trial&gt;", "abc", "0.8800 [0.8700, 0.8900]", "3.50 bits", "4.000 KiB", "latency 2.000 ms"):
        assert part in said
    assert said.count("average") == 1
    assert error_bars([point])["arrayminus"] == pytest.approx([0.01])


def test_every_cost_of_a_front_has_its_plane() -> None:
    said = about(front_costs=TWO, limits={"latency_s": 0.007})
    size, latency = front_infos(TWO_COSTS, [trial(7, 0.8), trial(8, None, 9000)], said)
    assert (size.cost, latency.cost) == tuple(TWO)
    assert [p.name for p in size.members] == ["trial 2", "trial 3", "trial 1", "trial 4"]
    assert [p.name for p in size.steps] == ["trial 2", "trial 1", "trial 4"]
    assert [p.name for p in size.elsewhere] == ["trial 3"]
    assert [p.name for p in latency.steps] == ["trial 3", "trial 4"]
    assert [p.name for p in latency.elsewhere] == ["trial 1", "trial 2"]
    assert (size.cost_limit, latency.cost_limit) == (None, 7.0)
    assert (size.infeasible, latency.infeasible) == ((9000 / 1024,), (9.0,))
    assert size.view == latency.view
    assert size.winner.costs == latency.winner.costs == {"weight_bytes": 4000, "latency_s": 0.005}
    worse = TWO_COSTS.assign(quality=1 + TWO_COSTS["drop"], selection_quality=1 + TWO_COSTS["drop"])
    lower = front_infos(worse, [], said | {"higher_is_better": False})
    assert [[p.name for p in info.steps] for info in lower] == [[p.name for p in i.steps] for i in (size, latency)]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_planes_are_drawn_beside_each_other(count: int) -> None:
    costs = [*TWO, "average_weight_bits", "energy_j"][:count]
    trials = [trial(7, 0.88), trial(8, None, 9000)]
    for item in trials:
        item.cost["energy_j"] = 1e-6
    infos = front_infos(TWO_COSTS.assign(energy_j=2e-6), trials, about(front_costs=costs))
    figure = draw_front(infos)
    assert inside(figure)
    assert len(figure.axes) == count
    assert len({axis.get_ylim() for axis in figure.axes}) == 1
    assert [bool(axis.get_ylabel()) for axis in figure.axes] == [place % 2 == 0 for place in range(count)]
    chart = plot_front(infos)
    labels = [entry.get_text() for entry in figure.legends[0].get_texts()]
    assert ELSEWHERE in labels
    named = [trace.name for trace in chart.data if trace.showlegend]
    assert sorted(named) == sorted(labels), "one entry of the legend for all panels"
    assert {trace.legendgroup for trace in chart.data} == set(labels)
    fronts = [trace for trace in chart.data if trace.name == "front"]
    assert [trace.x for trace in fronts] == [tuple(p.cost for p in info.steps) for info in infos]
    assert len({(trace.xaxis, trace.yaxis) for trace in chart.data}) == count


def test_names_of_baselines_make_way_for_each_other() -> None:
    info = plane(FRONT, [], about())
    assert [info.name_side(p) for p in info.baselines] == ["right"] * 3
    rows = [row("uniform", size, drop, name=f"uniform {size}") for size, drop in ((30000, 0.001), (20000, 0.0))]
    crowded = plane(pd.concat([FRONT, pd.DataFrame(rows)]), [], about())
    sides = {p.name: crowded.name_side(p) for p in crowded.baselines}
    assert sides == {"float": "right", "int8/uint8": "right", "int4/uint4": "right", "30000": "bottom", "20000": "top"}


# Convergence


def test_best_so_far_counts_what_was_spent() -> None:
    trials = [trial(0, 0.8), trial(1, None), trial(2, 0.99, fidelity=0.5), trial(3, 0.7, seconds=2), trial(4, 0.85)]
    info = convergence_info(trials, about(), 0.9)
    assert info.evaluations == (1, 1.5, 2.5, 3.5)
    assert info.seconds == (1, 3, 5, 6)  # the second is that of the policy over budget
    assert info.best == (0.8, 0.8, 0.8, 0.85)
    np.testing.assert_array_equal(info.values, [0.8, math.nan, 0.7, 0.85])
    assert info.reference == 0.9
    assert convergence_info(trials, about(higher_is_better=False), 0.9).best == (0.8, 0.8, 0.7, 0.7)


def test_best_so_far_is_the_cost_where_the_budget_limits_the_drop() -> None:
    trials = [trial(0, 0.5, 1024), trial(1, 0.88, 4096), trial(2, 0.89, 8192), trial(3, 0.87, 2048)]
    info = convergence_info(trials, about(budget={"quality_drop": 0.035}), 0.9)
    np.testing.assert_array_equal(info.best, [math.nan, 4, 4, 2])
    assert "KiB" in info.label
    assert info.reference is None
    assert inside(draw_convergence(info))


def test_hypervolume_is_drawn_below_the_best() -> None:
    trials = [trial(0, 0.8), trial(1, None), trial(2, 0.85), trial(3, 0.7)]
    history = pd.DataFrame({"trial": [0, 2, 3], "hypervolume": [0.0, 0.4, 0.45]})
    info = convergence_info(trials, about(front_costs=TWO), 0.9, history)
    assert info.hypervolume == (0, 0.4, 0.45)
    assert info.costs == ("stored size", "latency")
    figure = draw_convergence(info)
    assert inside(figure)
    assert [axis.get_ylabel() for axis in figure.axes] == ["accuracy (selection split)", "", "hypervolume", ""]
    for axis in figure.axes[2:]:
        (line,) = axis.get_lines()
        assert list(line.get_ydata()) == [0, 0.4, 0.45]
    low, high = figure.axes[2].get_ylim()
    assert 0.35 < low < 0.4 < 0.45 < high < 0.5
    unknown = convergence_info(trials, about(), 0.9, history.assign(hypervolume=math.nan))
    assert len(draw_convergence(unknown).axes) == 2
    np.testing.assert_array_equal(convergence_info(trials, about(), 0.9, history[:2]).hypervolume, [0, 0.4, math.nan])


def test_interactive_convergence_shows_the_same_as_the_picture() -> None:
    trials = [trial(0, 0.8), trial(1, None), trial(2, 0.85), trial(3, 0.7)]
    history = pd.DataFrame({"trial": [0, 2, 3], "hypervolume": [0.0, 0.4, 0.45]})
    info = convergence_info(trials, about(), 0.9, history)
    chart = plot_convergence(info)
    for name, values in (("evaluation", info.values), ("best so far", info.best), ("hypervolume", info.hypervolume)):
        both = [trace for trace in chart.data if trace.name == name]
        assert [trace.x for trace in both] == [info.evaluations, info.seconds]
        assert [trace.y for trace in both] == [values] * 2
        assert [tuple(spent) for spent in both[0].customdata] == list(zip(info.evaluations, info.seconds, strict=True))
    assert len([trace for trace in chart.data if trace.showlegend]) == 3, "one entry of the legend for both columns"
    assert chart.layout.yaxis.range == draw_convergence(info).axes[0].get_ylim()
    cost = convergence_info(trials, about(budget={"quality_drop": 0.2}), 0.9)
    assert {trace.name for trace in plot_convergence(cost).data} == {"evaluation", "best so far"}
    assert plot_convergence(cost).layout.yaxis.title.text == "stored size (KiB)<br>within the allowed drop"


def test_convergence_of_nothing_is_drawn() -> None:
    info = convergence_info([], about(), 0.9)
    assert (info.values, info.best) == ((), ())
    assert inside(draw_convergence(info))
    assert plot_convergence(info).layout.yaxis.range is None
    assert convergence_words(info) == "Nothing was measured."


# The winner's layers


def test_sensitivities_are_placed_by_decision_and_format(solved: RunDirectory) -> None:
    table, plan = solved.table("sensitivity.parquet"), solved.plan()
    assert table is not None
    assert plan is not None
    info = sensitivity_info(table, plan)
    assert info is not None
    weight, input_ = info.panels
    assert (weight.side, weight.formats) == ("weight", ("int2", "int4", "int8"))
    assert (input_.side, input_.formats) == ("input", ("uint4", "uint8"))
    assert weight.decisions == ("stem", "left", "right", "head")
    assert len(input_.decisions) == 3  # left and right read the same tensor
    for panel in info.panels:
        for _, known in table[table["side"] == panel.side].iterrows():
            place = panel.formats.index(known["format"]), panel.decisions.index(known["decision"])
            assert panel.scores[place] == known["score"]
    chosen = [weight.formats[index] for index in weight.chosen]
    assert chosen == [layer.weight for layer in plan.layers]


def test_formats_a_decision_cannot_take_stay_empty(solved: RunDirectory) -> None:
    table, plan = solved.table("sensitivity.parquet"), solved.plan()
    assert table is not None
    assert plan is not None
    taken = {"stem": plan.layers[0].weight}
    pinned = table[[(row.decision not in taken) or row.format == taken["stem"] for row in table.itertuples()]]
    info = sensitivity_info(pinned, plan)
    assert info is not None
    assert np.isnan(info.panels[0].scores[:, 0]).sum() == 2
    assert not np.isnan(info.panels[0].scores[:, 1:]).any()
    low, high = info.limits
    assert 0 < low < high
    assert sensitivity_info(table.assign(format="float"), plan) is None


def test_scores_that_are_all_zero_have_limits() -> None:
    panel = Panel("weight", ("a",), ("int8",), np.zeros((1, 1)), (0,))
    low, high = SensitivityInfo((panel,)).limits
    assert 0 < low < high


def test_shares_of_layers_and_rest_make_the_whole(solved: RunDirectory) -> None:
    plan = solved.plan()
    assert plan is not None
    info = layer_costs_info(plan)
    assert list(info.shares) == ["latency_s", "energy_j", "weight_bytes", "bit_ops"]
    for cost, shares in info.shares.items():
        assert shares.sum() == pytest.approx(100)
        for layer, share in zip(plan.layers, shares, strict=False):
            assert share == pytest.approx(100 * getattr(layer, cost) / info.totals[cost])
    assert set(info.bound) <= {"compute", "memory", "overhead"}


def test_unknown_costs_are_left_out(sampled: RunDirectory) -> None:
    plan = sampled.plan()
    assert plan is not None
    assert list(layer_costs_info(plan).shares) == ["weight_bytes", "bit_ops"]


def test_allocation_and_members_tell_the_formats(solved: RunDirectory) -> None:
    plan, layers, front = solved.plan(), solved.layers(), solved.table("front.csv")
    assert plan is not None
    assert front is not None
    info = allocation_info(plan, layers)
    assert info.kinds == ("conv", "conv", "conv", "linear")
    assert [str(format) for format in info.weights] == [layer.weight for layer in plan.layers]
    members = members_info(front, layers, ["weight_bytes"])
    assert members.weights[members.winner] == info.weights
    assert len(members.members) == front["role"].isin(["front", "winner"]).sum()


def test_many_members_are_cut_to_those_around_the_winner() -> None:
    rows = [row("front", size, 0.0, name=f"trial {size}") for size in range(100)]
    rows[90]["role"] = "winner"
    info = members_info(pd.DataFrame(rows), [{"name": "a"}, {"name": "b"}], ["weight_bytes"])
    assert len(info.members) == 40
    assert info.members[info.winner].startswith("trial 90:")
    assert info.weights[0] == (Format(4), Format(2))


def test_float_bars_do_not_dwarf_the_others() -> None:
    info = AllocationInfo(("a", "b"), ("conv", "lstm"), (FLOAT, Format(6)), (Format(8, signed=False), None))
    assert [info.height(format) for format in info.weights] == [10, 6]
    assert [info.height(format) for format in info.inputs] == [8, 0]


def test_stages_begin_where_the_name_changes_up_to_its_first_number() -> None:
    names = ["stem", "stages.0.a", "stages.0.b.7", "stages.0.c", "stages.1.a", "stages.1.b", "fc.x", "fc.y"]
    assert stages(names) == [1, 4, 6]
    assert stages(["a", "b", "c"]) == [], "a line at every turn says nothing"
    assert stages(["a"]) == []


def test_intensity_counts_what_moves_at_eight_bits(solved: RunDirectory) -> None:
    plan, layers = solved.plan(), solved.layers()
    assert plan is not None
    info = allocation_info(plan, layers)
    # stem: 3 x 3 weights of 1 channel for each of 4 channels and 6 x 6 places; moves 36 weights, 36 values in, 144 out
    assert info.intensity[0] == pytest.approx(2 * 9 * 4 * 36 / (36 + 36 + 144))
    many = plan.model_copy(update={"workload": {**plan.workload, "batch": 4}})
    assert allocation_info(many, layers).intensity[0] == pytest.approx(2 * 9 * 4 * 36 / (36 / 4 + 36 + 144))


# Words for those who cannot see the figures


def test_words_give_the_numbers_of_the_front() -> None:
    said = front_words([plane(FRONT, [], about())])
    for part in (
        "Stored size against accuracy: 3 plans on the front, from accuracy 0.0500 at 1.95 KiB to accuracy 0.8800",
        "The winner has accuracy 0.8800 at 3.91 KiB.",
        "float accuracy 0.9000 at 32.0 KiB; int8/uint8 accuracy 0.8900 at 8.00 KiB",
    ):
        assert part in said


def test_words_count_layers_by_bits() -> None:
    info = AllocationInfo(
        ("a", "b", "c", "d"),
        ("conv",) * 4,
        (FLOAT, Format(8), Format(4), Format(4)),
        (None, None, Format(8), Format(8)),
    )
    said = "Bits of 4 layers. Weights: 1 in float, 1 at 8 bits, 2 at 4 bits. Inputs: 2 at 8 bits."
    assert allocation_words(info) == said
    assert "Inputs" not in allocation_words(replace(info, inputs=(None,) * 4))
    members = MembersInfo(("a", "b"), ("trial 1", "trial 2"), ((Format(2), Format(4)), (Format(8), Format(8))), 1)
    assert members_words(members) == (
        "Weight bits of 2 layers in 2 plans, on average over layers from 3.0 to 8.0 bits. The winner: 2 at 8 bits."
    )


def test_words_name_what_matters_most() -> None:
    scores = np.array([[0.5, 2.0], [math.nan, 0.25]])
    panel = Panel("weight", ("a", "b"), ("int2", "int8"), scores, (1, 1))
    assert sensitivity_words(SensitivityInfo((panel,))) == (
        "Divergence from the float outputs of 2 weight decisions in 2 formats. "
        "The largest: b in int2 (2.00), a in int2 (0.500), b in int8 (0.250)."
    )
    costs = LayerCostsInfo(
        ("a", "b"), ("", ""), ("", ""), {"weight_bytes": np.array([20.0, 70.0, 10.0])}, {"weight_bytes": 2048.0}
    )
    assert layer_costs_words(costs).endswith("Stored size of 2.00 KiB: b 70%, a 20%, other 10%.")


def test_words_say_how_the_search_converged() -> None:
    history = pd.DataFrame({"trial": [0, 2, 3], "hypervolume": [0.1, 0.4, 0.4]})
    trials = [trial(0, 0.8), trial(1, None), trial(2, 0.85), trial(3, 0.7, seconds=2.5)]
    assert convergence_words(convergence_info(trials, about(), 0.9, history)) == (
        "The search spent 3 evaluations and 5.50 seconds. "
        "Best so far: 0.8000 after 1, 0.8500 in the end, reached after 2 evaluations. "
        "Hypervolume: 0.1000 after 1, 0.4000 in the end, reached after 2 evaluations."
    )


# Drawings of small and large networks


def inside(figure: Figure) -> bool:
    """Whether nothing of a figure is cut off, hence its border white, and no two names of columns touch."""
    pixels = np.asarray(Image.open(io.BytesIO(style.png(figure))).convert("L"))
    border = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    if any((line < 255).any() for line in border):
        return False
    for axis in figure.axes:
        boxes = [label.get_window_extent() for label in axis.get_xticklabels() if label.get_text()]
        if any(one.x1 > other.x0 + 1 for one, other in pairwise(boxes)):
            return False
    return True


def test_the_check_sees_what_is_cut_off_and_what_touches() -> None:
    figure, (axis,) = style.panels(3.0, [2.0])
    assert inside(figure)
    axis.set_xticks([0.1, 0.15], ["a long name", "another"])
    assert not inside(figure)
    figure, _ = style.panels(3.0, [2.0])
    figure.text(0.9, 0.5, "too far to the right")
    assert not inside(figure)


@pytest.mark.parametrize("count", [1, 2, 54, 200])
def test_layers_figures_have_room_for_every_name(count: int) -> None:
    rng = np.random.default_rng(count)
    names = tuple(f"features.{i // 3}.conv.{i % 3}$1$_long_name_here" for i in range(count))
    weights = tuple(Format(int(bits)) for bits in rng.choice([2, 3, 4, 8], count))
    inputs = tuple(Format(int(bits), signed=False) for bits in rng.choice([4, 8], count))
    kinds = tuple(rng.choice(["conv", "depthwise", "odd"], count))
    assert inside(draw_allocation(AllocationInfo(names, kinds, (FLOAT, *weights[1:]), (None, *inputs[1:]))))
    assert inside(draw_members(MembersInfo(names, ("trial 1: 0.9", "trial 2: 0.8"), (weights, weights), 1)))
    scores = 10.0 ** rng.uniform(-5, 1, (3, count))
    panels = tuple(Panel(s, names, ("int2", "int4", "int8"), scores, (1,) * count) for s in ("weight", "input"))
    assert inside(draw_sensitivity(SensitivityInfo(panels)))
    shares = {"latency_s": np.full(count + 1, 100 / (count + 1)), "weight_bytes": np.arange(count + 1.0)}
    bounds = tuple(rng.choice(["compute", "memory", ""], count))
    info = LayerCostsInfo(names, ("int8",) * count, bounds, shares, {"latency_s": 1e-4, "weight_bytes": 1e5})
    assert inside(draw_layer_costs(info))


def test_drawing_leaves_the_global_state_of_matplotlib_alone() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    style.png(draw_front([plane(FRONT, [trial(7, 0.88)], about())]))
    assert dict(mpl.rcParams) == before


def test_the_same_figure_is_the_same_file() -> None:
    info = plane(FRONT, [trial(7, 0.88)], about())
    assert style.png(draw_front([info])) == style.png(draw_front([info]))


# Tables and words


def test_tables_hold_every_row_and_exact_numbers(solved: RunDirectory) -> None:
    plan, front = solved.plan(), solved.table("front.csv")
    assert plan is not None
    assert front is not None
    assert [found[0] for found in front_rows(front)] == list(front["name"])
    layers = layer_rows(plan, solved.layers())
    assert [found[0] for found in layers] == ["stem", "left", "right", "head"]
    assert [found[4] for found in layers] == ["36", "216", "216", "30"]
    numbers = {name: value for name, value, _ in winner_rows(plan)}
    size = plan.cost["weight_bytes"].value
    assert size is not None
    assert f"{size:,.0f} B" in numbers["stored size (exact)"]
    assert float(numbers["accuracy on the report split (120 samples)"]) == pytest.approx(plan.quality.value, rel=1e-5)


def test_terminal_shows_every_cost_the_front_is_about(solved: RunDirectory) -> None:
    plan, front = solved.plan(), solved.table("front.csv")
    assert plan is not None
    assert front is not None
    plain, both = front_table(front, plan), front_table(front, plan, ["weight_bytes", "bit_ops"])
    names = [str(column.header) for column in plain.columns]
    assert [str(column.header) for column in both.columns] == [*names[:-1], "bit operations", names[-1]]
    assert list(both.columns[-2].cells) == [quantity("bit_ops", value) for value in front["bit_ops"]]


REPAIRS = {"gptq": 0.25, "bias_correction": 0.75}


def test_notes_say_what_to_beware_of(solved: RunDirectory) -> None:
    plan = solved.plan()
    assert plan is not None
    plan = plan.model_copy(update={"budget": plan.budget.model_copy(update={"verdict": "met"}), "cautions": ()})
    assert notes(about(), plan) == []
    assert notes(about(), plan.model_copy(update={"cautions": ("it is hot",)})) == ["Mind: it is hot."]
    assert notes(about(rank_correlation=None), plan) == []
    (low,) = notes(about(rank_correlation=0.3), plan)
    assert "low (0.30)" in low
    (single,) = notes(about(has_interval=False), plan)
    assert "no interval" in single
    (failed,) = notes(about(status="failed"), plan)
    assert "failed" in failed
    steps = [PlannedRepair(repair=name, before=0.5, after=after, kept=after < 0.5) for name, after in REPAIRS.items()]
    kept, dropped = notes(about(), plan.model_copy(update={"recover": tuple(steps)}))
    assert "gptq took the drop on the selection split from +0.5000 to +0.2500, and was kept" in kept
    assert "bias_correction took the drop" in dropped
    assert "not kept" in dropped


# The page


def test_report_writes_a_page_and_every_figure(solved: RunDirectory) -> None:
    assert {path.stem for path in solved.file("figures").glob("*.png")} == FIGURES
    for path in solved.file("figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    shown = re.findall(r'<svg role="img" aria-label="([^"]{40,})"', page(solved))
    assert len(shown) == len(FIGURES)
    assert len(set(shown)) == len(shown)


def test_page_opens_offline(solved: RunDirectory) -> None:
    without_plotly = re.sub(r"<script>/\*\*.*?</script>", "", page(solved), count=1, flags=re.DOTALL)
    assert len(without_plotly) < 2e6
    assert page(solved).count("plotly.js v") == 1
    assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=[\"'](?!data:)", without_plotly)
    assert "@import" not in without_plotly
    assert not re.search(r"url\((?!#)", without_plotly)


def test_names_and_settings_are_escaped(solved: RunDirectory) -> None:
    assert "<script>alert(1)</script>" not in page(solved)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page(solved)
    assert "<b>odd</b>" not in page(solved)
    assert "<b>odd</b> & task on zen5" in text(solved)


def test_page_says_what_was_found(solved: RunDirectory) -> None:
    plan, front = solved.plan(), solved.table("front.csv")
    assert plan is not None
    assert front is not None
    said = text(solved)
    for part in (
        plan.digest,
        plan.model.fingerprint,
        plan.data_fingerprint,
        f"{plan.quality.value:.4f}",
        plan.versions["torch"],
        plan.cost_source,
        *front["digest"],
        *(layer.name for layer in plan.layers),
    ):
        assert part in said
    assert "computes no sensitivities" not in said


def test_strategies_without_sensitivities_say_so(sampled: RunDirectory) -> None:
    said = text(sampled)
    assert "This strategy computes no sensitivities." in said
    assert "rank correlation of predicted loss and measured drop not available" in said
    assert {path.stem for path in sampled.file("figures").glob("*.png")} == FIGURES - {"sensitivity"}
    assert "nan" not in said.lower().split()
    assert "The search was called from Python without a configuration." in said


def test_a_front_of_two_costs_is_reported(solved: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(solved.path, tmp_path / "run")
    run = RunDirectory.existing(tmp_path / "run")
    run.update(front_costs=["weight_bytes", "bit_ops"])
    numbers = [trial.number for trial in run.trials() if trial.state != "infeasible"]
    spent = range(1, len(numbers) + 1)
    volumes = [1 - 0.5**count for count in spent]
    run.write_table("history.csv", pd.DataFrame({"trial": numbers, "evaluations": spent, "hypervolume": volumes}))
    write_report(run)
    said = text(run)
    assert "Stored size and bit operations against accuracy on the report split" in said
    assert "hollow dots are on the front for another cost" in said
    assert f"(stored size, bit operations; selection split); {volumes[-1]:.4f} in the end" in said
    for name, sizes in (("front", (2300, 800)), ("convergence", (1600, 900))):
        with Image.open(run.file(f"figures/{name}.png")) as image:
            assert image.width == sizes[0]
            assert image.height >= sizes[1]
    assert "undefined" not in said
    assert "hollow dots" not in text(solved)


def test_report_needs_nothing_but_the_directory_and_repeats_itself(solved: RunDirectory, tmp_path: Path) -> None:
    names = (
        "run.json",
        "layers.json",
        "sensitivity.parquet",
        "trials.jsonl",
        "front.csv",
        "history.csv",
        "costs.parquet",
        "log.jsonl",
    )
    for name in (*filter(lambda name: solved.file(name).exists(), names), "plan.json", "plan.safetensors"):
        shutil.copy(solved.file(name), tmp_path / name)
    copy = RunDirectory.existing(tmp_path)
    assert write_report(copy) == tmp_path / "report.html"
    assert page(copy) == page(solved)


def test_a_task_with_one_number_per_evaluation_is_reported(solved: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(solved.path, tmp_path / "run")
    run = RunDirectory.existing(tmp_path / "run")
    front, plan = run.table("front.csv"), run.plan()
    assert front is not None
    assert plan is not None
    run.write_table("front.csv", front.assign(drop_low=math.nan, drop_high=math.nan))
    unknown = {"drop_low": None, "drop_high": None, "samples": 1}
    whole = plan.model_copy(update={"quality": plan.quality.model_copy(update=unknown)})
    whole.save(run.file("plan.json"))
    run.update(has_interval=False, rank_correlation=0.2)
    write_report(run)
    said = text(run)
    assert "so drops have no interval" in said
    assert "(1 sample)" in said
    assert "0.20 (low)" in said


def test_unfinished_searches_have_no_report(solved: RunDirectory, tmp_path: Path) -> None:
    shutil.copy(solved.file("run.json"), tmp_path / "run.json")
    with pytest.raises(DataError, match="no finished search"):
        write_report(RunDirectory.existing(tmp_path))
