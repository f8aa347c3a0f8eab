"""Readings: what predicted outputs say about quality, as one loss per policy; lower is better.

Outputs have shape `(..., rows, outputs)`: any number of policies, the rows of the samples they were predicted on, and
one number per class, word or prediction. A reading sees them through coordinates that are linear in them, so that
coordinates of sums are sums of coordinates and a search never goes back to the outputs. Policies are the leading axes
throughout; in coordinates the rows come last, where they are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Name = Literal["margin_error", "cross_entropy", "error", "divergence_to", "squared"]
NAMES: tuple[Name, ...] = get_args(Name)

TEMPERATURE = 1.0  # in standard deviations of the outputs; experiments/superposition shows what others would do


@dataclass(frozen=True)
class Reading:
    """A loss of outputs, in two steps.

    Attributes:
        name: The name of its function.
        coordinates: Turns outputs, shape `(..., rows, outputs)`, into coordinates, shape `(..., coordinates, rows)`.
            Linear: coordinates of a sum are the sum of coordinates.
        loss: Turns coordinates into losses, shape `(...)`.
    """

    name: Name
    coordinates: Callable[[np.ndarray], np.ndarray]
    loss: Callable[[np.ndarray], np.ndarray]

    def __call__(self, outputs: np.ndarray) -> np.ndarray:
        """Reads outputs, shape `(..., rows, outputs)`; losses have shape `(...)`."""
        return self.loss(self.coordinates(outputs))


def margin_error(outputs: np.ndarray, targets: np.ndarray, temperature: float = TEMPERATURE) -> np.ndarray:
    """Smooth top-1 error, which a common factor of all outputs does not change.

    With the margin `m = z_target - max of the others` of a row, and the standard deviation `s` of all outputs about the
    mean of their row, it is the mean of `sigmoid(-m / (temperature * s))`: rows far on the right side count 0, far on
    the wrong side 1, and rows near the boundary something between. `temperature` to 0 gives the error.
    Quantization often shrinks or stretches all outputs, which changes cross entropy but no decision; dividing by their
    spread takes that out.

    Args:
        outputs: Shape `(..., rows, outputs)`.
        targets: Index of every row's right output, shape `(rows,)`.
        temperature: Width of the smooth step, in standard deviations of the outputs.
    """
    return reading("margin_error", targets, temperature)(outputs)


def cross_entropy(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean negative log-likelihood of the targets in nats, shape `(...)`; see `margin_error` for the shapes."""
    return reading("cross_entropy", targets)(outputs)


def error(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Share of rows whose target has not the largest output, shape `(...)`; a tie counts as wrong."""
    return reading("error", targets)(outputs)


def divergence_to(outputs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean over rows of KL(softmax(reference) || softmax(outputs)) in nats, shape `(...)`.

    Args:
        outputs: Shape `(..., rows, outputs)`.
        reference: Outputs of the reference, usually the float network, shape `(rows, outputs)`.
    """
    return reading("divergence_to", reference)(outputs)


def squared(outputs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean squared difference from reference outputs, shape `(...)`; see `divergence_to` for the shapes."""
    return reading("squared", reference)(outputs)


def reading(name: str, targets: np.ndarray, temperature: float = TEMPERATURE) -> Reading:
    """Makes a reading of outputs.

    Args:
        name: Which one; the function of this name says what it is.
        targets: Of `divergence_to` and `squared` the reference outputs, shape `(rows, outputs)`; of the others the
            index of every row's right output, shape `(rows,)`.
        temperature: Of `margin_error`, see there.

    Raises:
        ValueError: If there is no such reading, or targets or temperature do not fit it.
    """
    targets = np.asarray(targets)
    if name not in NAMES:
        raise ValueError(f"no reading {name!r}; there are {', '.join(NAMES)}")
    if name in ("divergence_to", "squared"):
        if targets.ndim != 2:
            raise ValueError(f"{name} compares with reference outputs (rows, outputs), got shape {targets.shape}")
        return _divergence_to(targets) if name == "divergence_to" else _squared(targets)
    if targets.ndim != 1 or targets.dtype.kind not in "iu":
        raise ValueError(
            f"{name} needs one integer target per row, got shape {targets.shape} of {targets.dtype}; "
            "without targets take divergence_to or squared"
        )
    if not temperature > 0:
        raise ValueError(f"the temperature of margin_error must be above 0, got {temperature}")
    if name == "margin_error":
        return Reading(name, lambda outputs: _centred(outputs, targets), lambda c: _smooth_error(c, temperature))
    return Reading(name, lambda outputs: _leads(outputs, targets), _nats if name == "cross_entropy" else _wrong)


def _target_first(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The outputs, every row's target first, shape `(..., outputs, rows)`."""
    rows, count = outputs.shape[-2:]
    if len(targets) != rows:
        raise ValueError(f"outputs have {rows} rows, but there are {len(targets)} targets")
    if count < 2 or (rows and not 0 <= targets.min() <= targets.max() < count):
        raise ValueError(f"targets must be indices of at least two outputs, got {count} outputs and targets {targets}")
    order = (targets + np.arange(count)[:, None]) % count  # (outputs, rows)
    turned: np.ndarray = outputs[..., np.arange(rows), order]
    return np.ascontiguousarray(turned)


def _centred(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Outputs about the mean of their row, the target's first, shape `(..., outputs, rows)`."""
    turned = _target_first(outputs, targets)
    turned -= turned.mean(-2, keepdims=True)
    return turned


def _leads(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """By how much each other output exceeds the target's, shape `(..., outputs - 1, rows)`."""
    turned = _target_first(outputs, targets)
    leads: np.ndarray = turned[..., 1:, :] - turned[..., :1, :]
    return leads


def _smooth_error(centred: np.ndarray, temperature: float) -> np.ndarray:
    flat = centred.reshape(*centred.shape[:-2], -1)
    spread = np.sqrt(np.vecdot(flat, flat) / flat.shape[-1])[..., None]
    spread[spread == 0] = 1  # all outputs alike: every row is at the boundary
    wrong_by = np.maximum.reduce(centred[..., 1:, :], axis=-2)
    wrong_by -= centred[..., 0, :]
    wrong_by *= 0.5 / temperature / spread
    np.tanh(wrong_by, out=wrong_by)
    smooth: np.ndarray = 0.5 + 0.5 * wrong_by.mean(-1)  # sigmoid(x) = (1 + tanh(x / 2)) / 2
    return smooth


def _nats(leads: np.ndarray) -> np.ndarray:
    nats: np.ndarray = _log_sum(leads, includes_zero=True).mean(-1, dtype=np.float64)
    return nats


def _wrong(leads: np.ndarray) -> np.ndarray:
    wrong: np.ndarray = np.count_nonzero(leads.max(-2) >= 0, axis=-1) / leads.shape[-1]
    return wrong


def _log_sum(coordinates: np.ndarray, includes_zero: bool = False) -> np.ndarray:
    """Log of the sum of exponentials over coordinates, optionally with one more that is 0, shape `(..., rows)`."""
    largest = coordinates.max(-2)
    if includes_zero:
        np.maximum(largest, 0, out=largest)
    powers = coordinates - largest[..., None, :]
    np.exp(powers, out=powers)
    total = powers.sum(-2)
    if includes_zero:
        total += np.exp(-largest)
    found: np.ndarray = largest + np.log(total)
    return found


def _divergence_to(reference: np.ndarray) -> Reading:
    """KL = E[log sum exp(z - E_p z)] - H(p): coordinates are the outputs above their mean under the reference."""
    exact = reference.astype(np.float64)
    log_p = exact - _log_sum(exact.T).reshape(-1, 1)
    p = np.exp(log_p)
    negative_entropy = float((p * log_p).sum(-1).mean())

    def coordinates(outputs: np.ndarray) -> np.ndarray:
        _same_shape(outputs, reference)
        mean = (outputs * p.astype(outputs.dtype)).sum(-1, keepdims=True)
        return np.ascontiguousarray(np.swapaxes(outputs - mean, -1, -2))

    def loss(above_mean: np.ndarray) -> np.ndarray:
        nats: np.ndarray = _log_sum(above_mean).mean(-1, dtype=np.float64) + negative_entropy
        return np.asarray(np.maximum(nats, 0.0))

    return Reading("divergence_to", coordinates, loss)


def _squared(reference: np.ndarray) -> Reading:
    turned = np.ascontiguousarray(reference.T)

    def coordinates(outputs: np.ndarray) -> np.ndarray:
        _same_shape(outputs, reference)
        return np.ascontiguousarray(np.swapaxes(outputs, -1, -2))

    def loss(outputs: np.ndarray) -> np.ndarray:
        change = outputs - turned.astype(outputs.dtype)
        mean: np.ndarray = np.einsum("...cn,...cn->...", change, change) / turned.size
        return mean

    return Reading("squared", coordinates, loss)


def _same_shape(outputs: np.ndarray, reference: np.ndarray) -> None:
    if outputs.shape[-2:] != reference.shape:
        raise ValueError(f"outputs of shape {outputs.shape} do not fit reference outputs of shape {reference.shape}")
