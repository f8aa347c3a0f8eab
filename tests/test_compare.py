"""Intervals, probabilities and ties of latencies, against sampled errors and arithmetic by hand."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import Cost, CostReport, LayerCost
from hwmodels.compare import bound_seconds, is_tie, latency_interval, probability_faster, tier_seconds

PATHS = ("fp32", "int8", "int4")
SIGMAS = {"fp32": 0.2, "int8": 0.4, "int4": 0.7}
DRAWS = 200_000

seconds = st.floats(1e-7, 1e-2) | st.just(0.0)
timings = st.fixed_dictionaries({path: seconds for path in PATHS})


def report(parts: dict[str, float], sigmas: dict[str, float] | None = None, source: str = "zen5") -> CostReport:
    sigmas = SIGMAS if sigmas is None else sigmas
    return CostReport(Cost(latency_s=sum(parts.values())), source=source, path_seconds=parts, sigmas=sigmas)


def draw(parts: dict[str, float], errors: dict[str, np.ndarray]) -> np.ndarray:
    return sum(seconds * np.exp(errors[path]) for path, seconds in parts.items())


def errors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.normal(0, sigma, DRAWS) for path, sigma in SIGMAS.items()}


MIXES = [
    {"fp32": 3e-3},
    {"fp32": 1e-3, "int8": 1e-3},
    {"fp32": 5e-4, "int8": 2e-3, "int4": 1e-3},
    {"fp32": 1e-6, "int4": 2e-6},
]


@pytest.mark.parametrize("parts", MIXES)
@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_an_interval_holds_its_share_of_drawn_latencies(parts: dict[str, float], level: float) -> None:
    low, high = latency_interval(report(parts), level)
    drawn = draw(parts, errors(1))
    wide = 0.003 if len(parts) == 1 else 0.07  # sums are approximated from above, the more so the more sigmas differ
    assert level - 0.003 <= np.mean((drawn > low) & (drawn < high)) <= level + wide
    assert np.mean(drawn > high) <= (1 - level) / 2 + 0.003
    assert np.mean(drawn < low) <= (1 - level) / 2 + 0.003


def test_the_interval_of_one_path_by_hand() -> None:
    reach = NormalDist().inv_cdf(0.9) * 0.4
    assert latency_interval(report({"int8": 2e-3})) == pytest.approx(
        (2e-3 * math.exp(-reach), 2e-3 * math.exp(reach)), rel=1e-12
    )
    assert report({"int8": 2e-3}).interval == latency_interval(report({"int8": 2e-3}))


PAIRS = [
    ({"fp32": 3e-3}, {"int8": 2e-3}),  # one path on either side: exact
    ({"fp32": 3e-3, "int8": 1e-3}, {"fp32": 1e-3, "int8": 3.5e-3}),  # the same, once the common part is gone
    ({"fp32": 1e-3, "int8": 4e-3}, {"fp32": 1e-3, "int4": 4.5e-3}),
    ({"fp32": 2e-3, "int8": 1e-3}, {"int4": 2.5e-3}),  # two paths against one
    ({"fp32": 2e-3, "int8": 1e-3, "int4": 1e-4}, {"fp32": 1e-3, "int4": 2e-3}),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_policies_of_a_device_share_their_errors(one: dict[str, float], other: dict[str, float]) -> None:
    shared = errors(2)
    drawn = np.mean(draw(one, shared) < draw(other, shared))
    assert probability_faster(report(one), report(other)) == pytest.approx(drawn, abs=0.01)
    assert report(one).probability_faster(report(other)) == probability_faster(report(one), report(other))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_devices_err_independently(one: dict[str, float], other: dict[str, float]) -> None:
    drawn = np.mean(draw(one, errors(3)) < draw(other, errors(4)))
    assert probability_faster(report(one), report(other, source="h100")) == pytest.approx(drawn, abs=0.02)
    assert probability_faster(report(one), report(other), same_device=False) == pytest.approx(drawn, abs=0.02)


def test_what_is_common_cancels() -> None:
    one, other = {"fp32": 1e-3, "int8": 1e-3}, {"fp32": 1e-3, "int4": 1.3e-3}
    alone = probability_faster(report({"int8": 1e-3}), report({"int4": 1.3e-3}))
    assert probability_faster(report(one), report(other)) == pytest.approx(alone)
    assert probability_faster(report(one), report(other)) > probability_faster(report(one), report(other), False)


def test_fewer_seconds_in_one_path_alone_are_faster_for_certain() -> None:
    one, other = report({"fp32": 1e-3, "int8": 1e-3}), report({"fp32": 1e-3, "int8": 1.1e-3})
    assert (probability_faster(one, other), probability_faster(other, one)) == (1.0, 0.0)
    assert not is_tie(one, other)
    without = {"fp32": 0.2}
    assert probability_faster(report({"fp32": 1e-3}, without), report({"fp32": 2e-3}, without)) == 1.0


@given(timings, timings, st.booleans())
def test_one_of_two_is_faster(one: dict[str, float], other: dict[str, float], same: bool) -> None:
    first, second = report(one), report(other)
    forward, backward = probability_faster(first, second, same), probability_faster(second, first, same)
    assert 0 <= forward <= 1
    assert forward + backward == pytest.approx(1, abs=1e-9)
    assert is_tie(first, second, same) == is_tie(second, first, same)


@given(timings)
def test_the_same_latency_is_a_tie(parts: dict[str, float]) -> None:
    rounded = {path: value * (1 + 2e-16) for path, value in parts.items()}
    assert probability_faster(report(parts), report(rounded)) == 0.5
    assert is_tie(report(parts), report(rounded))
    assert probability_faster(report(parts), report(parts), same_device=False) == pytest.approx(0.5, abs=1e-9)


@given(timings, st.floats(0.05, 0.95), st.floats(1e-3, 1e3))
def test_intervals_scale_with_the_latency_and_widen_with_the_level(
    parts: dict[str, float], level: float, factor: float
) -> None:
    low, high = latency_interval(report(parts), level)
    scaled = latency_interval(report({path: factor * value for path, value in parts.items()}), level)
    assert scaled == pytest.approx((factor * low, factor * high), rel=1e-9)
    wider = latency_interval(report(parts), level + 0.04)
    assert wider[0] <= low <= high <= wider[1]


@pytest.mark.parametrize(("ratio", "tie"), [(1.0, True), (1.4, True), (1.6, False)])
def test_a_difference_under_its_sigma_is_a_tie(ratio: float, tie: bool) -> None:
    """Sigmas of 0.2 and 0.4 make one of 0.447, a factor of 1.564."""
    assert is_tie(report({"fp32": 1e-3}), report({"int8": ratio * 1e-3})) == tie
    assert is_tie(report({"int8": ratio * 1e-3}), report({"fp32": 1e-3})) == tie


def test_without_errors_the_shorter_is_faster() -> None:
    exact = {"fp32": 0.0, "int8": 0.0}
    one, other = report({"fp32": 1e-3}, exact), report({"int8": 2e-3}, exact)
    assert (probability_faster(one, other), probability_faster(other, one)) == (1.0, 0.0)
    assert probability_faster(one, report({"int8": 1e-3}, exact)) == 0.5
    assert latency_interval(one) == pytest.approx((1e-3, 1e-3))
    assert latency_interval(report({})) == (0.0, 0.0)


def test_what_is_not_known_is_refused() -> None:
    stored = CostReport(Cost(latency_s=math.nan, weight_bytes=1e3), source="counted", path_seconds={"": math.nan})
    for ask in (latency_interval, tier_seconds, bound_seconds):
        with pytest.raises(ValueError, match="the latency is not known to counted"):
            ask(stored)
    with pytest.raises(ValueError, match="the latency is not known to counted"):
        probability_faster(report({"fp32": 1.0}), stored)
    with pytest.raises(ValueError, match="the error of path 'int2' is not known to zen5"):
        latency_interval(report({"int2": 1e-3}))
    with pytest.raises(ValueError, match="the error of path 'int8' is not known"):
        is_tie(report({"int8": 1e-3}, {"int8": math.nan}), report({"fp32": 1e-3}, {"fp32": 0.1}))
    with pytest.raises(ValueError, match="does not say which paths its latency is made of"):
        latency_interval(CostReport(Cost(latency_s=1.0)))
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 1"):
        latency_interval(report({"int8": 1e-3}), 1)


def test_histograms_by_hand() -> None:
    layers = {
        "a": LayerCost(Cost(latency_s=3.0), bound="memory", tier="calibrated"),
        "b": LayerCost(Cost(latency_s=2.0), bound="compute", tier="datasheet"),
        "c": LayerCost(Cost(latency_s=1.0), bound="memory", tier="calibrated"),
        "d": LayerCost(Cost(latency_s=1.0)),
    }
    found = CostReport(Cost(latency_s=7.5), layers, {"latency_s": "datasheet"})
    assert tier_seconds(found) == {"calibrated": 4.0, "datasheet": 3.5}
    assert bound_seconds(found) == {"memory": 4.0, "compute": 2.0, "": 1.5}
    assert list(bound_seconds(found)) == ["memory", "compute", ""]
    assert tier_seconds(CostReport(Cost(latency_s=1.0))) == {"": 1.0}
