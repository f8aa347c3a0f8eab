"""Runs the command line: `python -m search [key=value ...]` searches, `python -m search COMMAND ...` does the rest."""

from __future__ import annotations

import sys

from search.cli import NAMES, main

if __name__ == "__main__":
    given = sys.argv[1:]
    is_command = bool(given) and given[0] in (*NAMES, "-h", "--help")
    sys.exit(main(given if is_command else ["search", *given]))
