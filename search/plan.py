"""The plan: a policy with its evidence, in two files that leave the run directory.

`plan.json` (schema `bitplan/1`) says what every layer gets, what it is predicted to cost and what was measured;
`plan.safetensors` beside it holds the scales and zero points, any altered parameters, and the digests of the model's
tensors that the plan was made for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hwmodels import Format, Layer, Network, Precision
from search.errors import DataError, closest
from search.files import replacing, write_text
from search.policy import Policy
from search.quantize.affine import Range
from search.quantize.fold import Fold, apply_folds
from search.quantize.formats import parameter_names
from search.quantize.placement import Point, formats_of
from search.quantize.settings import QuantizerSettings, Ranges
from search.quantize.simulate import QuantizedModel

SCHEMA = "bitplan/1"


class Record(BaseModel):
    """A part of the plan; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PlannedLayer(Record):
    """What one layer gets.

    Attributes:
        name: Module or parameter name.
        kind: Kind of layer, such as `conv2d`.
        weight: Weight format.
        input: Input format.
        weight_shape: Shape of the weight.
        channel_axis: Axis of the weight with one scale per entry.
        quantizes_input: False for weight-only layers.
        reads: The tensors it reads.
        groups: Groups of a convolution.
        compute: Type the target really computes in.
        support: `native`, `storage` or `fallback`: how well the target runs it; empty where not known.
        bound: `compute`, `memory` or `overhead`, whichever takes longest; empty where not known.
        tier: How far the latency can be trusted; empty where there is none.
        latency_s: Predicted seconds; None where unknown.
        energy_j: Predicted joules; None where unknown.
        weight_bytes: Stored bytes with scales.
        bit_ops: Bit operations.
    """

    name: str
    kind: str
    weight: str
    input: str
    weight_shape: tuple[int, ...]
    channel_axis: int
    quantizes_input: bool
    reads: tuple[str, ...]
    groups: int = 1
    compute: str
    support: str = ""
    bound: str = ""
    tier: str = ""
    latency_s: float | None
    energy_j: float | None
    weight_bytes: float
    bit_ops: float


class PlannedCost(Record):
    """A predicted cost: its value in SI units, the same for the float network, and how far to trust it.

    `low` and `high` enclose the true value with 80% probability; None where nothing is known about that.
    """

    value: float | None
    reference: float | None
    tier: str
    low: float | None = None
    high: float | None = None


class MeasuredQuality(Record):
    """A quality measured on one split, with its paired drop against the float model and the drop's 95% interval."""

    split: str
    metric: str
    higher_is_better: bool
    value: float
    float_value: float
    samples: int
    drop: float
    drop_low: float | None
    drop_high: float | None


class PlannedBudget(Record):
    """The limits as the user gave them, what ratios refer to, and whether the plan keeps them."""

    limits: dict[str, float]
    reference: str
    verdict: Literal["met", "missed", "undecided"]


class PlannedRepair(Record):
    """A repair that was tried: the drop before and after it on the selection split, and whether it was kept."""

    repair: str
    before: float
    after: float
    kept: bool


class TensorFile(Record):
    """The file beside the plan, by name and content."""

    file: str
    sha256: str


class ModelRecord(Record):
    """The model the plan belongs to: its class, its fingerprint, and the batch norms folded into layers before."""

    name: str
    fingerprint: str
    folded: tuple[tuple[str, str], ...]


class Plan(Record):
    """A policy with its evidence; see the module's docstring for the files."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: Literal["bitplan/1"] = Field(alias="schema")
    digest: str
    task: str
    model: ModelRecord
    data_fingerprint: str
    hardware: str
    workload: dict[str, int | str]
    strategy: str
    seed: int
    quantizer: dict[str, Any]
    recover: tuple[PlannedRepair, ...]
    space: dict[str, Any]
    budget: PlannedBudget
    average_weight_bits: float
    effective_bits: float
    cost: dict[str, PlannedCost]
    cost_source: str
    cautions: tuple[str, ...] = ()
    quality: MeasuredQuality
    selection: MeasuredQuality
    layers: tuple[PlannedLayer, ...]
    points: tuple[Point, ...]
    versions: dict[str, str]
    config: dict[str, Any]
    tensors: TensorFile

    _tensors: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _model_digests: dict[str, str] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Compares what plans say, which includes the hash of their tensors."""
        return isinstance(other, Plan) and self.model_dump() == other.model_dump()

    @property
    def policy(self) -> Policy:
        """The policy."""
        return Policy.from_dict({layer.name: f"{layer.weight}/{layer.input}" for layer in self.layers})

    @property
    def network(self) -> Network:
        """The layers, as far as the simulation needs them."""
        names = ("name", "kind", "weight_shape", "channel_axis", "quantizes_input", "reads", "groups")
        return Network(tuple(Layer(**{name: getattr(layer, name) for name in names}) for layer in self.layers))

    @property
    def ranges(self) -> Ranges:
        """The scales, zero points and codebooks of every quantized tensor."""
        ranges = Ranges()
        for tensor, format in formats_of(self.points, self.network, self.policy, self._operation_format).items():
            if f"{tensor}/tensor_scale" in self._tensors:
                ranges.tensors[tensor, format] = self._range(f"{tensor}/tensor")
        for name, precision in self.policy.items():
            if not precision.weight.is_float:
                ranges.weights[name, precision.weight] = self._tensors_of(f"{name}/weight_")
            if precision.input.has_static_range:
                ranges.inputs[name, precision.input] = self._range(f"{name}/input")
        return ranges

    def _range(self, prefix: str) -> Range:
        return Range(float(self._tensors[f"{prefix}_scale"]), int(self._tensors[f"{prefix}_zero_point"]))

    @property
    def _operation_format(self) -> Format:
        return Format.parse(self.quantizer["operation_format"])

    @property
    def altered(self) -> dict[str, Tensor]:
        """Parameters and buffers of the folded model that a repair changed, by name."""
        return self._tensors_of("altered/")

    def _tensors_of(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in self._tensors.items() if name.startswith(prefix)}

    def simulate(self, model: nn.Module) -> QuantizedModel:
        """Returns the simulated network with this plan applied; `model` itself is not altered.

        Raises:
            DataError: If `model` is not the one the plan was made for.
        """
        self.check(model)
        settings = QuantizerSettings(operation_format=str(self._operation_format))
        with torch.inference_mode(False), torch.no_grad():  # parameters outlive the caller's mode
            folded = apply_folds(model, tuple(Fold(*names) for names in self.model.folded)).eval()
            simulated = QuantizedModel(folded, self.network, settings, self.ranges, points=self.points)
            simulated.alter(self.altered, keep_ranges=True)
            simulated.apply(self.policy)
        return simulated

    def apply(self, model: nn.Module) -> nn.Module:
        """Returns a quantized copy of `model`: batch norm folded, weights and inputs taking the plan's values.

        Raises:
            DataError: If `model` is not the one the plan was made for.
        """
        return self.simulate(model).model

    def check(self, model: nn.Module) -> None:
        """Raises DataError, naming the first difference, unless `model` is the one the plan was made for."""
        digests = tensor_digests(model)
        if digests == self._model_digests:
            return
        for name, expected in self._model_digests.items():
            if name not in digests:
                raise DataError(
                    f"the plan is for another model: it has {name}, this one has not{closest(name, digests)}"
                )
            if digests[name] != expected:
                (kind, was), (this, now) = (text.rsplit(" ", 1) for text in (expected, digests[name]))
                what = (
                    f"values differ (sha256 {was[:12]}..., here {now[:12]}...)"
                    if kind == this
                    else f"was {kind}, here {this}"
                )
                raise DataError(f"the plan is for another model: {name} {what}")
        extra = next(name for name in digests if name not in self._model_digests)
        raise DataError(f"the plan is for another model: this one has {extra}, which the plan's has not")

    def save(self, path: str | Path) -> Path:
        """Writes the plan and, beside it, its tensors; returns the plan's path."""
        path = Path(path)
        with replacing(path.with_name(self.tensors.file)) as aside:
            aside.write_bytes(pack(self._tensors, self._model_digests))
        return write_text(path, json.dumps(self.model_dump(by_alias=True, mode="json"), indent=2) + "\n")

    def with_tensors(self, tensors: Mapping[str, Tensor], model_digests: Mapping[str, str]) -> Plan:
        """Attaches the tensors that go into the file beside the plan."""
        self._tensors.update(tensors)
        self._model_digests.update(model_digests)
        return self

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan and its tensors.

        Raises:
            DataError: If a file is missing or damaged, or of another schema.
        """
        path = Path(path)
        path = path / "plan.json" if path.is_dir() else path
        if not path.is_file():
            raise DataError(f"no plan at {path}; name a plan.json or a run directory that holds one")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is damaged: {error}") from error
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            given = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
            raise DataError(f"{path} has schema {given!r}; this version of bitplan reads {SCHEMA!r}")
        try:
            plan = cls.model_validate(raw)
            for layer in plan.layers:
                Precision.parse(f"{layer.weight}/{layer.input}")
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"{path} is damaged: {where}: {first['msg']}") from error
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}") from error
        plan._load_tensors(path)
        return plan

    def _load_tensors(self, path: Path) -> None:
        beside = path.with_name(Path(self.tensors.file).name)
        if not beside.is_file():
            raise DataError(f"{path} needs {beside.name} beside it, and it is not there; copy both files")
        found = hashlib.sha256(beside.read_bytes()).hexdigest()
        if found != self.tensors.sha256:
            raise DataError(
                f"{beside} is damaged or belongs to another plan: its sha256 is {found[:12]}..., "
                f"{path.name} says {self.tensors.sha256[:12]}..."
            )
        try:
            with safe_open(beside, "pt") as file:
                self._tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                self._model_digests.update(json.loads(file.metadata()["model"]))
        except SafetensorError as error:
            raise DataError(f"{beside} is damaged: {error}") from error
        for layer in self.layers:
            precision = Precision.parse(f"{layer.weight}/{layer.input}")
            needed = [f"{layer.name}/weight_{key}" for key in parameter_names(precision.weight)]
            if precision.input.has_static_range:
                needed += [f"{layer.name}/input_scale", f"{layer.name}/input_zero_point"]
            for name in needed:
                if name not in self._tensors:
                    raise DataError(
                        f"{beside} lacks {name}, which the {layer.weight}/{layer.input} of that layer needs"
                    )


def plan_tensors(simulated: QuantizedModel, policy: Policy, altered: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Collects what places a policy's formats on the number line, and the altered tensors, by name in the file."""
    tensors = {f"altered/{name}": value.detach().clone() for name, value in altered.items()}
    for layer, precision in policy.items():
        if not precision.weight.is_float:
            for key, value in simulated.stored_parameters(layer, precision).items():
                tensors[f"{layer}/weight_{key}"] = value.clone()
        if precision.input.has_static_range:
            tensors |= _range_tensors(f"{layer}/input", simulated.input_range(layer, precision.input))
    operation_format = Format.parse(simulated.settings.operation_format)
    read = {point.tensor for point in simulated.points if point.readers}  # have the range of the input they are
    for tensor, format in formats_of(simulated.points, simulated.network, policy, operation_format).items():
        if format.has_static_range and tensor not in read:
            tensors |= _range_tensors(f"{tensor}/tensor", simulated.tensor_range(tensor, format))
    return tensors


def _range_tensors(prefix: str, range_: Range) -> dict[str, Tensor]:
    return {
        f"{prefix}_scale": torch.tensor(range_.scale, dtype=torch.float32),
        f"{prefix}_zero_point": torch.tensor(range_.zero_point, dtype=torch.int32),
    }


def pack(tensors: Mapping[str, Tensor], model_digests: Mapping[str, str]) -> bytes:
    """Returns the bytes of the tensor file, the same for the same content."""
    return save(dict(sorted(tensors.items())), {"model": json.dumps(dict(model_digests))})


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """Shape, type and SHA-256 of the values of every tensor in the state dict, buffers included."""
    digests = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        digests[name] = f"{kind} {hashlib.sha256(values).hexdigest()}"
    return digests


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and values of the state dict, buffers included."""
    return hashlib.sha256(json.dumps(tensor_digests(model), sort_keys=True).encode()).hexdigest()
