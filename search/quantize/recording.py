"""Recordings: what modules returned in a pass that was cut short, so that later passes need not compute it again.

The model still runs as Python; a module call that a recording knows is answered instead of computed, hooks and parts
included. Calls are known by their order, so that modules called several times, shared ones, and control flow that
depends on data need no special care: up to the cut, every pass takes the same path.

A model may write in place to what its modules return. Answers share their memory with what the model is given, so their
number of writes tells; a recording with such an answer is of no use any more, and the next one keeps a copy.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from search.tasks.task import tensors_in

T = TypeVar("T")


class DivergedError(Exception):
    """A pass called other modules than the one that was recorded."""


@dataclass(eq=False)
class Leaf:
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
        self._value = handed_out(returned, is_copied)
        self.leaves = [
            Leaf(kept, kept._version, weakref.ref(given))
            for kept, given in zip(tensors_in(self._value), tensors_in(returned), strict=True)
        ]

    def hand_out(self, is_copied: bool) -> Any:
        """Returns it in containers of its own, the tensors as copies or in the same memory."""
        return handed_out(self._value, is_copied)


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


def handed_out(value: Any, is_copied: bool) -> Any:
    """A value in containers of its own, the tensors as copies, laid out alike, or as aliases of the same memory."""
    if isinstance(value, Tensor) and not is_copied:
        return value.detach()
    return copy.deepcopy(value, None if is_copied else {id(tensor): tensor.detach() for tensor in tensors_in(value)})
