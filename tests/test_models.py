# Anyone's model, from Python, end to end: the models the field has, not only the ones we ship.
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import search
from search.errors import ConfigError, InfeasibleError
from search.strategies.solver import Solver

CLASSES, TOKENS, WIDTH = 5, 6, 16


class Transformer(nn.Module):
    """Token ids in, a dict out; attention, an encoder layer's fast path, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(self.embedding(ids))
        return {"hidden": hidden, "logits": self.head(hidden.mean(1))}


class Recurrent(nn.Module):
    """A convolution over time, an LSTM, and a linear layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).transpose(1, 2)
        x = self.lstm(x)[0][:, -1]
        return self.head(torch.relu(self.twice(torch.relu(self.twice(x)))))


class Gated(nn.Module):
    """Two inputs by keyword, and a path that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, WIDTH), nn.Linear(3, WIDTH)
        self.deep = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = torch.relu(self.left(left)), self.right(right)
        if a.sum() > 0:
            b = b + self.deep(a)
        return self.head(torch.cat([a, b], 1))


def images(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape)


CASES: dict[str, tuple[type[nn.Module], Any]] = {
    "transformer": (Transformer, lambda: torch.randint(20, (40, TOKENS))),
    "recurrent": (Recurrent, lambda: images(40, 4, 9)),
    "gated": (Gated, lambda: {"left": images(40, 8), "right": images(40, 3)}),
}


def logits(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out["logits"] if isinstance(out, dict) else out


def first(inputs: Any, count: int) -> Any:
    return {name: x[:count] for name, x in inputs.items()} if isinstance(inputs, dict) else inputs[:count]


@pytest.mark.parametrize("name", CASES)
def test_a_plan_for_any_model(name: str, tmp_path: Path) -> None:
    make, draw = CASES[name]
    model, inputs = make().eval(), draw()
    if name == "recurrent":  # statistics a fold has to take along
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    expected, before = logits(model, inputs), copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]

    def evaluate(candidate: nn.Module, split: str) -> float:
        return (logits(candidate, inputs).argmax(1) == expected.argmax(1)).float().mean().item()

    plan = search.find_plan(
        model,
        first(inputs, 2),
        [inputs],
        evaluate,
        budget={"average_weight_bits": 6},
        strategy=Solver(evaluations=6),
        hardware="storage",
        run_dir=tmp_path / "run",
    )
    assert plan.average_weight_bits <= 6
    assert plan.quality.value >= 0.8
    assert plan.quality.drop_low is None  # one number per evaluation, hence no interval
    quantized = plan.apply(model)
    assert (logits(quantized, inputs).argmax(1) == expected.argmax(1)).float().mean() == pytest.approx(
        plan.quality.value
    )
    assert not torch.equal(logits(quantized, inputs), expected)

    assert torch.equal(logits(model, inputs), expected)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    reloaded = search.Plan.load(tmp_path / "run").apply(model)
    assert torch.equal(logits(reloaded, inputs), logits(quantized, inputs))


def test_outputs_that_are_no_logits_are_compared_by_squared_error(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2)), torch.randn(64, 6)
    target = model(x).detach()
    plan = search.find_plan(
        model,
        x[:2],
        [x],
        lambda candidate, split: (candidate(x) - target).square().mean().item(),
        budget={"average_weight_bits": 6},
        metric="mean squared error",
        higher_is_better=False,
        divergence="squared_error",
        run_dir=tmp_path,
    )
    assert plan.quality.metric == "mean squared error"
    assert plan.quality.drop == pytest.approx(plan.quality.value)  # the float error is 0, and more is worse
    assert 0 < plan.quality.value < 0.01


def test_what_cannot_be_done_is_said_in_the_users_words(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(8, 6)
    given: dict[str, Any] = {"calibration": [x], "evaluate": lambda candidate, split: 1.0, "run_dir": tmp_path}
    with pytest.raises(ConfigError, match=r"budget\.size_rato is no setting \(did you mean 'size_ratio'\?\)"):
        search.find_plan(model, x, **given, budget={"size_rato": 0.1})
    with pytest.raises(InfeasibleError, match="least this space can reach"):
        search.find_plan(model, x, **given, budget={"size_ratio": 0.01})
    with pytest.raises(ConfigError, match="needs `calibration` and `evaluate`"):
        search.find_plan(model, x)
    with pytest.raises(ConfigError, match=r"strategy=sover is unknown \(did you mean 'solver'\?\)"):
        search.find_plan(model, x, **given, strategy="sover")


def test_a_retrained_model_does_not_resume_the_old_ones_run(tmp_path: Path) -> None:
    x = torch.randn(16, 6)
    given: dict[str, Any] = {"evaluate": lambda candidate, split: 1.0, "run_dir": tmp_path, "hardware": "storage"}
    model = nn.Sequential(nn.Linear(6, 3))
    plan = search.find_plan(model, x, [x], **given)
    assert search.find_plan(model, x, [x], **given) == plan
    with pytest.raises(ConfigError, match="holds a run on another model"):
        search.find_plan(nn.Sequential(nn.Linear(6, 3)), x, [x], **given)
    with pytest.raises(ConfigError, match="holds a run on other data"):
        search.find_plan(model, x, [x + 1], **given)
