"""Runs many policies on the same data, and computes what they have in common once.

Policies that agree on the first layers compute the same up to the first layer on which they differ. So a set of
policies is run as a tree: they are told apart by one layer after the other, in the order in which layers run, and where
the tree forks, what the network has computed so far is kept for all branches (`search.quantize.recording`). Where each
policy quantizes one layer, every one takes only the network from its layer on, and memory only the activations there.

Results are those of a full evaluation, bit for bit. That is tried out before it is relied upon: the float network, run
from cut to cut, one layer after the other, must return exactly what it returns in one go. A network for which it does
not is run in full, and `PrefixRunner.trouble` says why.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hwmodels import Format, Precision
from hwmodels.precision import FLOAT_PRECISION
from search.quantize.cache import SHARE_OF_FREE_MEMORY, free_memory
from search.quantize.placement import Point, formats_of
from search.quantize.recorder import Recorder, Stops
from search.quantize.recording import DivergedError, Recording, Replay
from search.quantize.simulate import QuantizedModel, exact_inference
from search.tasks.task import Task

T = TypeVar("T")
Policy = Mapping[str, Precision]
Recordings = list[Recording]  # one for every batch

REHEARSED_BATCHES = 2  # in turns, so that what one leaves behind in the model would show in the other

logger = logging.getLogger(__name__)


class PrefixRunner:
    """Runs policies on the same batches.

    Attributes:
        trouble: Why every policy is run in full; None where prefixes are reused.
        memory_limit: Most bytes that recordings may take; what does not fit is computed again.
        peak_bytes: Most bytes that they took.
    """

    def __init__(
        self, simulated: QuantizedModel, task: Task, batches: Sequence[Any], memory_limit: int | None = None
    ) -> None:
        """Creates a runner.

        Args:
            simulated: The network, calibrated.
            task: Runs it on a batch.
            batches: The data.
            memory_limit: Most bytes that recordings may take; by default a quarter of what is free.
        """
        device = simulated.weight(simulated.network.names[0]).device
        self.memory_limit = int(free_memory(device) * SHARE_OF_FREE_MEMORY) if memory_limit is None else memory_limit
        self.peak_bytes = 0
        self.trouble: str | None = None
        self._simulated = simulated
        self._task = task
        self._batches = batches
        self._is_rehearsed = False
        self._copied: set[nn.Module] = set()  # modules whose answers the model writes to
        self._unanswered: set[nn.Module] = set()
        self._held: list[Recordings] = []  # of the branch of the tree that is being run, fork by fork

    def run(self, policy: Policy, read: Callable[[Tensor, int], T]) -> list[T]:
        """Runs one policy in full, and returns what was read of its outputs, as `sweep` does."""
        return self._run(policy, [Recording()] * len(self._batches), read)

    def sweep(self, policies: Sequence[Policy], read: Callable[[Tensor, int], T]) -> Iterator[tuple[int, list[T]]]:
        """Yields the index of every policy, in an order that suits the network, and what was read of its outputs.

        Args:
            policies: The policies.
            read: Takes the outputs on a batch and the batch's index, and returns what is to be kept of them.
        """
        if policies:
            tree = _Tree(self._simulated, policies)
            yield from self._visit(tree, np.arange(len(policies)), [Recording()] * len(self._batches), read)

    def _visit(
        self, tree: _Tree, group: np.ndarray, known: Recordings, read: Callable[[Tensor, int], T]
    ) -> Iterator[tuple[int, list[T]]]:
        """Runs policies that agree on all that is recorded; the largest branch last, when its fork can be forgotten."""
        with self._holding(known) as recordings:
            while len(differing := tree.differing(group)):
                self._advance(tree.policies[group[0]], recordings, tree.stops(differing))
                *others, group = tree.branches(group, differing[0])
                for branch in others:
                    yield from self._visit(tree, branch, recordings, read)
            found = self._run(tree.policies[group[0]], recordings, read)
        for index in group:
            yield int(index), found

    def _run(self, policy: Policy, recordings: Recordings, read: Callable[[Tensor, int], T]) -> list[T]:
        model = self._simulated.apply(policy)
        return [read(self._outputs(model, index, recording), index) for index, recording in enumerate(recordings)]

    def _outputs(self, model: nn.Module, index: int, recording: Recording) -> Tensor:
        run = partial(self._task.outputs, model, self._batches[index])
        with exact_inference():
            if self.trouble or not recording.calls or recording.written:
                return run()
            try:
                outputs = Replay(recording, self._copied).play(model, run)
            except DivergedError as error:
                self._give_up(str(error))
                return run()
        self._copied |= recording.written
        return outputs

    def _advance(self, policy: Policy, recordings: Recordings, stops: Stops) -> None:
        """Goes on with the recordings up to the first of the stops, as far as they fit."""
        if not self._is_rehearsed:
            self._rehearse()
            self._is_rehearsed = True
        model = self._simulated.apply(policy)
        for index in range(len(self._batches)):
            if self.trouble or not self._record(model, index, recordings, stops):
                return

    def _record(self, model: nn.Module, index: int, recordings: Recordings, stops: Stops) -> bool:
        """Goes on with one batch's recording; False if it stays as it is, because the result does not fit."""
        start = recordings[index]
        run = partial(self._task.outputs, model, self._batches[index])
        while True:
            self._copied |= (unusable := start.written)
            recorder = Recorder(Recording() if unusable else start, self._copied, stops, self._unanswered)
            try:
                recordings[index] = recorder.record(model, run)
            except DivergedError as error:
                self._give_up(str(error))
                return False
            written = recordings[index].written
            if not written:
                break
            if written <= self._copied:
                self._give_up("the model writes to what its modules returned while they run")
                return False
            self._copied |= written
        held = self._held_bytes()
        if held > self.memory_limit:
            recordings[index] = start
            return False
        self.peak_bytes = max(self.peak_bytes, held)
        return True

    def _rehearse(self) -> None:
        """Tries out whether the float network, run from cut to cut, returns what it returns in one go.

        Batches take turns, so that what one leaves behind in the model would show in the other.
        """
        count = min(REHEARSED_BATCHES, len(self._batches))
        model = self._simulated.apply({})
        expected, self._unanswered = self._plainly(model, count)
        with self._holding([Recording()] * count) as recordings:
            try:
                for layer in self._simulated.network.names:
                    stops = Stops({self._simulated.owner(layer)}, {id(self._simulated.weight(layer))})
                    for index in range(count):
                        self._record(model, index, recordings, stops)
                    if self.trouble:
                        return
                found = [self._outputs(model, index, recording) for index, recording in enumerate(recordings)]
            except Exception as error:  # whatever breaks when parts of the user's model do not run
                self._give_up(f"{type(error).__name__}: {error}")
                return
        if not all(map(torch.equal, expected, found)):
            self._give_up("its outputs are others; modules seem to remember earlier calls, or to draw random numbers")

    def _plainly(self, model: nn.Module, count: int) -> tuple[list[Tensor], set[nn.Module]]:
        """Outputs on the first batches, and modules that must not be answered.

        With `placement=full`, a tensor is known by how often its function was called in its module before; so modules
        that are called several times run every time.
        """
        calls: Counter[nn.Module] = Counter()
        with ExitStack() as hooks:
            for module in model.modules():
                hooks.callback(module.register_forward_pre_hook(lambda module, args: calls.update([module])).remove)
            outputs = [self._outputs(model, index, Recording()) for index in range(count)]
        if not self._simulated.points:
            return outputs, set()
        again = {module for module, number in calls.items() if number > count}
        return outputs, {module for module in model.modules() if again.intersection(module.modules())}

    def _give_up(self, reason: str) -> None:
        self.trouble = f"{type(self._simulated.model).__name__} cannot be run from recordings: {reason}"
        logger.warning("%s; every policy is run in full", self.trouble)

    @contextmanager
    def _holding(self, recordings: Sequence[Recording]) -> Iterator[Recordings]:
        """A list of recordings that counts as held while the context lasts."""
        self._held.append(list(recordings))
        try:
            yield self._held[-1]
        finally:
            self._held.pop()

    def _held_bytes(self) -> int:
        memory: dict[int, int] = {}
        for recordings in self._held:
            for recording in recordings:
                memory |= recording.memory
        return sum(memory.values())


class _Tree:
    """Policies, told apart by columns: layers in the order in which they first run, then other quantized tensors."""

    def __init__(self, simulated: QuantizedModel, policies: Sequence[Policy]) -> None:
        self.policies = policies
        first_use: dict[int, int] = {}  # of a weight that layers share: the position of the first of them
        for position, name in enumerate(simulated.network.names):
            first_use.setdefault(id(simulated.weight(name)), position)
        names = sorted(simulated.network.names, key=lambda name: first_use[id(simulated.weight(name))])
        points = simulated.points
        operation_format = Format.parse(simulated.settings.operation_format)
        codes: dict[Any, int] = {}
        rows = []
        for policy in policies:
            placed = formats_of(points, simulated.network, policy, operation_format)
            row = [policy.get(name, FLOAT_PRECISION) for name in names] + [placed.get(point.tensor) for point in points]
            rows.append([codes.setdefault(value, len(codes)) for value in row])
        self._codes = np.array(rows)
        self._stops = [_layer_stops(simulated, name) for name in names]
        self._stops += [_point_stops(simulated, point) for point in points]

    def differing(self, group: np.ndarray) -> np.ndarray:
        """Columns in which policies of a group differ."""
        codes = self._codes[group]
        columns: np.ndarray = np.flatnonzero((codes != codes[0]).any(0))
        return columns

    def stops(self, columns: np.ndarray) -> Stops:
        """Where the network first computes with something that differs."""
        stops = [self._stops[column] for column in columns]
        return Stops({m for stop in stops for m in stop.modules}, {p for stop in stops for p in stop.parameters})

    def branches(self, group: np.ndarray, column: int) -> list[np.ndarray]:
        """Splits a group by one column, the largest branch last."""
        codes = self._codes[group, column]
        return sorted((group[codes == code] for code in dict.fromkeys(codes.tolist())), key=len)


def _layer_stops(simulated: QuantizedModel, layer: str) -> Stops:
    """Where the layer runs, or anything else computes with its weight or bias."""
    stored = filter(None, (simulated.weight_name(layer), simulated.bias_name(layer)))
    return Stops({simulated.owner(layer)}, {id(simulated.model.get_parameter(name)) for name in stored})


def _point_stops(simulated: QuantizedModel, point: Point) -> Stops:
    """Where the module begins in which a tensor is produced that is quantized there."""
    scope = simulated.model.get_submodule(point.event.scope) if point.event else simulated.owner(point.layer)
    return Stops({scope}, frozenset())
