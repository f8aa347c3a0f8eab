# Every shipped config composes, and what a user mistypes is named with its closest relative.
from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from hwmodels import list_devices
from search.api import _settings_of
from search.app import search_command
from search.cli import main
from search.config import compose, config_dir, make_job, named_hardware, named_strategy, plain
from search.errors import ConfigError

GROUPS = sorted(path.name for path in config_dir().iterdir() if path.is_dir() and path.name != "hydra")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((config_dir() / group).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str) -> None:
    config = compose([f"{group}={option}"])
    for key in [key for key in config.get(group) or () if OmegaConf.is_missing(config[group], key)]:
        config[group][key] = "what the user names"
    assert plain(config)["seed"] == 0


def test_every_device_is_an_option(tmp_path: Path) -> None:
    """All are stored by one loop: composing each would take half a minute."""
    compose()
    stored = ConfigStore.instance().repo["hardware"]
    assert {f"{device}.yaml" for device in list_devices()} <= set(stored)
    for device in ("h100_sxm", list_devices()[0]):
        assert make_job(compose([f"hardware={device}"]), tmp_path).cost_model.name == device
        assert named_hardware(device).name == device


def test_hardware_from_python_by_its_name(tmp_path: Path) -> None:
    assert named_hardware("storage").name == "storage"
    assert named_hardware("haq").name
    with pytest.raises(ConfigError, match=r"hardware=zen55 is unknown .did you mean 'zen5'.*storage.*zen5"):
        named_hardware("zen55")
    with pytest.raises(ConfigError, match=r"hardware: cannot read device file .*none.yaml"):
        named_hardware(str(tmp_path / "none.yaml"))


STRATEGIES = sorted({option for group, option in OPTIONS if group == "strategy"} - {"custom"})


@pytest.mark.parametrize("option", STRATEGIES)
def test_every_strategy_makes_a_job(option: str, tmp_path: Path) -> None:
    """From the command line and from Python, with the same defaults, and it can be started from something."""
    given = ["strategy.evaluations=7", "strategy.seconds=60", "strategy.start_from=solver"]
    job = make_job(compose([f"strategy={option}", *given]), tmp_path)
    assert (job.strategy.evaluations, job.strategy.seconds, job.strategy.start_from) == (7, 60, "solver")
    assert job.strategy.name == {"auto": "solver"}.get(option, option)
    named = named_strategy(option, {})
    assert type(named) is type(job.strategy)
    assert named.evaluations == make_job(compose([f"strategy={option}"]), tmp_path).strategy.evaluations


def test_what_a_strategy_was_built_with_is_recorded() -> None:
    """Its own settings and those of its bases, but nothing that it learns."""
    assert _settings_of(named_strategy("tpe", {"startup": 7})) == {
        **{"evaluations": 100, "seconds": None, "start_from": None, "startup": 7, "batch": 1},
        **{"costs": (), "tie": "auto", "storage": None, "study": None},
    }
    assert "trained" not in _settings_of(named_strategy("rl", {}))


def test_a_strategy_from_python_by_its_name() -> None:
    assert named_strategy("tpe", {"evaluations": 9}).evaluations == 9
    with pytest.raises(ConfigError, match=r"strategy=tp is unknown .did you mean 'tpe'"):
        named_strategy("tp", {})
    with pytest.raises(ConfigError, match=r"strategy.evaluation is no setting.*'evaluations'"):
        named_strategy("tpe", {"evaluation": 9})
    with pytest.raises(ConfigError, match=r"strategy.evaluations=0 must be at least 1"):
        named_strategy("random", {"evaluations": 0})


def test_the_default_job_is_the_documented_one(tmp_path: Path) -> None:
    job = make_job(compose(), tmp_path)
    assert job.task.name == "digits"
    assert job.cost_model.name == "zen5"
    assert job.strategy.name == "solver"
    assert job.budget.given() == {"size_ratio": 0.14}
    assert job.space.weight == ["int2", "int3", "int4", "int5", "int6", "int8"]
    assert job.space.input == ["uint4", "uint6", "uint8"]


def test_another_limit_replaces_the_default_one_and_an_explicit_one_joins(tmp_path: Path) -> None:
    assert make_job(compose(["budget.average_weight_bits=4"]), tmp_path).budget.given() == {"average_weight_bits": 4.0}
    both = make_job(compose(["budget.average_weight_bits=4", "budget.size_ratio=0.2"]), tmp_path).budget.given()
    assert both == {"average_weight_bits": 4.0, "size_ratio": 0.2}
    assert make_job(compose(["budget=none"]), tmp_path).budget.given() == {}


def test_pins_and_ties_come_from_the_command_line(tmp_path: Path) -> None:
    job = make_job(compose(["space.pins={first:int8}", "space.ties=[[conv,fc]]"]), tmp_path)
    assert job.space.pins == {"first": "int8"}
    assert job.space.ties == [["conv", "fc"]]


MISTAKES = [
    ("budget.siz_ratio=0.1", "budget.size_ratio"),
    ("budgt.size_ratio=0.1", "budget.size_ratio"),
    ("+foo=1", "foo is no setting"),
    ("+budget.sise=1", "budget.sise is no setting"),
    ("task=digit", "'digits'"),
    ("strategy=tp", "'tpe'"),
    ("strategy.evaluation=3", "strategy.evaluations"),
    ("strategy.evaluations=0", "strategy.evaluations=0 must be at least 1"),
    ("hardware.device=zen6", "'zen5'"),
    ("space.weight=[int9]", "space.weight"),
    ("space.weight=[]", "space.weight is empty"),
    ("space.pins={conx:int8}", "conx"),
    ("space.pins={conv:int80}", "space.pins.conv"),
    ("space.ties=[conv]", "space.ties"),
    ("quantizer.input_range=mxe", "'mse'"),
    ("recover.steps=[bias]", "'bias_correction'"),
    ("export.backends=[onnx]", "'onnxruntime'"),
    ("budget.size_ratio=abc", "abc"),
    ("budget.size_ratio=-1", "budget.size_ratio=-1"),
    ("budget.size_ratio=0.01", "least this space can reach"),
    ("budget.reference=int4", "budget.reference=int4"),
    ("workload.batch=0", "workload.batch"),
    ("task._target_=nowhere.at_all", "nowhere"),
    ("task._target_=collections.Counter", "must be a Task"),
    ("+task.width=3", "width"),
    ("seed=x", "seed"),
]


@pytest.mark.parametrize(("override", "expected"), MISTAKES)
def test_a_mistake_gets_an_error_in_the_users_words(
    override: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["search", override, f"run_dir={tmp_path}/run", "tracking=none"])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert expected in error
    assert "Traceback" not in error


def test_a_missing_target_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\._target_"):
        search_command(["task=custom", f"run_dir={tmp_path}", "tracking=none"])


def test_a_missing_folder_says_how_to_get_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        ["search", "task=fashion_mnist", f"task.root={tmp_path}/none", f"run_dir={tmp_path}/run", "tracking=none"]
    )
    assert code == 2
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
