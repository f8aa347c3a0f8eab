"""What the NNCF backend writes is one call for every precision, and NNCF leaves every layer with the bits it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import EmitterContract
from networks import Attention, Decoder, Recurrent, Tagger
from plans import ModelTask, make_plan
from torch import Tensor, nn
from torch.nn import functional as F

from hwmodels import Layer, Precision
from search.backends.nncf import FILE, NNCF, quantize
from search.backends.outcome import ExportReport, Validation
from search.errors import DataError, UnsupportedError
from search.plan import Plan
from search.tasks.digits import Digits

# A pool that NNCF's loader of compiled kernels leaves behind.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed running multiprocessing pool:ResourceWarning"
)
LINEAR, CONV = Layer("a", "linear", weight_shape=(16, 128)), Layer("b", "conv2d", weight_shape=(8, 16, 3, 3))
EMBEDDING = Layer("c", "embedding", weight_shape=(50, 64), quantizes_input=False)
MIXED = ["int8", "uint8", "int8/uint8", "int4-g8", "uint4", "int8/uint8", "int4", "float"]


class Every(nn.Module):
    """Convolutions and linear layers under names with dots, and a weight that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(1, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.deep = nn.Conv2d(4, 4, 3, groups=4)
        self.heads = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(64, 16)]), "b_0": nn.Linear(16, 16, bias=False)})
        self.left, self.right, self.last = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 4)
        self.mixing = nn.Parameter(torch.eye(16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.deep(self.up(F.relu(self.stem(x))))), 2)
        x = F.relu(self.heads["a"][0](x.flatten(1))) @ self.mixing
        x = F.gelu(self.heads["b_0"](x))
        return self.last(self.left(x) + self.right(x))


def every() -> ModelTask:
    torch.manual_seed(0)
    return ModelTask(Every(), torch.randn(16, 1, 5, 5))


def exported(task: Any, policy: Any, path: Path) -> tuple[Plan, ExportReport]:
    plan = make_plan(task, policy)
    return plan, NNCF().export(plan, task, path)


def described(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / FILE).read_text())
    return found


class TestNNCF(EmitterContract):
    @pytest.fixture
    def backend(self):
        return NNCF()


@pytest.mark.parametrize(
    ("layer", "planned", "runs"),
    [
        (LINEAR, "int4", "int4/float"),
        (LINEAR, "int4-g32", "int4-g32/float"),
        (LINEAR, "int4-g48", "int4/float"),
        (LINEAR, "int4/uint8", "int4/float"),
        (LINEAR, "int8/uint8", "int8/uint8"),
        (LINEAR, "int8/int8", "int8/uint8"),
        (LINEAR, "uint8/uint8", "uint8/float"),
        (LINEAR, "int3-asym-g64", "uint4-g64/float"),
        (LINEAR, "int8-g32", "int8/float"),
        (LINEAR, "int6/uint4", "int8/uint8"),
        (EMBEDDING, "uint4-g16", "uint4-g16/float"),
        (CONV, "int4", "int8/float"),
        (CONV, "int4/uint8", "int8/uint8"),
        (CONV, "int8/int8-token", "int8/float"),
        (CONV, "codebook4", "float/float"),
        (CONV, "int16/uint16", "float/float"),
        (LINEAR, "nf4", "float/float"),
    ],
)
def test_the_nearest_that_nncf_has(layer: Layer, planned: str, runs: str) -> None:
    said = NNCF().express(layer, Precision.parse(planned))
    assert said.runs == runs
    assert said.note


@pytest.mark.parametrize("precision", ["int4-g32", "uint4", "int8", "uint8", "int8/uint8"])
def test_a_search_keeps_what_nncf_has_under_scales_of_its_own(precision: str) -> None:
    assert NNCF().refuses(LINEAR, Precision.parse(precision)) is None
    assert "makes int4" in str(NNCF().refuses(LINEAR, Precision.parse("int3")))
    assert "stays in float" in str(NNCF().refuses(LINEAR, Precision.parse("int4/uint8")))


def test_every_call_ignores_all_layers_but_its_own(tmp_path: Path) -> None:
    plan, _ = exported(every(), lambda position, _: MIXED[position], tmp_path)
    file = described(tmp_path)
    assert list(file["nodes"]) == list(plan.policy)
    assert file["nodes"]["left"] == ["left/linear/0"]
    assert [file["nodes"][name] for name in ("heads.a.0", "heads.b_0")] == [["/linear/0"], ["/linear/1"]]
    everyone = {node for nodes in file["nodes"].values() for node in nodes}
    reached = [everyone - set(call["ignored_scope"]["names"]) for call in file["calls"]]
    assert file["calls"][-1]["function"] == "quantize"
    assert sum(map(len, reached)) == len(set.union(*reached)) == 7
    assert all("patterns" not in call["ignored_scope"] for call in file["calls"])


def test_a_layer_that_is_called_three_times_has_three_nodes(tmp_path: Path) -> None:
    exported(ModelTask(Recurrent(), torch.randn(6, 4)), "int8", tmp_path)
    assert described(tmp_path)["nodes"] == {"first": [f"first/linear/{call}" for call in range(3)]}


def test_layers_that_share_a_weight_need_one_format(tmp_path: Path) -> None:
    task = ModelTask(Decoder(), torch.randint(0, 20, (4, 8)))
    policy = dict.fromkeys(make_plan(task, "float").policy, "int4")
    exported(task, policy, tmp_path / "same")
    with pytest.raises(UnsupportedError, match=r"embedding and decoder share|decoder and embedding share"):
        exported(task, policy | {"embedding": "int8"}, tmp_path / "other")


def test_weights_of_recurrent_modules_stay_in_float(tmp_path: Path) -> None:
    exported(ModelTask(Tagger(), torch.randint(0, 10, (4, 6))), "int8", tmp_path)
    assert set(NNCF().read(tmp_path)) == {"embedding", "head"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "other"}, "format"),
        ({"calls": [{"function": "quantize", "ignored_scope": {"names": []}, "preset": "other"}]}, "preset"),
        ({"calls": [{"function": "quantize", "ignored_scope": {"names": [], "patterns": [".*"]}}]}, "patterns"),
        ({"calls": [{"mode": "int8_sym", "ignored_scope": {"names": []}}] * 2}, "twice"),
    ],
)
def test_a_file_of_another_schema_is_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    exported(every(), "int8", tmp_path)
    (tmp_path / FILE).write_text(json.dumps(described(tmp_path) | change))
    with pytest.raises(DataError, match=reason):
        NNCF().read(tmp_path)


@pytest.mark.backend
class TestWithNNCF:
    """NNCF makes the calls; every layer is looked at."""

    @pytest.mark.parametrize("shift", range(len(MIXED)))
    def test_every_layer_has_exactly_its_bits(self, shift: int, tmp_path: Path) -> None:
        task = every()
        plan, report = exported(task, lambda position, _: MIXED[(position + shift) % len(MIXED)], tmp_path)
        found = NNCF().verify(plan, task, tmp_path)
        assert isinstance(found, Validation)
        assert len({layer.runs for layer in report.layers}) >= 5

    @pytest.mark.parametrize("precision", ["int4-g8", "uint4", "int8"])
    def test_transformers_tied_weights_and_repeated_layers(self, precision: str, tmp_path: Path) -> None:
        tasks = [
            ModelTask(Decoder(), torch.randint(0, 20, (4, 8))),
            ModelTask(Attention(), torch.randn(2, 5, 16)),
            ModelTask(Recurrent(), torch.randn(6, 4)),
        ]
        for task in tasks:
            plan, _ = exported(task, precision, tmp_path)
            assert isinstance(NNCF().verify(plan, task, tmp_path), Validation)

    def test_what_runs_is_near_the_simulation(self, tmp_path: Path) -> None:
        task = every()
        plan, report = exported(task, lambda position, _: MIXED[position], tmp_path)
        model = quantize(plan, task.model, tmp_path, [task.example_input])
        simulated = make_plan(task, {layer.name: layer.runs or layer.precision for layer in report.layers})
        with torch.no_grad():
            found, expected, exact = (
                made(task.example_input) for made in (model, simulated.apply(task.model), task.model)
            )
        assert (found - exact).norm() < 2 * (expected - exact).norm() + 1e-3 * exact.norm()

    def test_digits(self, tmp_path: Path) -> None:
        plan, _ = exported(Digits(), lambda position, _: MIXED[position % len(MIXED)], tmp_path)
        found = NNCF().verify(plan, Digits(), tmp_path)
        assert isinstance(found, Validation)
        assert "accuracy" in found.checks[-1]

    def test_a_node_that_is_not_there(self, tmp_path: Path) -> None:
        task = every()
        plan, _ = exported(task, "int8", tmp_path)
        broken = every()
        broken.model.last.forward = lambda x: x[:, :4]
        with pytest.raises(UnsupportedError, match="no node last/linear/0"):
            quantize(plan, broken.model, tmp_path, [task.example_input])
