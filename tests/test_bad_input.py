"""What users get wrong is said on one line, in their words, before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_lookup import CONV, timed

from hwmodels import Workload
from hwmodels.lookup import LookupTable
from search.app import search_command
from search.cli import main
from search.config import compose, make_job, named_strategy, spelt_out
from search.errors import ConfigError, one_line
from search.strategies.base import Strategy, checks_types

TOY = (Path(__file__).parent / "devices" / "toy.yaml").read_text(encoding="utf-8")
LISTED = "name: Toy\n[a, b]: 3\n"
SPARSE = TOY.replace("sparse: {value: 800.0e+9", "sparse: {value: 400.0e+9")


def message(overrides: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says on standard error: one line, after which nothing was made."""
    code = main(["search", *overrides, f"run_dir={folder}/run", f"run_root={folder}", "tracking=none"])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert not (folder / "run" / "run.json").exists()
    return error.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "hardware: cannot read device file {path}: No such file or directory"),
        (SPARSE, "hardware: {path} is not a valid device: compute.int8: "),
        (LISTED, "hardware: {path}: line 2: a key must be a word or a number, not a list"),
        ("id: [a\nname: x\n", "hardware: {path} is not valid YAML: line 2: "),
        ("\xff", "hardware: {path} is not valid YAML: it is no text in UTF-8"),
    ],
)
@pytest.mark.parametrize("spelling", ["hardware={path}", "hardware=roofline hardware.device={path}"])
def test_device_files(
    spelling: str, content: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    said = message(spelling.format(path=path).split(), tmp_path, capsys)
    assert said.startswith(expected.format(path=path))
    assert said.count(str(path)) == 1
    assert "pydantic" not in said


@pytest.mark.parametrize("mistake", ["negative", "twice"])
def test_tables_say_which_line(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.csv"
    LookupTable((timed(CONV),)).write(path)
    header, row = path.read_text().splitlines()
    p20 = row.split(",")[header.split(",").index("p20_s")]
    second = row.replace(p20, f"-{p20}", 1) if mistake == "negative" else row
    path.write_text("\n".join([header, row, second]) + "\n")
    said = message(["hardware=lookup", f"hardware.table={path}"], tmp_path, capsys)
    assert said.startswith("hardware: ")
    assert said.count(str(path)) == 1
    assert "3" in said.replace(str(path), ""), "the line"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("strategy=haq strategy.warm_up=abc", "strategy.warm_up=abc must be a whole number"),
        ("strategy=tpe strategy.evaluations=abc", "strategy.evaluations=abc must be a whole number"),
        ("strategy=tpe strategy.evaluations=1.5", "strategy.evaluations=1.5 must be a whole number"),
        ("strategy=tpe strategy.startup=true", "strategy.startup=True must be a whole number"),
        ("strategy=tpe strategy.costs=5", "strategy.costs=5 must be a list, such as [5]"),
        ("strategy=nsga2 strategy.population=x", "strategy.population=x must be a whole number, or null"),
        ("strategy.seconds=abc", "strategy.seconds=abc must be a number, or null"),
        ("strategy=evolution strategy.fidelities=abc", "strategy.fidelities=abc must be a list of numbers"),
        ("strategy=evolution strategy.fidelities=[a]", "strategy.fidelities=['a'] must be a list of numbers"),
        ("strategy=rl strategy.hidden=abc", "strategy.hidden=abc must be a list of whole numbers"),
        ("strategy=rl strategy.demonstrations=5", "strategy.demonstrations=5 must be true or false"),
        ("workload.batch=abc", "workload.batch=abc must be a whole number"),
        ("workload.batch=1.5", "workload.batch=1.5 must be a whole number"),
        ("workload.batch=null", "workload.batch=null must have a value"),
        ("budget.size_ratio=abc", "budget.size_ratio=abc must be a number"),
        ("racing=default racing.enabled=abc", "racing.enabled=abc must be true or false"),
        ("strategy.start_from=solvr", "strategy.start_from=solvr does not exist (did you mean 'solver'?); give solver"),
        ("strategy.start_from=/no/where", "strategy.start_from=/no/where does not exist; give solver, a run directory"),
        ("strategy=rl strategy.agent=/no/where", "strategy.agent=/no/where does not exist; give the directory of a"),
        (
            "strategy=optuna strategy.sampler._target_=optuna.samplers.TPESample",
            "strategy: optuna.samplers.TPESample cannot be found: optuna.samplers has no TPESample (did you mean "
            "'TPESampler'?)",
        ),
        (
            "strategy=optuna strategy.sampler._target_=optuna.samplers.Nope",
            "strategy: optuna.samplers.Nope cannot be found: optuna.samplers has no Nope; it has BaseGASampler, ",
        ),
        ("task._target_=nowhere.at_all", "task: nowhere.at_all cannot be found: there is no module nowhere"),
    ],
)
def test_settings(overrides: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message(overrides.split(), tmp_path, capsys).startswith(expected)


def test_a_module_that_fails_to_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_broken_task.py").write_text("import there_is_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be imported: No module named 'there_is_no_such_module'"):
        make_job(compose(["task=custom", "task._target_=my_broken_task.Task"]), tmp_path)


def test_errors_on_one_line() -> None:
    assert one_line(ValueError("first\n  second\n")) == "first; second"
    assert one_line(FileNotFoundError(2, "No such file or directory", "x.csv")) == "x.csv: No such file or directory"


class Mine(Strategy):
    """A strategy of one's own, whose types are partly its own, too."""

    name = "mine"

    @checks_types
    def __init__(self, evaluations: int = 3, share: float = 0.5, other: Workload | None = None) -> None:
        super().__init__(evaluations)
        self.share, self.other = share, other

    def search(self, space, objective, rng):
        raise NotImplementedError


def test_types_from_python() -> None:
    assert Mine(4, 1, other="anything").share == 1, "a whole number is a number; what is not known is not looked at"
    for given in ({"share": "1"}, {"share": float("nan")}, {"share": None}):
        with pytest.raises(ConfigError, match=r"strategy\.share=.* must be a number$"):
            Mine(**given)
    with pytest.raises(ConfigError, match=r"strategy\.evaluations=True must be a whole number"):
        Mine(True)
    with pytest.raises(ConfigError, match=r"strategy\.start_from=5 must be text, or null"):
        named_strategy("tpe", {"start_from": 5})
    with pytest.raises(TypeError, match="unexpected"):
        Mine(shares=1)


@pytest.mark.parametrize("value", [1.5, True, "2", None])
@pytest.mark.parametrize("name", ["batch", "threads"])
def test_workloads_are_whole_numbers(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"workload\.{name} must be a whole number of at least 1, got {value!r}"):
        Workload(**{name: value})


def test_a_device_file_is_an_option(tmp_path: Path) -> None:
    path = tmp_path / "it's mine, (2) = a.yaml"
    path.write_text(TOY)
    assert spelt_out(["seed=1", "hardware=zen5", "hardware=a,b.yaml"]) == [
        *("seed=1", "hardware=zen5", "hardware=a,b.yaml")
    ], "a is no device"
    assert spelt_out(["export=[onnxruntime,openvino]"]) == ["export.backends=[onnxruntime,openvino]"]
    assert spelt_out(["hardware=zen5,b.yml"]) == ["hardware=roofline", "hardware.device='zen5','b.yml'"]
    plain = tmp_path / "it's mine (2) = a.yaml"
    plain.write_text(TOY)
    assert make_job(compose([f"hardware={plain}"]), tmp_path).cost_model.name == "toy"


def test_the_command_takes_a_device_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toy.yaml").write_text(TOY)
    search_command([f"hardware={tmp_path}/toy.yaml", "--cfg", "job"])
    assert f"device: {tmp_path}/toy.yaml" in capsys.readouterr().out
