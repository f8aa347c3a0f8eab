"""Optuna without its notices: which of its parts are experimental is our choice, not the user's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def experiments_allowed() -> Iterator[None]:
    """Silences Optuna's warnings about parts that may still change, for a block that uses them knowingly."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
