"""Prints the test files of the backends that an extra installs: `python tests/backends_of.py compressed-tensors`."""

from __future__ import annotations

import sys
from pathlib import Path

from search.backends import BACKENDS

if __name__ == "__main__":
    for entry in BACKENDS.values():
        if entry.extra == sys.argv[1]:
            print(Path(__file__).with_name(f"test_backend_{entry.module}.py"))
