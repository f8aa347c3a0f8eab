"""Networks whose channels can be rescaled, and some whose cannot, simulated on random data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hwmodels import Precision
from search.policy import Policy
from search.quantize.fold import fold_batch_norm
from search.quantize.simulate import QuantizedModel, exact_inference
from search.quiet import quietly
from search.tasks.task import Split, Task, call, tensors_in
from search.trace import trace


class Given(Task):
    """A model and the batches of inputs that it is given on every split."""

    name = "given"

    def __init__(self, model: nn.Module, *batches: Any) -> None:
        self.model = model.eval()
        self.example_input = batches[0]
        self._batches = batches

    def batches(self, split: Split) -> Iterator[Any]:
        return iter(self._batches)

    def inputs(self, batch: Any) -> Any:
        return batch

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        return torch.zeros(len(outputs))


class Of(nn.Module):
    """A model with parts of any kind and any forward."""

    def __init__(self, body: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Tensor) -> Any:
        return self.body(self, *args)


def simulate(task: Task) -> QuantizedModel:
    """Folds, traces and calibrates."""
    folded = fold_batch_norm(task.model, task.example_input)
    simulated = QuantizedModel(folded.model, trace(folded.model, task.example_input))
    simulated.calibrate(task.inputs(batch) for batch in task.batches("calibration"))
    return simulated


def uniform(simulated: QuantizedModel, precision: str) -> Policy:
    """Gives every layer the same precision."""
    return Policy.uniform(simulated.network, Precision.parse(precision))


def outputs(simulated: QuantizedModel, inputs: Any, policy: Policy | None = None) -> list[Tensor]:
    """What the network returns under a policy, in float by default."""
    with exact_inference():
        returned = tensors_in(call(simulated.apply(policy or {}), inputs))
        simulated.apply({})
    return [tensor.clone() for tensor in returned]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Root of the squared error over the squared expectation, over all outputs."""
    error = sum((one.double() - other.double()).square().sum() for one, other in zip(found, expected, strict=True))
    return float(error / sum(other.double().square().sum() for other in expected)) ** 0.5


def parameters(simulated: QuantizedModel) -> dict[str, Tensor]:
    """Copies of all parameters and buffers in float."""
    return {name: value.clone() for name, value in simulated.apply({}).state_dict().items()}


class RMSNorm(nn.Module):
    """As language models write it; Gemma's stores its gain less 1."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(width) * 0.2 + 1 - offset), offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).type_as(x) * (
            self.offset + self.weight
        )


class Block(nn.Module):
    """A pre-norm transformer block: grouped-query attention and a gated feed-forward part, each added to its input."""

    def __init__(
        self,
        width: int = 32,
        heads: int = 4,
        kv_heads: int = 2,
        hidden: int = 48,
        norm: Callable[[int], nn.Module] = RMSNorm,
        gate: Callable[[Tensor], Tensor] = F.silu,
    ) -> None:
        super().__init__()
        self.head, self.repeats, self.gate_function = width // heads, heads // kv_heads, gate
        self.first, self.second = norm(width), norm(width)
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, kv_heads * self.head), nn.Linear(width, kv_heads * self.head)
        self.gate, self.up, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        y = self.first(x)
        q, k, v = (part(y).view(n, length, -1, self.head).transpose(1, 2) for part in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(self.repeats, 1), v.repeat_interleave(self.repeats, 1)
        mixed = torch.softmax(q @ k.mT / self.head**0.5, -1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(n, length, width))
        y = self.second(x)
        return x + self.down(self.gate_function(self.gate(y)) * self.up(y))


def tiny_llama(dtype: torch.dtype = torch.float32, tied: bool = False, layers: int = 2) -> Given:
    """A random Llama of transformers, with outliers in some channels of its norms as trained ones have."""
    with quietly("torchao", "torch.utils._pytree"):
        transformers = pytest.importorskip("transformers")
        model_class = transformers.LlamaForCausalLM
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.copy_(1 + 0.3 * torch.rand(parameter.shape))
                    parameter[::11] *= 8
                elif "embed" not in name:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
        ids = torch.randint(0, 64, (4, 6, 24))
    return Given(model, *ids)
