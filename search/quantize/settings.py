"""What the user may set about the simulation, and the ranges it found."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hwmodels import Format
from search.errors import ConfigError, closest
from search.quantize.affine import Range
from search.quantize.formats import Parameters
from search.quantize.ranges import WEIGHT_METHODS, check_method

WeightChoice = tuple[str, Format]  # layer, weight format
InputChoice = tuple[str, Format]  # layer, input format
TensorChoice = tuple[str, Format]  # tensor, its format

PLACEMENTS = ("inputs", "full")
LOOP_REPAIRS = ("auto", "none", "bias", "batch_norm")


@dataclass(frozen=True)
class QuantizerSettings:
    """How tensors are quantized.

    Attributes:
        weight_range: How the scales of weights are chosen: a name in `search.quantize.ranges.WEIGHT_METHODS`.
        input_range: How the ranges of inputs are chosen: a name in `search.quantize.ranges.METHODS`.
        output_range: With `placement=full`, how the ranges of what the network returns are chosen, likewise;
            `cross_entropy` is for logits.
        percentile: Share of the values, in percent, that `percentile` keeps.
        placement: `inputs` quantizes what layers read; `full` also the operands and results of additions,
            concatenations and pooling, and what the network reads and returns.
        operation_format: With `full`, the format of tensors that no layer reads.
        repair: What applying a choice repairs for free: `none`; `bias`, the mean of every output channel; `batch_norm`,
            mean and standard deviation; `auto` stands for the one that measuring finds best, and has to be replaced by
            it (`search.quality.loop_repair`) before anything is quantized.
        memory_bytes: Most memory that quantized weights may take; null is a quarter of what is free.
    """

    weight_range: str = "mse"
    input_range: str = "mse"
    output_range: str = "mse"
    percentile: float = 99.99
    placement: str = "inputs"
    operation_format: str = "uint8"
    repair: str = "none"
    memory_bytes: int | None = None

    @property
    def repairs(self) -> bool:
        """Whether calibration has to prepare repairs."""
        return self.repair != "none"

    def with_repair(self, repair: str) -> QuantizerSettings:
        """The same settings with another repair."""
        return replace(self, repair=repair)

    def __post_init__(self) -> None:
        check_method("quantizer.weight_range", self.weight_range, WEIGHT_METHODS)
        check_method("quantizer.input_range", self.input_range)
        check_method("quantizer.output_range", self.output_range)
        for key, given, allowed in (
            ("placement", self.placement, PLACEMENTS),
            ("repair", self.repair, LOOP_REPAIRS),
        ):
            if given not in allowed:
                raise ConfigError(
                    f"quantizer.{key}={given} is unknown{closest(given, allowed)}; allowed: {', '.join(allowed)}"
                )
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"quantizer.percentile={self.percentile} must lie above 50 and at most at 100")
        if self.memory_bytes is not None and self.memory_bytes < 0:
            raise ConfigError(f"quantizer.memory_bytes={self.memory_bytes} must not be negative")
        try:
            operation_format = Format.parse(self.operation_format)
            operation_format.check("input")
        except ValueError as error:
            raise ConfigError(f"quantizer.operation_format: {error}") from error


@dataclass
class Ranges:
    """What places formats on the number line for one network, computed when first asked for.

    Attributes:
        weights: (layer, format) to the parameters of the weight: scales, zero points, codebooks.
        inputs: (layer, format) to the static range of the input.
        tensors: With `placement=full`, (tensor, format) to the static range of a tensor that is quantized where it is
            produced.
    """

    weights: dict[WeightChoice, Parameters] = field(default_factory=dict)
    inputs: dict[InputChoice, Range] = field(default_factory=dict)
    tensors: dict[TensorChoice, Range] = field(default_factory=dict)

    def copy(self) -> Ranges:
        """A copy whose dictionaries may be changed; the tensors are shared."""
        return Ranges(dict(self.weights), dict(self.inputs), dict(self.tensors))
