"""Scores of samples by themselves: the product of the gradient at what a choice changes with the change.

A change is that of a weight or bias, the same for all samples, or of a tensor. All samples' gradients come from one
backward pass: at tensors as they are, of parameters as `search.sensitivity.per_sample` takes them apart by layer.

Whether a network can be taken apart is tried out on two samples first. One that cannot, because samples share what a
layer computes, weights are used outside of their layer, or layers are parts of recurrent or attention modules, is
scored one sample after the other: the same numbers, in more time.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwmodels.precision import FLOAT_PRECISION
from search.errors import DataError
from search.kinds import MODULE_KINDS
from search.quality.subsets import is_regular, sample_count, select
from search.quantize.simulate import QuantizedModel, exact_inference
from search.sensitivity.changes import Changes, Site, formats_at, quantized_at
from search.sensitivity.choices import Base, Choice
from search.sensitivity.cotangents import loss_slope
from search.sensitivity.passes import Pass, Passes, Visit
from search.sensitivity.per_sample import bias_gradients, by_sample, weight_gradients
from search.sensitivity.tangent import slope
from search.tasks.task import Task

PASS_BYTES = 1 << 28  # of what layers read and write, and of gradients, in one pass
GRADIENT_VALUES = 1 << 24  # of one parameter's per-sample gradients held at a time
AGREEMENT = 0.1
"""How far a weight's score may be from that of the sample alone, in units of the root of its squared summands.

What adds up wrongly differs by about one. Values that round another way, as they do in batches of another size where
the base quantizes, differ by far less; so may the scores of inputs, which are not compared.
"""

logger = logging.getLogger(__name__)


class UnclearError(Exception):
    """It is not clear which of a layer's values belong to which sample."""


@dataclass(frozen=True)
class Scored:
    """Scores of some samples.

    Attributes:
        rows: `s`, float64, shape `(cotangents, samples, K)`.
        squares: `sum g^2 d^2` over samples and drawn cotangents, shape `(K,)`.
    """

    rows: np.ndarray
    squares: np.ndarray


Cotangents = Callable[[Tensor, Any], list[Tensor]]  # from outputs and their samples to what is sent backward


class SampleScorer:
    """Scores samples, as many at once as fit.

    Attributes:
        samples_at_once: How many those are; one where they cannot be told apart.
    """

    def __init__(self, task: Task, simulated: QuantizedModel, choices: Sequence[Choice], base: Base) -> None:
        self.samples_at_once = 1
        self._task, self._simulated, self._count = task, simulated, len(choices)
        self._of_weights = np.array([choice.decision.side == "weight" for choice in choices])
        self._held = formats_at(simulated, base)
        self._is_float = all(precision == FLOAT_PRECISION for precision in base.values())
        self._changes = Changes(simulated, choices, base)
        self._passes = Passes(simulated, task, base, self._changes.sites)
        self._axes: dict[Site, int] | None = None  # of the samples; None where they are scored one by one
        self._weights = {layer: simulated.weight_name(layer) for layer in simulated.network.names}
        self._biases = {layer: simulated.bias_name(layer) for layer in simulated.network.names}

    def slopes(self, outputs: Tensor, batch: Any) -> list[Tensor]:
        """The slope of the divergence from the float outputs; at the float base of the loss, none without labels."""
        if self._is_float:
            found = loss_slope(self._task, outputs, batch)
            return [] if found is None else [found]
        with exact_inference():
            reference = self._task.outputs(self._simulated.apply({}), batch)
        return [slope(self._task, reference.clone(), outputs)]

    def rehearse(self, batches: Sequence[Any], cotangents: int) -> None:
        """Finds out where layers keep samples apart, from two samples alone and together."""
        batch = next((batch for batch in batches if (sample_count(batch) or 0) > 1), None)
        if batch is None or not is_regular([batch]):
            return
        first, second, pair = (select([batch], [torch.tensor(rows)]) for rows in ([0], [1], [0, 1]))

        def vectors(*rows: int) -> Cotangents:
            def draw(outputs: Tensor, batch: Any) -> list[Tensor]:
                generator = torch.Generator().manual_seed(0)
                return [torch.randn((2, *outputs.shape[1:]), generator=generator)[list(rows)].to(outputs)]

            return draw

        alone = [self.score(first, 1, vectors(0), 1), self.score(second, 1, vectors(1), 1)]
        one, two = (self._passes.run(part, gradients=False).visits for part in (first, pair))
        try:
            self._axes = self._axes_of(one, two)
            together = self.score(pair, 2, vectors(0, 1), 1)
        except UnclearError as error:
            self.give_up(str(error))
            return
        away = np.abs(together.rows - np.concatenate([scored.rows for scored in alone], 1)).max((0, 1))
        precision = torch.finfo(next(iter(self._simulated.model.parameters())).dtype).eps
        tolerance = max(AGREEMENT, 16 * precision) * np.sqrt(sum(scored.squares for scored in alone))
        if (away > tolerance)[self._of_weights].any():
            self.give_up("the gradients of its layers do not add up to those of its parameters")
            return
        bytes_per_sample = sum(visit.bytes for visit in two) / 2
        self.samples_at_once = max(1, int(PASS_BYTES / max(bytes_per_sample * (2 + cotangents), 1)))

    def give_up(self, reason: str) -> None:
        """Scores samples one by one from now on."""
        self._axes, self.samples_at_once = None, 1
        name = type(self._simulated.model).__name__
        logger.warning("%s: %s; its samples are scored one by one", name, reason)

    def _axes_of(self, one: Sequence[Visit], two: Sequence[Visit]) -> dict[Site, int]:
        """The axis of the samples at every site: the one that is twice as long for two samples as for one."""
        kinds = {layer.name: layer.kind for layer in self._simulated.network}
        opaque = next((name for name, kind in kinds.items() if kind not in MODULE_KINDS.values()), None)
        if opaque:
            raise UnclearError(f"{opaque} is a weight of a {kinds[opaque]} module, which cannot be taken apart")
        if [visit.site for visit in one] != [visit.site for visit in two]:
            raise UnclearError("one sample takes another path than two")
        axes: dict[Site, int] = {}
        for a, b in zip(one, two, strict=True):
            differing = [axis for axis, sizes in enumerate(zip(a.shape, b.shape, strict=True)) if sizes[0] != sizes[1]]
            if len(differing) != 1 or b.shape[differing[0]] != 2 * a.shape[differing[0]]:
                raise UnclearError(f"samples share what {a.site.name} computes")
            if axes.setdefault(a.site, differing[0]) != differing[0]:
                raise UnclearError(f"{a.site.name} has samples along several axes")
        return axes

    def score(self, batch: Any, samples: int, cotangents: Cotangents, draws: int) -> Scored:
        """Scores samples.

        Args:
            batch: The samples.
            samples: How many.
            cotangents: What is sent backward.
            draws: How many of these, the first ones, count for `squares`.
        """
        parameters = list(self._changes.parameters) if self._axes is None else []
        run = self._passes.run(batch, parameters)
        if self._passes.copy_overwritten(run.visits):
            return self.score(batch, samples, cotangents, draws)
        if len(run.outputs) != samples:
            raise DataError(
                f"`outputs` of task {self._task.name} returns {len(run.outputs)} rows for {samples} samples; "
                "it must return samples along the first axis"
            )
        sent = cotangents(run.outputs, batch)
        of_parameters = [dict(zip(parameters, run.backward(cotangent), strict=True)) for cotangent in sent]
        rows = torch.zeros((len(sent), samples, self._count), dtype=torch.float64, device=run.outputs.device)
        squares = rows.new_zeros(self._count)
        with torch.no_grad():
            for name, positions in self._changes.parameters.items():
                changes = self._changes.of(name).flatten(1)
                for index in range(len(sent)) if changes.any() else ():
                    whole = of_parameters[index].get(name)
                    for part, gradients in self._gradients(name, run, samples, index, whole):
                        flat = gradients.float().flatten(1)
                        rows[index, part][:, positions] += (flat @ changes.mT).double()
                        if index < draws:
                            squares[positions] += (changes.square() @ flat.square().sum(0)).double()
            for visits in self._by_tensor(run):
                self._score_tensor(visits, rows, squares, draws)
        return Scored(rows.cpu().numpy(), squares.cpu().numpy())

    def _gradients(
        self, parameter: str, run: Pass, samples: int, index: int, whole: Tensor | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields slices of the samples and the gradient of a parameter for each of these, over all that use it.

        Args:
            parameter: A weight or a bias.
            run: A pass, gone backward.
            samples: How many went through it.
            index: Of the backward pass.
            whole: The gradient over all samples, where there is but one.
        """
        if whole is not None:
            yield slice(0, 1), whole.unsqueeze(0)
            return
        visits = [visit for visit in run.visits if visit.module is not None and len(visit.to_output) > index]
        as_weight = [visit for visit in visits if self._weights[visit.site.name] == parameter]
        as_bias = [visit for visit in visits if self._biases[visit.site.name] == parameter]
        if not as_weight and not as_bias:
            return
        at_once = max(1, GRADIENT_VALUES // self._simulated.model.get_parameter(parameter).numel())
        for part in (slice(start, start + at_once) for start in range(0, samples, at_once)):
            found = [
                weight_gradients(
                    visit.module,
                    self._entries(visit, visit.used, samples)[part],
                    self._entries(visit, visit.to_output[index], samples)[part],
                )
                for visit in as_weight
                if visit.module
            ]
            found += [
                bias_gradients(visit.module, self._entries(visit, visit.to_output[index], samples)[part])
                for visit in as_bias
                if visit.module
            ]
            yield part, torch.stack(found).sum(0) if len(found) > 1 else found[0]

    def _by_tensor(self, run: Pass) -> list[list[Visit]]:
        """Groups visits whose choices change the same tensor alike, as those of layers that read it."""
        groups: defaultdict[Any, list[Visit]] = defaultdict(list)
        for visit in run.visits:
            if visit.site in self._changes.sites and visit.to_input:
                axis = 0 if visit.site.is_produced else self._simulated.feature_axis(visit.site.name)
                formats = (self._held.get(visit.site), *self._changes.sites[visit.site].items())
                raw = visit.raw
                groups[raw.data_ptr(), raw.shape, raw.stride(), axis, formats].append(visit)
        return list(groups.values())

    def _score_tensor(self, visits: Sequence[Visit], rows: Tensor, squares: Tensor, draws: int) -> None:
        """Adds the scores of changes of one tensor, read by several layers or one."""
        first, samples = visits[0], rows.shape[1]
        gradients = torch.stack(
            [
                self._entries(first, sum(given[1:], given[0]), samples).flatten(1).float()
                for given in zip(*(visit.to_input for visit in visits), strict=True)
            ]
        )
        squared = gradients[:draws].square().sum(0)
        for position, format in self._changes.sites[first.site].items():
            change = quantized_at(self._simulated, first.site, format, first.raw) - first.used
            change = self._entries(first, change, samples).flatten(1).float()
            rows[:, :, position] += torch.bmm(gradients.transpose(0, 1), change.unsqueeze(2))[:, :, 0].T.double()
            squares[position] += (squared * change.square()).sum().double()

    def _entries(self, visit: Visit, x: Tensor, samples: int) -> Tensor:
        """What a visit read or wrote, sample by sample."""
        axis = self._axes.get(visit.site) if self._axes is not None else 0
        if axis is None or x.shape[axis] % samples:
            raise UnclearError(f"a batch takes another path through {visit.site.name} than the first did")
        return by_sample(x, axis, samples)
