"""Keeps what was computed within a memory limit; what was not asked for longest goes first."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor

SHARE_OF_FREE_MEMORY = 0.25

Key = TypeVar("Key", bound=Hashable)


def free_memory(device: torch.device) -> int:
    """Bytes that are free where tensors of `device` live."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class TensorCache(Generic[Key]):
    """Tensors by key, at most `limit` bytes of them.

    Attributes:
        limit: Bytes; by default a quarter of what was free when the cache was made.
        bytes: Bytes held now.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        self.limit = int(free_memory(device) * SHARE_OF_FREE_MEMORY) if limit is None else limit
        self.bytes = 0
        self._entries: OrderedDict[Key, tuple[Tensor, ...]] = OrderedDict()

    def get(self, key: Key, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Returns the tensors of `key`, computing them if they are not held; what exceeds the limit is not kept."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        found = compute()
        self._entries[key] = found
        self.bytes += _size(found)
        while self.bytes > self.limit:
            self.bytes -= _size(self._entries.popitem(last=False)[1])
        return found

    def drop(self, stale: Callable[[Key], bool]) -> None:
        """Forgets the keys for which `stale` is true."""
        for key in [key for key in self._entries if stale(key)]:
            self.bytes -= _size(self._entries.pop(key))

    def copy(self) -> TensorCache[Key]:
        """Another cache with the same entries, which are shared, and the same limit."""
        other: TensorCache[Key] = TensorCache(torch.device("cpu"), self.limit)
        other._entries, other.bytes = self._entries.copy(), self.bytes
        return other

    def __len__(self) -> int:
        return len(self._entries)


def _size(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
