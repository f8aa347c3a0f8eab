"""Reproducible use of libraries that draw from global random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's global generators for a block, and puts them back as they were after it.

    Stable-Baselines3 draws from them. One seed gives one sequence on one machine with one number of threads.
    """
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
