"""Second derivatives of the loss by weights and inputs: how sharply it bends where a choice moves them.

Products of the Hessian with vectors come from differentiating twice (Pearlmutter, 1994), its trace from random signs
(Hutchinson, 1990), its largest eigenvalue from power iteration. As scores of choices they are those of HAWQ-V2 (Dong et
al., 2019, arXiv 1911.03852), the mean eigenvalue times the squared error, and HAWQ (Dong et al., 2019, arXiv
1905.03696), the largest eigenvalue times it. For inputs both are means over samples.

The loss is the task's, by labels; where there are none, the divergence from the network's own outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from search.errors import DataError, UnsupportedError
from search.quality.subsets import is_regular, sample_count, select
from search.quantize.simulate import QuantizedModel
from search.sensitivity.choices import Choice
from search.sensitivity.distortion import distortion
from search.sensitivity.passes import Passes, Visit, requiring_gradients
from search.space import Decision
from search.tasks.task import Task

PASS_BYTES = 1 << 28  # of what layers read and write, in all copies that two derivatives take
COPIES = 6
ROUND = 4  # probes on one graph
EIGENVALUE_SAMPLES = 64
ITERATIONS = 20
CONVERGED = 0.01  # relative change of an eigenvalue

Blocks = list[list[Tensor]]  # the tensors of each decision


@dataclass(frozen=True)
class Trace:
    """Traces of the Hessian's diagonal blocks, decision by decision.

    Attributes:
        mean: Estimates, of inputs per sample, shape `(decisions,)`.
        error: Their standard errors over probes; infinite for a single probe.
        values: How many values the decision is about, of inputs per sample.
        probes: Number of random vectors.
    """

    mean: np.ndarray
    error: np.ndarray
    values: np.ndarray
    probes: int


def curvature(
    task: Task,
    simulated: QuantizedModel,
    choices: Sequence[Choice],
    names: Sequence[str] = ("hessian_trace",),
    *,
    probes: int = 16,
    tolerance: float = 0.0,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Returns scores of choices at the float network, by name, each of shape `(K,)`.

    They may be negative where the network is at no minimum of the loss.

    Args:
        task: Gives data and loss.
        simulated: The network, calibrated; left in float.
        choices: What is scored.
        names: `hessian_trace`, `hessian_eigenvalue` or both; the latter takes the first 64 samples of the first batch.
        probes: Most random vectors of the trace.
        tolerance: As `hessian_trace` has it.
        seed: Of everything random.

    Raises:
        UnsupportedError: If the network or the loss cannot be differentiated twice.
    """
    error = distortion(task, simulated, choices, with_outputs=False).weight_error
    hessian = _Hessian(task, simulated, choices, seed)
    place = {decision: index for index, decision in enumerate(hessian.decisions)}
    of_choice = np.array([place[choice.decision] for choice in choices])
    found = {}
    if "hessian_trace" in names:
        trace = hessian.trace(probes, tolerance)
        found["hessian_trace"] = (trace.mean / np.maximum(trace.values, 1))[of_choice] * error
    if "hessian_eigenvalue" in names:
        found["hessian_eigenvalue"] = hessian.eigenvalues()[of_choice] * error
    return found


def hessian_trace(
    task: Task,
    simulated: QuantizedModel,
    choices: Sequence[Choice],
    *,
    probes: int = 16,
    tolerance: float = 0.0,
    seed: int = 0,
) -> Trace:
    """Estimates the trace of the Hessian of the mean loss over the weights, or the inputs, of every decision.

    One vector of random signs probes all decisions together, so that a probe costs one pass; what they have in common
    averages out.

    Args:
        task: Gives data and loss.
        simulated: The network.
        choices: Their decisions, each in the order in which it comes first.
        probes: Most random vectors.
        tolerance: Relative error, of all traces as one vector, at which fewer do; looked at every four probes.
        seed: Of the vectors.

    Raises:
        UnsupportedError: If the network or the loss cannot be differentiated twice.
    """
    return _Hessian(task, simulated, choices, seed).trace(probes, tolerance)


class _Hessian:
    """The Hessian of the mean loss at the float network."""

    def __init__(self, task: Task, simulated: QuantizedModel, choices: Sequence[Choice], seed: int) -> None:
        self.decisions: tuple[Decision, ...] = tuple(dict.fromkeys(choice.decision for choice in choices))
        self._task, self._simulated, self._seed = task, simulated, seed
        self._passes = Passes(simulated, task, {})
        self._weights = [
            list(dict.fromkeys(simulated.weight_name(layer) for layer in decision.layers))
            if decision.side == "weight"
            else []
            for decision in self.decisions
        ]
        self._batches = list(task.batches("calibration"))
        if not self._batches:
            raise DataError("the calibration split is empty; curvature is estimated on at least one batch")

    def trace(self, probes: int, tolerance: float) -> Trace:
        """As `hessian_trace` has it."""
        found = np.empty((0, len(self.decisions)))
        values = np.zeros(len(self.decisions))
        while len(found) < probes:
            size = min(ROUND, probes - len(found))
            sums, samples = np.zeros((size, len(self.decisions))), 0
            for index, part in enumerate(self._parts()):
                with self._slopes(part) as (count, blocks, slopes, read):
                    samples += count
                    values = np.array([sum(t.numel() for t in tensors) for tensors in read], float)
                    values[self._of_inputs] /= count
                    for probe in range(size):
                        vectors = self._signs(blocks, len(found) + probe, index)
                        products = _product(slopes, blocks, vectors)
                        sums[probe] += [_dot(v, h) for v, h in zip(vectors, products, strict=True)]
            found = np.concatenate([found, sums / samples])
            error = found.std(0, ddof=1) / len(found) ** 0.5 if len(found) > 1 else np.full(len(values), np.inf)
            if np.linalg.norm(error) <= tolerance * np.linalg.norm(found.mean(0)):
                break
        return Trace(found.mean(0), error, values, len(found))

    def eigenvalues(self) -> np.ndarray:
        """The largest eigenvalue in magnitude of every decision's block; of inputs the mean over samples."""
        rows = min(EIGENVALUE_SAMPLES, sample_count(self._batches[0]) or 0)
        part = (
            select(self._batches[:1], [torch.arange(rows)]) if self._can_select(self._batches[0]) else self._batches[0]
        )
        found = np.zeros(len(self.decisions))
        with self._slopes(part) as (count, blocks, slopes, _):
            start = self._signs(blocks, 0, 0)
            for index, (tensors, of_loss) in enumerate(zip(blocks, slopes, strict=True)):
                is_input = bool(self._of_inputs[index])

                def times(vectors: list[Tensor], tensors: Any = tensors, of_loss: Any = of_loss) -> list[Tensor]:
                    return _product([of_loss], [tensors], [vectors])[0]

                scale = 1 if is_input else count
                found[index] = _largest(times, start[index], is_input and all(len(t) == count for t in tensors)) / scale
        return found

    @property
    def _of_inputs(self) -> np.ndarray:
        return np.array([decision.side == "input" for decision in self.decisions])

    def _can_select(self, batch: Any) -> bool:
        return sample_count(batch) is not None and is_regular([batch])

    def _parts(self) -> Iterator[Any]:
        """The data in parts that fit into memory; batches as they are where samples cannot be taken out."""
        for batch in self._batches:
            samples = sample_count(batch)
            if samples is None or not is_regular([batch]):
                yield batch
                continue
            probe = self._passes.run(select([batch], [torch.tensor([0])]), gradients=False)
            at_once = max(1, int(PASS_BYTES / max(COPIES * sum(visit.bytes for visit in probe.visits), 1)))
            for rows in torch.split(torch.arange(samples), at_once):
                yield select([batch], [rows])

    @contextmanager
    def _slopes(self, part: Any) -> Iterator[tuple[int, Blocks, Blocks, Blocks]]:
        """Runs a part; gives its number of samples, the tensors of every decision, and the loss's slopes there.

        The last item holds every tensor that several layers read once.
        """
        names = list(dict.fromkeys(name for weights in self._weights for name in weights))
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
            run = self._passes.run(part, names, keep=False)
            loss = self._loss(run.live_outputs, run.outputs, part)
        model = self._simulated.model
        blocks: Blocks = []
        read: Blocks = []
        for decision, weights in zip(self.decisions, self._weights, strict=True):
            if decision.side == "weight":
                blocks.append([model.get_parameter(name) for name in weights])
                read.append(blocks[-1])
                continue
            visits = [visit for visit in run.visits if visit.site.name in decision.layers and _is_read(visit)]
            blocks.append([visit.live for visit in visits])
            read.append(list({visit.raw.data_ptr(): visit.raw for visit in visits}.values()))
        with requiring_gradients(model.get_parameter(name) for name in names):
            if not loss.requires_grad:
                raise UnsupportedError(
                    f"the loss of task {self._task.name} cannot be differentiated by the outputs; compute it in torch"
                )
            given = iter(_derivative([loss.sum()], _flat(blocks), create_graph=True))
            slopes = [[next(given) for _ in tensors] for tensors in blocks]
            yield len(run.outputs), blocks, slopes, read

    def _loss(self, live: Tensor, outputs: Tensor, part: Any) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            try:
                return self._task.loss(live, part)
            except UnsupportedError:
                return self._task.divergence(outputs, live)

    def _signs(self, blocks: Blocks, probe: int, part: int) -> Blocks:
        """Random signs; for weights the same ones for all parts of the data."""
        found = []
        for index, (decision, tensors) in enumerate(zip(self.decisions, blocks, strict=True)):
            key = (self._seed, probe, index, *([part] if decision.side == "input" else []))
            generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
            found.append([(torch.randint(2, t.shape, generator=generator) * 2 - 1).to(t) for t in tensors])
        return found


def _is_read(visit: Visit) -> bool:
    return visit.module is not None and visit.live.requires_grad


def _flat(blocks: Blocks) -> list[Tensor]:
    return [tensor for tensors in blocks for tensor in tensors]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def _product(slopes: Blocks, blocks: Blocks, vectors: Blocks) -> Blocks:
    """The Hessian, as the derivative of the slopes by the blocks' tensors, times vectors."""
    pairs = [(s, v.to(s)) for s, v in zip(_flat(slopes), _flat(vectors), strict=True) if s.requires_grad]
    given = iter(_derivative([s for s, _ in pairs], _flat(blocks), [v for _, v in pairs]))
    return [[next(given) for _ in tensors] for tensors in blocks]


def _derivative(
    of: list[Tensor], by: list[Tensor], vectors: list[Tensor] | None = None, create_graph: bool = False
) -> list[Tensor]:
    """The derivative of tensors times vectors, zero where one does not depend on the other."""
    if not of:
        return [torch.zeros_like(tensor) for tensor in by]
    try:
        found = torch.autograd.grad(of, by, vectors, retain_graph=True, create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise UnsupportedError(
            f"the loss cannot be differentiated twice: {error}; leave out the scores hessian_trace, hessian_eigenvalue"
        ) from error
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, by, strict=True)]


def _largest(times: Callable[[list[Tensor]], list[Tensor]], start: list[Tensor], by_sample: bool) -> float:
    """The largest eigenvalue in magnitude by power iteration; by sample, the mean of those of the samples' blocks."""

    def norm(tensors: list[Tensor]) -> Tensor:
        if by_sample:
            return sum((t.double().square().flatten(1).sum(1) for t in tensors), torch.tensor(0.0)).sqrt()
        return sum((t.double().square().sum() for t in tensors), torch.tensor(0.0)).sqrt()

    def unit(tensors: list[Tensor]) -> list[Tensor]:
        length = norm(tensors)
        length = torch.where(length > 0, length, 1.0)
        return [
            t / length.to(t.dtype).view(-1, *[1] * (t.dim() - 1)) if by_sample else t / length.to(t) for t in tensors
        ]

    if not start:
        return 0.0
    vectors, value = unit(start), 0.0
    for _ in range(ITERATIONS):
        vectors = times(vectors)
        last, value = value, float(norm(vectors).mean())
        vectors = unit(vectors)
        if abs(value - last) <= CONVERGED * value:
            break
    return value
