"""The README's blocks and commands, and what types the latter."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("bitplan ")]
    for kind, block in BLOCKS
    if kind == "sh"
]
QUICKSTART, *OTHERS = (commands for commands in COMMANDS if commands)
ON_RUNS = ("worker", "status", "merge", "sync", "best", "compare")
"""Commands that need runs to be about."""
PYTHON = [block for kind, block in BLOCKS if kind == "python"]


def run(arguments: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> str:
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout
