"""Losses that summed-up output changes predict, for many selections at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from search.solve.readings import Reading

BLOCK_BYTES = 2**20  # coordinates read at a time: they stay in a core's cache


class Predictor:
    """Reads `base + sum of changes` without forming outputs: everything stays in the reading's coordinates.

    Selections are given as positions: per unit the index of its choice among all choices. Several threads
    may read at once.

    Attributes:
        choices: Number of all choices.
    """

    def __init__(self, reading: Reading, base: np.ndarray, changes: np.ndarray) -> None:
        """Turns outputs into coordinates.

        Args:
            reading: What to read.
            base: Outputs without any change, shape `(rows, outputs)`.
            changes: By how much every choice changes them, shape `(choices, rows, outputs)`.

        Raises:
            ValueError: If shapes disagree or a number is not finite.
        """
        if base.ndim != 2 or changes.shape[1:] != base.shape:
            raise ValueError(f"changes must be (choices, *{base.shape}) as base is, got shape {changes.shape}")
        if not np.isfinite(base).all() or not np.isfinite(changes).all():
            raise ValueError("outputs must be finite; leave out choices with which the model breaks down")
        self.choices = len(changes)
        self._loss = reading.loss
        self._base = reading.coordinates(base.astype(np.float32, copy=False))
        self._changes = reading.coordinates(changes.astype(np.float32, copy=False))
        self._block = max(1, BLOCK_BYTES // max(1, self._base.nbytes))
        self._local = threading.local()

    def coordinates(self, positions: np.ndarray) -> np.ndarray:
        """Adds up one selection, shape `(units,)`."""
        summed: np.ndarray = self._base + self._changes[positions].sum(0)
        return summed

    def losses(self, positions: np.ndarray) -> np.ndarray:
        """Reads selections, shape `(selections, units)`, each summed up from the base."""

        def fill(at: slice, out: np.ndarray, _: np.ndarray) -> None:
            for row, summed in zip(positions[at], out, strict=True):
                np.add(self._base, self._changes[row].sum(0), out=summed)

        return self._read(len(positions), fill)

    def losses_near(self, start: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Reads selections that differ from `start` in few units."""
        here = self.coordinates(start)

        def fill(at: slice, out: np.ndarray, spare: np.ndarray) -> None:
            self._step(start, positions[at], out, spare)
            out += here

        return self._read(len(positions), fill)

    def losses_of_pairs(
        self, start: np.ndarray, positions: np.ndarray, first: np.ndarray, second: np.ndarray
    ) -> np.ndarray:
        """Reads what two of the moves to `positions` together lead to, shape `(pairs,)`.

        Args:
            start: Where all of them start, shape `(units,)`.
            positions: Where each of them leads alone, shape `(moves, units)`.
            first: For every pair one of the moves.
            second: The other, which changes other units.
        """
        steps = np.empty((len(positions), *self._base.shape), np.float32)
        near = np.empty_like(steps)
        self._step(start, positions, steps, near)
        np.add(steps, self.coordinates(start), out=near)

        def fill(at: slice, out: np.ndarray, spare: np.ndarray) -> None:
            _take(near, first[at], out)
            _take(steps, second[at], spare)
            out += spare

        return self._read(len(first), fill)

    def _step(self, start: np.ndarray, positions: np.ndarray, out: np.ndarray, spare: np.ndarray) -> None:
        """Writes to `out` by how much selections differ from `start`."""
        changed = positions != start
        rows, first = np.arange(len(positions)), changed.argmax(1)
        _take(self._changes, positions[rows, first], out)
        _take(self._changes, start[first], spare)
        out -= spare
        changed[rows, first] = False
        for row, unit in np.argwhere(changed) if changed.any() else ():
            out[row] += self._changes[positions[row, unit]] - self._changes[start[unit]]

    def _read(self, count: int, fill: Callable[[slice, np.ndarray, np.ndarray], None]) -> np.ndarray:
        """Reads `count` selections; `fill` writes the coordinates of a block and has as much room to spare."""
        if not hasattr(self._local, "room"):
            self._local.room = np.empty((2, self._block, *self._base.shape), np.float32)
        losses = np.empty(count)
        for start in range(0, count, self._block):
            at = slice(start, min(start + self._block, count))
            out, spare = self._local.room[:, : at.stop - start]
            fill(at, out, spare)
            losses[at] = self._loss(out)
        return losses


def _take(array: np.ndarray, at: np.ndarray, out: np.ndarray) -> None:
    np.take(array, at, axis=0, out=out, mode="clip")  # `clip` writes straight to `out`; positions are in range
