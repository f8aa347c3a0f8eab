"""Fixtures for all tests: fixed seeds, one thread, and the tiny network's parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny import Bench, TinyTask, make_bench

settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")
torch.set_num_threads(1)  # tensors here are tiny: on a busy machine, waiting for a second thread takes 40 times as long


LONG = (
    *("test_slurm.py", "test_readme_quickstart.py", "test_readme_workers.py", "test_readme_sweeps.py"),
    *("test_tracking.py", "test_sweep.py", "test_tracking_live.py", "test_faults.py", "test_workers.py"),
    *("test_resume.py", "test_interrupt.py"),
)
"""Files of few tests that run whole commands: were they last, one of two processes would wait for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Has the long files begin."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def task() -> TinyTask:
    return TinyTask()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Four layers, 648 policies: three weight formats a layer, two input formats a tensor."""
    return make_bench(directory=tmp_path)
