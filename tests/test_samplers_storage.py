"""The mirror in Optuna's storages: complete, never doubled, readable in optuna-dashboard, and safe to share."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from synthetic import Synthetic, make_synthetic

from search.errors import ConfigError, DataError
from search.strategies.samplers import CmaEs, Nsga2, Tpe
from search.strategies.samplers.mirror import Mirror, hidden
from search.trials import TrialLog


@pytest.fixture(scope="module")
def synthetic() -> Synthetic:
    return make_synthetic(0, 0.4)


@pytest.fixture(params=["journal", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = tmp_path / "not there yet"
    return str(folder / "optuna.log") if request.param == "journal" else f"sqlite:///{folder}/studies.db"


def opened(storage: str) -> optuna.storages.BaseStorage:
    if "://" in storage:
        return optuna.storages.RDBStorage(storage)
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))


def only_study(storage: str) -> optuna.Study:
    [name] = optuna.get_all_study_names(opened(storage))
    return optuna.load_study(study_name=name, storage=opened(storage))


def test_every_trial_is_mirrored(storage: str, synthetic: Synthetic, tmp_path: Path) -> None:
    trials, objective = synthetic.search(Nsga2(12, storage=storage), tmp_path / "trials.jsonl")
    study = only_study(storage)
    assert study.study_name.startswith("nsga2 ")
    assert study.metric_names == ["drop"]
    assert study.user_attrs["limits"] == synthetic.limits
    states = {"complete": "COMPLETE", "infeasible": "PRUNED"}
    assert {trial.state for trial in trials} == set(states)
    assert len(study.trials) == len(trials)
    for mirrored, trial in zip(study.trials, trials, strict=True):
        assert mirrored.number == trial.number
        assert mirrored.state.name == states[trial.state]
        assert mirrored.values == ([trial.drop] if trial.state == "complete" else None)
        assert mirrored.user_attrs["digest"] == trial.digest
        assert mirrored.user_attrs["state"] == trial.state
        assert mirrored.user_attrs.get("quality") == trial.metrics.get("quality")
        assert mirrored.user_attrs["weight_bytes"] == trial.cost["weight_bytes"]
        assert objective.violations(trial).items() <= mirrored.constraints.items()
        assert mirrored.params["weight head"] == str(trial.policy["head"].weight)
        assert set(mirrored.params) == {f"{d.side} {d.name}" for d in objective.space.decisions}
    best = min((t for t in trials if t.state == "complete"), key=lambda trial: trial.drop)
    assert study.best_trial.user_attrs["digest"] == best.digest


def test_front_has_named_axes(storage: str, synthetic: Synthetic, tmp_path: Path) -> None:
    strategy = Tpe(12, storage=storage, study="digits on zen5", costs=["weight_bytes", "bit_ops"])
    trials, _ = synthetic.search(strategy, tmp_path / "trials.jsonl")
    study = only_study(storage)
    assert study.study_name == "digits on zen5"
    assert study.metric_names == ["drop", "weight_bytes", "bit_ops"]
    first = next(trial for trial in trials if trial.state == "complete")
    assert study.trials[first.number].values == [first.drop, first.cost["weight_bytes"], first.cost["bit_ops"]]


def test_goes_on_without_doubling(storage: str, synthetic: Synthetic, tmp_path: Path) -> None:
    """Killed at any trial, before or after the mirror had it, and run again in the same place."""
    whole, _ = synthetic.search(CmaEs(10), tmp_path / "whole.jsonl")
    log = tmp_path / "trials.jsonl"
    for kept in (len(whole), 3, 0):
        lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
        log.write_text("".join(lines[:kept]))
        synthetic.search(CmaEs(10, storage=storage), log)
        assert [trial.digest for trial in TrialLog(log).trials] == [trial.digest for trial in whole]
        digests = [trial.user_attrs["digest"] for trial in only_study(storage).trials]
        assert digests == [trial.digest for trial in whole]


def test_sampling_is_the_same_with_and_without_a_storage(storage: str, synthetic: Synthetic, tmp_path: Path) -> None:
    plain, _ = synthetic.search(Tpe(15, startup=5), tmp_path / "plain.jsonl", seed=2)
    mirrored, _ = synthetic.search(Tpe(15, startup=5, storage=storage), tmp_path / "mirrored.jsonl", seed=2)
    assert [trial.digest for trial in plain] == [trial.digest for trial in mirrored]


def test_searches_are_told_apart(storage: str, synthetic: Synthetic, tmp_path: Path) -> None:
    for seed in range(2):
        synthetic.search(Tpe(4, storage=storage), tmp_path / f"{seed}.jsonl", seed)
    synthetic.search(Tpe(5, storage=storage), tmp_path / "longer.jsonl")
    assert len(set(optuna.get_all_study_names(opened(storage)))) == 3
    synthetic.search(Tpe(4, storage=storage, study="mine"), tmp_path / "mine.jsonl")
    with pytest.raises(ConfigError, match=r"strategy\.study=mine in .* holds another search.*name another study"):
        synthetic.search(Tpe(4, storage=storage, study="mine"), tmp_path / "other.jsonl", seed=1)
    assert not (tmp_path / "other.jsonl").exists(), "nothing was measured in vain"


def test_several_write_to_one_storage_at_once(storage: str, synthetic: Synthetic, tmp_path: Path) -> None:
    trials, objective = synthetic.search(CmaEs(6), tmp_path / "trials.jsonl")

    def mirror(name: str) -> None:
        study = Mirror(storage, name, objective, ["drop"], name)
        for trial in trials:
            study.add(trial)

    names = [f"study {number}" for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(mirror, names))
    for name in names:
        study = optuna.load_study(study_name=name, storage=opened(storage))
        assert [trial.user_attrs["digest"] for trial in study.trials] == [trial.digest for trial in trials]


def test_opens_in_the_dashboard(storage: str, synthetic: Synthetic, tmp_path: Path) -> None:
    import optuna_dashboard

    strategy = Nsga2(6, storage=storage, study="nsga2 on digits", costs=["weight_bytes"])
    trials, _ = synthetic.search(strategy, tmp_path / "trials.jsonl")
    app = optuna_dashboard.wsgi(opened(storage))

    def get(path: str) -> dict:
        environ: dict = {"PATH_INFO": path, "QUERY_STRING": ""}
        setup_testing_defaults(environ)
        answered: list[str] = []
        body = b"".join(app(environ, lambda status, headers, *_: answered.append(status)))
        assert answered == ["200 OK"]
        return json.loads(body)

    [summary] = get("/api/studies")["study_summaries"]
    assert summary["study_name"] == "nsga2 on digits"
    detail = get(f"/api/studies/{summary['study_id']}")
    assert detail["objective_names"] == ["drop", "weight_bytes"]
    assert len(detail["trials"]) == len(trials)
    assert "weight stem" in {parameter["name"] for parameter in detail["intersection_search_space"]}
    attributes = {item["key"]: item["value"] for item in detail["trials"][-1]["user_attrs"]}
    assert attributes["digest"] == trials[-1].digest
    assert detail["trials"][0]["constraints"], "the dashboard knows which policies are over a limit"


def broken(tmp_path: Path) -> dict[str, str]:
    garbage = tmp_path / "garbage.log"
    garbage.write_bytes(b"SQLite format 3\x00\n\x01\x02\n")
    (tmp_path / "file").write_text("")
    return {
        "not a journal": str(garbage),
        "no folder": str(tmp_path / "file" / "optuna.log"),
        "no database": f"sqlite:///{garbage}",
        "no dialect": "nowhere://me:secret@host/name",
        "no server": "postgresql://me:secret@localhost:1/name?password=secret",
        "no URL": "sqlite://me:secret@",
    }


@pytest.mark.parametrize("case", ["not a journal", "no folder", "no database", "no dialect", "no server", "no URL"])
def test_storages_that_cannot_be_used(case: str, synthetic: Synthetic, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"strategy\.storage=.* (cannot be used: .* must be the path of a journal|is no journal file)"
    ) as info:
        synthetic.search(Tpe(4, storage=broken(tmp_path)[case]), tmp_path / "trials.jsonl")
    assert "secret" not in str(info.value)
    assert info.value.__cause__ is None
    assert info.value.__suppress_context__
    assert not (tmp_path / "trials.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("postgresql://me:se:c@ret@host/name", "postgresql://me:***@host/name"),
        ("postgresql://me@host/name", "postgresql://me@host/name"),
        ("mysql://host/name?user=me&password=secret&x=1", "mysql://host/name?user=me&password=***&x=1"),
        ("runs/optuna.log", "runs/optuna.log"),
    ],
)
def test_passwords_are_hidden(given: str, shown: str) -> None:
    assert hidden(given) == shown
    assert hidden(f"no such host in '{given}' at all") == f"no such host in '{shown}' at all"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"storage": "."}, r"strategy\.storage=\. is a folder; name a journal file in it"),
        ({"storage": ""}, "neither a path nor a URL"),
        ({"storage": "sqlite:/studies.db"}, r"strategy\.storage=sqlite:/studies\.db is neither a path nor a URL"),
        ({"study": "mine"}, r"strategy\.study=mine names a study in no storage; set strategy\.storage"),
    ],
)
def test_settings_that_contradict(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tpe(**settings)
