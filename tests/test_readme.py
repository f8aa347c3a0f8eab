# The README's searches compose, its other commands run, and its tables are what the code says; see also
# `test_readme_quickstart`, `test_readme_workers` and `test_readme_sweeps`.
from __future__ import annotations

from pathlib import Path

import pytest
from readme import ON_RUNS, OTHERS, README

from search.backends.matrix import table
from search.budget import Budget
from search.cli import main, parser
from search.config import compose, plain
from search.job import RecoverSettings, SpaceSettings, settings
from search.quantize.settings import QuantizerSettings
from search.sensitivity.settings import SensitivitySettings

REFERENCE = [command for commands in OTHERS for command in commands if command[1] in ("search", "resolve")]
TOOLS = [command for commands in OTHERS for command in commands if command[1] not in ("search", "resolve", *ON_RUNS)]


@pytest.mark.parametrize("command", REFERENCE, ids=" ".join)
def test_every_search_of_the_reference_composes(command: list[str]) -> None:
    assert command[0] == "bitplan"
    if command[1] == "resolve":
        command = [*command[:2], *parser().parse_args(command[1:]).overrides]
    else:
        assert command[1] == "search"
    words = [word for word in command[2:] if not word.startswith(("-", "hydra/", "hydra.", "job"))]
    if "-m" in command:
        words = [word.split(",")[0] for word in words]
    values = plain(compose(words))
    settings(SpaceSettings, values["space"], "space")
    settings(SensitivitySettings, values["sensitivity"], "sensitivity")
    settings(QuantizerSettings, values["quantizer"], "quantizer")
    settings(RecoverSettings, values["recover"], "recover")
    settings(Budget, values["budget"], "budget")


@pytest.mark.parametrize("command", TOOLS, ids=" ".join)
def test_every_other_command_of_the_reference_runs(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fewer = ["--sites", "1", "--samples", "1"] if command[1] == "profile" else []
    assert main([*command[1:], *fewer]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


def test_the_table_of_backends_is_what_they_say() -> None:
    assert table() in README
