"""Makes recordings: runs a model up to a cut, and finds out which of its module calls can be answered from then on.

Not answered are calls whose effect is more than what they return: those that write to what they are given or return
part of it, and those after which a module holds something else than before. They run, and their parts are answered.

Of what modules returned, only that is kept which the model has looked at outside of answered calls, or still holds at
the cut: what is merely passed on from one answered call to the next is not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from search.kinds import kind_of_function
from search.quantize.recording import Answer, Call, Leaf, Recording, Replay
from search.tasks.task import tensors_in
from search.trace import slow_attention

VALUELESS = frozenset(
    {
        *("device", "dtype", "is_contiguous", "is_cpu", "is_cuda", "is_floating_point", "layout", "requires_grad"),
        *("dim", "ndim", "ndimension", "nelement", "numel", "shape", "size", "stride"),
    }
)
"""Functions that tell about a tensor, but nothing of its values."""

Writes = tuple[Any, int]  # something, and how often it was written to in place if it is a tensor


class _ReachedError(Exception):
    """A pass has come to where it is to be cut short."""


@dataclass(frozen=True)
class Stops:
    """Where a pass is cut short, whichever comes first.

    Attributes:
        modules: Before one of these is called.
        parameters: Before a function computes with one of these; each by its id.
    """

    modules: Set[nn.Module]
    parameters: Set[int]


@dataclass
class _Frame:
    """A module that runs; the outermost stands for what calls the model.

    Attributes:
        module: The module.
        calls: Calls within it so far that later passes can answer, or have to run.
        read: Answers whose values it has looked at itself.
        is_stateful: Whether it, or a part of it, holds something else than before.
    """

    module: nn.Module | None = None
    calls: list[Call] = field(default_factory=list)
    read: set[Leaf] = field(default_factory=set)
    is_stateful: bool = False

    def add(self, call: Call) -> None:
        _drop_unneeded(self.calls, self.read)
        self.calls.append(call)

    def take_over(self, part: _Frame) -> None:
        """Goes on with the calls of a part that has run and will have to run again."""
        self.calls += part.open_calls
        self.read |= part.read

    @property
    def open_calls(self) -> list[Call]:
        """Its own call, to be run, and those within it."""
        return [*([Call(self.module)] if self.module else []), *self.calls]


class Recorder(Replay, TorchFunctionMode):
    """A pass that starts from one recording and makes another, up to a later cut."""

    def __init__(
        self,
        start: Recording,
        copied: Collection[nn.Module],
        stops: Stops,
        unanswered: Collection[nn.Module] = (),
    ) -> None:
        """Creates the pass.

        Args:
            start: What is known.
            copied: Modules whose answers are kept as copies, because the model writes to them.
            stops: Where to cut the pass short.
            unanswered: Modules that always run.
        """
        Replay.__init__(self, start, copied)
        TorchFunctionMode.__init__(self)
        self._stops = stops
        self._unanswered = unanswered
        self._frames = [_Frame()]
        self._leaves: dict[int, Leaf] = {}  # id of a tensor that the model was given -> the leaf it is
        self._recording: Recording | None = None
        self._returned: Any = None

    def record(self, model: nn.Module, run: Callable[[], Any]) -> Recording:
        """Records `run`, which calls the model, up to the cut, or to its end if it never gets there.

        Raises:
            DivergedError: If it goes another way than what is known of it.
        """
        with torch.no_grad(), slow_attention(), self, suppress(_ReachedError):
            self._returned = self.play(model, run)  # the caller holds it, so that its answers are needed
        return self._finish()

    def _finish(self) -> Recording:
        """Ends the recording here; answers that the model neither holds nor has looked at are not kept."""
        if self._recording is None:
            calls = [call for frame in self._frames for call in frame.open_calls]
            _drop_unneeded(calls, {leaf for frame in self._frames for leaf in frame.read})
            self._recording = Recording(tuple(calls))
        return self._recording

    def _stop(self) -> None:
        self._finish()
        raise _ReachedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls `func`, unless this is where the pass ends, and remembers what it reads."""
        given = tensors_in((args, kwargs))
        if any(id(tensor) in self._stops.parameters for tensor in given) and kind_of_function(func) not in VALUELESS:
            self._stop()
        for tensor in given:
            leaf = self._leaves.get(id(tensor))
            if leaf and leaf.given() is tensor:
                self._frames[-1].read.add(leaf)
        return func(*args, **(kwargs or {}))

    def _call(self, module: nn.Module, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            if self._recording or module in self._stops.modules:
                self._stop()
            if answer := self._answer(module):
                output = answer.hand_out(module in self._copied)
                self._frames[-1].add(self._answered(module, output))
                return output
            held, given = _held(module), _tensors((args, kwargs))
        frame = _Frame(module)
        self._frames.append(frame)
        try:
            output = run(*args, **kwargs)
        finally:
            self._frames.pop()
        with torch._C.DisableTorchFunction():
            frame.is_stateful |= not _is_same(held, _held(module))
            has_effects = frame.is_stateful or not _is_same(given, _tensors((args, kwargs)))
            caller = self._frames[-1]
            caller.is_stateful |= frame.is_stateful
            if has_effects or module in self._unanswered or not _is_plain(output) or _share_memory(output, given):
                caller.take_over(frame)
            else:
                caller.add(self._answered(module, output))
        return output

    def _answered(self, module: nn.Module, output: Any) -> Call:
        answer = Answer(output, module in self._copied)
        for leaf in answer.leaves:
            self._leaves[id(leaf.given())] = leaf
        return Call(module, answer)


def _drop_unneeded(calls: Iterable[Call], read: Set[Leaf]) -> None:
    for call in calls:
        for leaf in call.answer.leaves if call.answer else ():
            if leaf.is_needed and leaf.given() is None and leaf not in read:
                leaf.drop()


def _is_plain(value: Any) -> bool:
    """Whether a value is tensors, constants, and containers of them that can be copied without side effects."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if is_dataclass(value):
        return all(map(_is_plain, vars(value).values()))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def _share_memory(output: Any, given: list[Writes]) -> bool:
    memory = {_memory(tensor) for tensor, _ in given}
    return any(_memory(tensor) in memory for tensor in tensors_in(output))


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(values: Any) -> list[Writes]:
    return [_writes(tensor) for tensor in tensors_in(values)]


def _held(module: nn.Module) -> list[Writes]:
    """Everything that a module holds itself, the entries of its containers one by one."""
    entries: list[Any] = []
    for value in vars(module).values():
        if isinstance(value, dict):
            entries += value.values()
        elif isinstance(value, (list, tuple, set, deque)):
            entries += value
        else:
            entries.append(value)
    return [_writes(entry) for entry in entries]


def _writes(value: Any) -> Writes:
    return value, value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _is_same(before: list[Writes], after: list[Writes]) -> bool:
    return len(before) == len(after) and all(
        old is new and old_writes == new_writes
        for (old, old_writes), (new, new_writes) in zip(before, after, strict=True)
    )
