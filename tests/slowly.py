"""The tiny task, slow until it is told to hurry: workers are given time to join, and to be killed.

As a program, `python -m slowly SETTING...`, it searches, and writes neither report nor figures.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from tiny import TinyTask
from torch import Tensor, nn

from search.config import compose, make_job
from search.run import search

LONGEST_S = 0.5


class SlowTask(TinyTask):
    """Waits before every batch, until the file appears that the environment names; half a second at most."""

    name = "slow"

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        until = time.monotonic() + LONGEST_S
        while "HURRY" in os.environ and time.monotonic() < until and not Path(os.environ["HURRY"]).exists():
            time.sleep(0.005)
        return super().outputs(model, batch)


class Steady(TinyTask):
    """Takes its time over every batch, so that there is something left for others to measure."""

    name = "steady"

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        time.sleep(0.03)
        return super().outputs(model, batch)


class Unheard(SlowTask):
    """Nobody can tell how it judges."""

    judgement = None


class Fickle(SlowTask):
    """Answers differently every time."""

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().outputs(model, batch) + self.calls


if __name__ == "__main__":
    job = make_job(compose(sys.argv[1:]), Path(sys.argv[-1].partition("=")[2]))
    search(job)
