"""Recordings: what modules returned in a pass that was cut short, so that later passes need not compute it again.

The model still runs as Python; a module call that a recording knows is answered instead of computed, hooks and parts
included. Calls are known by their order, so that modules called several times, shared ones, and control flow that
depends on data need no special care: up to the cut, every pass takes the same path.

Not answered are calls whose effect is more than what they return: those that write to what they are given or return
part of it, and those after which a module holds something else than before. They run, and their parts are answered.
"""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from search.kinds import kind_of_function
from search.tasks.task import tensors_in
from search.trace import slow_attention

VALUELESS = frozenset(
    ("device", "dim", "dtype", "is_contiguous", "is_cpu", "is_cuda", "is_floating_point", "layout", "ndim")
) | frozenset(("ndimension", "nelement", "numel", "requires_grad", "shape", "size", "stride"))
"""Functions that tell about a tensor, but nothing of its values."""


T = TypeVar("T")
Writes = tuple[Any, int]  # something, and how often it was written to in place if it is a tensor


class DivergedError(Exception):
    """A pass called other modules than the one that was recorded."""


class _ReachedError(Exception):
    """A pass has come to where it is to be cut short."""


@dataclass(frozen=True)
class Stops:
    """Where a pass is cut short, whichever comes first.

    Attributes:
        modules: Before one of these is called.
        parameters: Before a function outside of modules called so far reads one of these, by id.
    """

    modules: Set[nn.Module]
    parameters: Set[int]


@dataclass(eq=False)
class _Leaf:
    """One tensor of what a module returned.

    Attributes:
        kept: The tensor: the same memory as what the model was given, unless that was a copy.
        version: How often it had been written to in place.
        given: What the model was given, and holds or not.
    """

    kept: Tensor
    version: int
    given: weakref.ref[Tensor]
    is_needed: bool = True

    @property
    def is_intact(self) -> bool:
        return not self.is_needed or self.kept._version == self.version

    def drop(self) -> None:
        """Gives the memory back; nobody will ever look at the values."""
        self.kept.data = self.kept.new_empty(0)
        self.is_needed = False


class Answer:
    """What a module returned: tensors, plain values, and containers of them."""

    def __init__(self, returned: Any, is_copied: bool) -> None:
        self._value = _handed(returned, is_copied)
        self.leaves = [
            _Leaf(kept, kept._version, weakref.ref(given))
            for kept, given in zip(tensors_in(self._value), tensors_in(returned), strict=True)
        ]

    def hand_out(self, is_copied: bool) -> Any:
        """Returns it in containers of its own, the tensors as copies or in the same memory."""
        return _handed(self._value, is_copied)


@dataclass(frozen=True)
class Call:
    """One call of a module: with its answer, or None where it has to run and its parts' calls follow."""

    module: nn.Module
    answer: Answer | None = None


@dataclass(frozen=True)
class Recording:
    """The calls of a pass up to where it was cut short; without any, nothing is known."""

    calls: tuple[Call, ...] = ()

    @property
    def written(self) -> set[nn.Module]:
        """Modules whose answers have been written to since: as it is, the recording cannot be used again."""
        return {
            call.module for call in self.calls if call.answer and not all(leaf.is_intact for leaf in call.answer.leaves)
        }

    @property
    def memory(self) -> dict[int, int]:
        """The pieces of memory it keeps, and the bytes of each."""
        storages = [leaf.kept.untyped_storage() for call in self.calls if call.answer for leaf in call.answer.leaves]
        return {storage._cdata: storage.nbytes() for storage in storages}


class Replay:
    """A pass in which the calls of a recording are answered."""

    def __init__(self, recording: Recording, copied: Collection[nn.Module]) -> None:
        """Creates the pass.

        Args:
            recording: What is known.
            copied: Modules of whose answers the model is given copies, because it writes to them.
        """
        self._known = recording.calls
        self._copied = copied
        self._position = 0

    def play(self, model: nn.Module, run: Callable[[], T]) -> T:
        """Returns what `run` returns, which calls the model.

        Raises:
            DivergedError: If other modules are called than were recorded, or fewer.
        """
        with self._answering(model):
            result = run()
        if self._position < len(self._known):
            raise DivergedError(f"only {self._position} of {len(self._known)} recorded modules were called")
        return result

    @contextmanager
    def _answering(self, model: nn.Module) -> Iterator[None]:
        modules = list(model.modules())
        for module in modules:
            module.__dict__["_call_impl"] = partial(self._call, module, module._call_impl)
        try:
            yield
        finally:
            for module in modules:
                del module.__dict__["_call_impl"]

    def _call(self, module: nn.Module, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        answer = self._answer(module)
        return answer.hand_out(module in self._copied) if answer else run(*args, **kwargs)

    def _answer(self, module: nn.Module) -> Answer | None:
        """The answer to the next call; None if it has to run."""
        if self._position == len(self._known):
            return None
        known = self._known[self._position]
        if known.module is not module:
            raise DivergedError(f"{type(module).__name__} was called instead of {type(known.module).__name__}")
        self._position += 1
        return known.answer


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
    read: set[_Leaf] = field(default_factory=set)
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
        self._leaves: dict[int, _Leaf] = {}  # id of a tensor that the model was given -> the leaf it is
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


def _handed(value: Any, is_copied: bool) -> Any:
    """A value in containers of its own, the tensors as copies, laid out alike, or as aliases of the same memory."""
    if isinstance(value, Tensor) and not is_copied:
        return value.detach()
    return copy.deepcopy(value, None if is_copied else {id(tensor): tensor.detach() for tensor in tensors_in(value)})


def _drop_unneeded(calls: Iterable[Call], read: Set[_Leaf]) -> None:
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
