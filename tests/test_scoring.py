"""Scoring a space: the columns that are asked for, kept for whoever asks the same, and never mixed up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from tiny import Bench, TinyTask, make_bench

from hwmodels import Precision
from search.errors import ConfigError, DataError
from search.quantize.simulate import exact_inference
from search.sensitivity.choices import choices_of, positions
from search.sensitivity.scoring import TABLE, base_of, score_space
from search.sensitivity.settings import SCORES, SensitivitySettings
from search.sensitivity.table import SensitivityTable

EVERYTHING = SensitivitySettings(scores=list(SCORES), interactions=["forward", "backward"], draws=2, probes=2)


class LabelledTask(TinyTask):
    """The tiny task with a loss, so that every score can be asked for."""

    def loss(self, outputs, batch):
        return torch.nn.functional.cross_entropy(outputs, batch[1], reduction="none")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return make_bench(LabelledTask(), weight=("int2", "int4", "float"))


@pytest.fixture(scope="module")
def table(bench: Bench) -> SensitivityTable:
    return bench.scores(settings=EVERYTHING)


def logits(bench: Bench, policy: dict[str, Precision]) -> np.ndarray:
    with exact_inference():
        return bench.simulated.apply(policy)(bench.task._data["calibration"][0]).double().numpy()


def test_kl_is_the_mean_divergence_of_single_choices(bench: Bench, table: SensitivityTable) -> None:
    p = softmax(logits(bench, {}), axis=1)
    for score, choice in zip(table.columns["kl"], choices_of(bench.space), strict=True):
        q = softmax(logits(bench, choice.on({})), axis=1)
        assert score == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-4, abs=1e-7), choice


def test_every_score_asked_for_is_a_column(bench: Bench, table: SensitivityTable) -> None:
    assert tuple(table.columns) == SCORES
    assert set(table.interactions) == {"forward", "backward"}
    frame = table.to_frame(bench.space)
    assert {*SCORES, "decision", "side", "layers", "format", "score"} == set(frame.columns)
    assert len(frame) == len(choices_of(bench.space))
    np.testing.assert_array_equal(frame["score"], table.columns["kl"])


def test_float_costs_nothing(bench: Bench, table: SensitivityTable) -> None:
    is_float = np.array([choice.format.is_float for choice in choices_of(bench.space)])
    assert is_float.any()
    for name, column in table.columns.items():
        if name != "sqnr_db":
            assert not column[is_float].any(), name
    assert (table.columns["sqnr_db"][is_float] >= 150).all(), "what float is given, as there is no noise"
    for form in table.interactions.values():
        assert not form[is_float].any()


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_interactions_are_positive_semidefinite(table: SensitivityTable, name: str) -> None:
    for predictor in (name, f"{name}_scaled"):
        form = table.parts(predictor)[1]
        assert form is not None
        assert np.linalg.eigvalsh(form).min() >= -1e-9 * np.abs(form).max()


def test_forecasts_of_a_quadratic_form_by_hand(bench: Bench, table: SensitivityTable) -> None:
    rng = np.random.default_rng(0)
    at = np.stack([positions(bench.space, bench.space.encode(bench.space.sample(rng))) for _ in range(8)])
    chosen = np.zeros((8, len(choices_of(bench.space))))
    chosen[np.arange(8)[:, None], at] = 1
    for name in ("forward", "backward_scaled"):
        scores, form = table.parts(name)
        expected = chosen @ scores + np.einsum("pi,ij,pj->p", chosen, form, chosen) / 2
        np.testing.assert_allclose(table.predict(at, name), expected)
    np.testing.assert_allclose(table.predict(at, "kl"), chosen @ table.columns["kl"])
    noise = 10 ** (-table.columns["sqnr_db"] / 10)
    np.testing.assert_allclose(table.predict(at, "sqnr_db"), chosen @ noise)


@pytest.mark.parametrize("base", ["float", "int4/uint8"])
def test_single_choices_are_forecast_exactly_once_scaled(bench: Bench, base: str) -> None:
    table = bench.scores(settings=SensitivitySettings(interactions=["forward"], base=base))
    held = base_of(bench.space, base)
    p = softmax(logits(bench, {}), axis=1)
    scores, form = table.parts("forward_scaled")
    for at, choice in enumerate(choices_of(bench.space)):
        q = softmax(logits(bench, choice.on(held)), axis=1)
        found = table.constant + scores[at] + form[at, at] / 2
        assert found == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-3, abs=1e-6), choice


def test_a_table_survives_the_disk(bench: Bench, table: SensitivityTable, tmp_path: Path) -> None:
    table.save(tmp_path / "table.npz")
    again = SensitivityTable.load(tmp_path / "table.npz")
    point = positions(bench.space, bench.space.encode(bench.space.sample(np.random.default_rng(1))))[None]
    assert again.predictors == table.predictors
    for name in table.predictors:
        assert again.predict(point, name) == table.predict(point, name)


def counting(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from search.sensitivity import forward

    calls: list[int] = []
    genuine = forward.forward_scores
    monkeypatch.setattr(forward, "forward_scores", lambda *a, **k: calls.append(1) or genuine(*a, **k))
    return calls


def test_what_was_made_from_the_same_is_taken_from_the_store(bench: Bench, tmp_path: Path, monkeypatch) -> None:
    calls = counting(bench, monkeypatch)

    def scored(run: str, weight: list[str] | None = None, **facts: str) -> SensitivityTable:
        other = make_bench(LabelledTask(), weight=weight) if weight else bench
        return score_space(
            bench.task, other.simulated, other.space, None, tmp_path / run, {"model": "a", **facts}, tmp_path / "store"
        )

    first = scored("one")
    assert len(calls) == 1
    np.testing.assert_array_equal(scored("two").interactions["forward"], first.interactions["forward"])
    assert len(calls) == 1, "another run finds it"
    assert (tmp_path / "two" / TABLE).is_file()
    scored("three", quantizer="other")
    scored("four", weight=["int2", "int3"])
    assert len(calls) == 3, "another quantizer, another space"
    assert not list((tmp_path / "store").glob("*.part"))


def test_a_finished_run_is_not_scored_again(bench: Bench, tmp_path: Path, monkeypatch) -> None:
    calls = counting(bench, monkeypatch)
    first, again = bench.scores(tmp_path), bench.scores(tmp_path)
    assert len(calls) == 1
    np.testing.assert_array_equal(first.columns["kl"], again.columns["kl"])
    assert [path.name for path in tmp_path.iterdir()] == [TABLE]


def test_an_interrupted_table_goes_on(bench: Bench, tmp_path: Path) -> None:
    whole = bench.scores()

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise StopError

    with pytest.raises(StopError):
        score_space(bench.task, bench.simulated, bench.space, None, tmp_path, progress=stop)
    kept = sorted((tmp_path / "scoring").iterdir())
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) >= 4
    seen: list[int] = []
    again = score_space(
        bench.task,
        bench.simulated,
        bench.space,
        None,
        tmp_path,
        progress=lambda done, total: seen.append([path.stat().st_mtime_ns for path in kept] == times),
    )
    assert all(seen), "what was there was not written again"
    np.testing.assert_array_equal(again.columns["kl"], whole.columns["kl"])
    np.testing.assert_array_equal(again.interactions["forward"], whole.interactions["forward"])


def test_outputs_that_are_no_numbers_are_named() -> None:
    task = TinyTask()
    with torch.no_grad():
        task.model.head.bias[0] = torch.nan
    bench = make_bench(task)
    with pytest.raises(DataError, match="finite"):
        bench.scores()


def test_a_loss_without_labels_is_refused() -> None:
    with pytest.raises(DataError, match="loss needs a `loss` with labels"):
        make_bench().scores(settings=SensitivitySettings(scores=["loss"]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scores": ["fischer"]}, "fischer is unknown .did you mean .fisher"),
        ({"interactions": ["pairs"]}, "sensitivity.interactions: pairs is unknown"),
        ({"predictor": "fisher"}, "sensitivity.predictor=fisher is not scored"),
        ({"predictor": "forwards"}, "did you mean .forward"),
        ({"pairs": [["stem"]]}, "must name two layers"),
        ({"pairs": [["stem", "head"]], "interactions": []}, "needs the interactions of all other pairs"),
        ({"draws": 0}, "sensitivity.draws=0 must be at least 1"),
        ({"base": "int99"}, "sensitivity.base"),
        ({"scores": [], "interactions": [], "superposition": False}, "asks for nothing"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SensitivitySettings(**given)


def test_named_pairs_are_measured(bench: Bench) -> None:
    table = bench.scores(settings=SensitivitySettings(pairs=[["stem", "left"]]))
    choices, (scores, form) = choices_of(bench.space), table.parts("measured")
    _, estimated = table.parts("forward_scaled")
    p = softmax(logits(bench, {}), axis=1)
    measured = 0
    for first, one in enumerate(choices):
        for second, other in enumerate(choices):
            named = {one.decision.name, other.decision.name} == {"stem", "left"}
            if not named or one.is_in({}) or other.is_in({}):
                assert form[first, second] == estimated[first, second]
                continue
            q = softmax(logits(bench, other.on(one.on({}))), axis=1)
            forecast = (form[first, first] + form[second, second]) / 2 + form[first, second]
            assert forecast == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-3, abs=1e-6)
            measured += 1
    assert measured == 8
    assert not scores.any()
    with pytest.raises(ConfigError, match=r"no layer or tensor is decided under the name 'lift'.*left"):
        bench.scores(settings=SensitivitySettings(pairs=[["stem", "lift"]]))


def test_an_unknown_predictor_names_those_there_are(table: SensitivityTable) -> None:
    with pytest.raises(ConfigError, match=r"predictor kll was not scored.*kl"):
        table.parts("kll")
