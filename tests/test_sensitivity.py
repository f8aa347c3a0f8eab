"""Sensitivities against scipy's Kullback-Leibler divergence of networks quantized one choice at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from tiny import Bench, TinyTask, make_bench

from hwmodels import Precision
from search.errors import DataError
from search.files import JsonLines
from search.quality.sensitivity import SensitivityTable, score_choices
from search.quantize.simulate import exact_inference
from search.tasks.digits import Digits
from search.tasks.task import Task


def logits(bench: Bench, policy: dict[str, Precision]) -> np.ndarray:
    with exact_inference():
        return bench.simulated.apply(policy)(bench.task._data["calibration"][0]).double().numpy()


def test_scores_are_the_mean_divergence(bench: Bench) -> None:
    table = bench.scores()
    p = softmax(logits(bench, {}), axis=1)
    for decision, scores in zip(bench.space.decisions, table.scores, strict=True):
        for format, score in zip(decision.formats, scores, strict=True):
            choice = Precision(weight=format) if decision.side == "weight" else Precision(input=format)
            q = softmax(logits(bench, dict.fromkeys(decision.layers, choice)), axis=1)
            assert score == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-4, abs=1e-7)
        assert scores[0] > scores[-1] >= 0, "few bits must hurt more than many"


@pytest.mark.parametrize("task", [TinyTask(), Digits()], ids=["tiny", "digits"])
def test_scores_are_those_of_full_passes_bit_for_bit(task: Task) -> None:
    bench = make_bench(task, weight=("int2", "nf4", "float"), input=("uint4", "int8-token"))

    def outputs(policy: dict[str, Precision]) -> list[torch.Tensor]:
        with exact_inference():
            return [task.outputs(bench.simulated.apply(policy), batch) for batch in task.batches("calibration")]

    reference = outputs({})
    for decision, scores in zip(bench.space.decisions, bench.scores().scores, strict=True):
        for format, score in zip(decision.formats, scores, strict=True):
            choice = Precision(weight=format) if decision.side == "weight" else Precision(input=format)
            found = outputs(dict.fromkeys(decision.layers, choice))
            assert score == torch.cat([task.divergence(p, q) for p, q in zip(reference, found, strict=True)]).mean()


def test_layers_before_a_choice_do_not_run_again(bench: Bench) -> None:
    calls = Counter()
    for name in bench.network.names:
        bench.simulated.owner(name).register_forward_hook(lambda module, args, output, name=name: calls.update([name]))
    bench.scores()
    batches, once = 2, 4  # the reference, tried out twice, recorded
    assert calls["stem"] == batches * (once + 5), "its own choices only: 3 weight formats, 2 input formats"
    assert calls["head"] >= batches * 18, "every choice"


def test_prediction_is_the_sum_of_choices(bench: Bench) -> None:
    table = bench.scores()
    rng = np.random.default_rng(0)
    for _ in range(5):
        point = bench.space.encode(bench.space.sample(rng))
        assert table.predict(point) == pytest.approx(sum(table.scores[i][index] for i, index in enumerate(point)))


def test_float_costs_nothing() -> None:
    bench = make_bench(weight=("int4", "float"), input=("uint8", "float"))
    assert all(scores[-1] == 0 < scores[0] for scores in bench.scores().scores)


@pytest.mark.parametrize("kept", [0, 1, 7, 17, 18])
def test_resuming_measures_only_the_rest(bench: Bench, tmp_path: Path, kept: int, monkeypatch) -> None:
    log = JsonLines(tmp_path / "whole.jsonl")
    table = bench.scores(log)
    rows = log.read()
    assert len(rows) == 4 * 3 + 3 * 2
    part = JsonLines(tmp_path / "part.jsonl")
    for row in rows[:kept]:
        part.append(row)

    measured, divergence = [], bench.task.divergence
    monkeypatch.setattr(bench.task, "divergence", lambda *outputs: measured.append(1) or divergence(*outputs))
    progress = []
    again = score_choices(bench.task, bench.simulated, bench.space, part, lambda *step: progress.append(step))
    assert all(map(np.array_equal, again.scores, table.scores)), "bit for bit"
    assert len(measured) == 2 * (18 - kept), "both batches, of the rest"
    assert progress == [(done, 18) for done in range(kept + 1, 19)]
    assert part.read() == rows


def test_frame(bench: Bench) -> None:
    table = bench.scores()
    frame = table.to_frame(bench.space)
    assert list(frame.columns) == ["decision", "side", "layers", "format", "score"]
    assert len(frame) == 18
    assert frame.score.tolist() == np.concatenate(table.scores).tolist()
    assert frame[frame.layers == "left right"].format.tolist() == ["uint4", "uint8"]


class NotANumber(TinyTask):
    def divergence(self, reference: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        return torch.full((len(outputs),), torch.nan)


def test_divergence_that_is_no_number() -> None:
    with pytest.raises(DataError, match="the divergence is nan with the weight of stem in int2"):
        make_bench(NotANumber()).scores()


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5)])
def test_default_divergence(shape: tuple[int, ...]) -> None:
    p, q = torch.randn(shape), torch.randn(shape)
    found = Task.divergence(TinyTask(), p, q)
    each = rel_entr(softmax(p.double().numpy(), -1), softmax(q.double().numpy(), -1)).sum(-1)
    assert found.numpy() == pytest.approx(each.reshape(6, -1).mean(1))
    assert Task.divergence(TinyTask(), p, p).abs().max() < 1e-12


def test_tables_are_plain_values() -> None:
    table = SensitivityTable((np.array([0.5, 0.25]), np.array([1.0])))
    assert table.predict([1, 0]) == 1.25
