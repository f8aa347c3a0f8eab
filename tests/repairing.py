"""A task around any module and any inputs, to try repairs on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hwmodels import Precision
from search.quantize.fold import fold_batch_norm
from search.quantize.settings import QuantizerSettings
from search.quantize.simulate import QuantizedModel, exact_inference
from search.recover.statistics import Gram, matrix_error
from search.recover.unfold import as_matrix
from search.recover.watch import watch
from search.tasks.task import Split, Task
from search.trace import trace

# Every kind of layer that can be written as a matrix product, with the shape of one batch of inputs.
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]]
with torch.random.fork_rng():
    torch.manual_seed(1)  # whatever was drawn before
    LAYERS = {
        "linear": (nn.Linear(7, 5), (3, 4, 7)),
        "conv1d": (nn.Conv1d(4, 6, 3, padding=2, dilation=2, stride=2), (3, 4, 11)),
        "conv2d": (nn.Conv2d(3, 4, 3), (2, 3, 6, 7)),
        "one sample": (nn.Conv2d(3, 4, 3), (3, 6, 7)),
        "same padding, two groups": (nn.Conv2d(4, 6, (3, 5), padding="same", groups=2), (2, 4, 7, 6)),
        "depthwise, reflected": (nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="reflect"), (2, 4, 7, 6)),
        "conv3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 4, 5, 6)),
        "transposed 1d, gaps": (nn.ConvTranspose1d(3, 2, 2, stride=3, dilation=2), (2, 3, 5)),
        "transposed 2d, two groups": (
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            (2, 4, 5, 6),
        ),
        "transposed 2d, cropped": (nn.ConvTranspose2d(3, 3, 1, padding=1, groups=3), (1, 3, 5, 6)),
        "transposed 3d": (nn.ConvTranspose3d(2, 4, 2, padding=1), (2, 2, 3, 4, 5)),
    }


class DataTask(Task):
    """A model on given inputs; nothing is scored."""

    name = "data"

    def __init__(self, model: nn.Module, inputs: Tensor, batch: int = 16) -> None:
        self.model = model.eval()
        self.example_input = inputs[:2]
        self._batches = inputs.split(batch)

    def batches(self, split: Split) -> Iterator[Any]:
        return iter(self._batches)

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        return torch.zeros(len(outputs))

    def run(self, simulated: QuantizedModel, policy: dict[str, Precision]) -> Tensor:
        """What the model returns for all inputs under a policy."""
        model = simulated.apply(policy)
        with exact_inference():
            return torch.cat([self.outputs(model, batch) for batch in self.batches("calibration")])


def simulate(model: nn.Module, inputs: Tensor, batch: int = 16, **settings: Any) -> tuple[DataTask, QuantizedModel]:
    """Folds, traces and calibrates a model on given inputs."""
    task = DataTask(model, inputs, batch)
    folded = fold_batch_norm(task.model, task.example_input)
    network = trace(folded.model, task.example_input)
    simulated = QuantizedModel(folded.model, network, QuantizerSettings(**settings))
    simulated.calibrate(task.inputs(batch) for batch in task.batches("calibration"))
    return task, simulated


def uniform(simulated: QuantizedModel, precision: str) -> dict[str, Precision]:
    """The same precision for every layer."""
    return dict.fromkeys(simulated.network.names, Precision.parse(precision))


def correlated(*shape: int, axis: int = 1, seed: int = 0) -> Tensor:
    """Positive inputs whose features along `axis` are mixtures of a few: what layers after a ReLU read."""
    generator = torch.Generator().manual_seed(seed)
    features = shape[axis]
    size = [*shape]
    del size[axis]
    sources = torch.randn(*size, features, generator=generator) * torch.logspace(0, -1.5, features)
    mixed = sources @ torch.randn(features, features, generator=generator)
    return torch.relu(mixed).movedim(-1, axis).contiguous()


def state(simulated: QuantizedModel) -> dict[str, Tensor]:
    """The float network's parameters and buffers."""
    return {name: value.clone() for name, value in simulated.apply({}).state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """True if two states are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def layer_error(
    simulated: QuantizedModel, repaired: QuantizedModel, task: Task, policy: Mapping[str, Precision], layer: str
) -> float:
    """Squared error that a layer's quantized weight makes in its output, for the inputs of the network not repaired."""
    gram = Gram(simulated.owner(layer))
    watch(simulated, policy, task, inputs={layer: gram.add})
    error = repaired.quantized_weight(layer, policy[layer].weight) - simulated.float_weight(layer)
    return matrix_error(as_matrix(simulated.owner(layer), error), gram.value).sum().item()
