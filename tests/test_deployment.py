"""A search for a backend keeps to what the backend can run: its ties, and only the candidates it stores as planned."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from conformance import NETWORK
from tiny import TinyTask

import search
from hwmodels import Layer, Network, Precision, StorageModel
from search.app import search_command
from search.backends import BACKENDS, backend
from search.backends.base import Backend
from search.backends.deployment import BackendTarget, Deployment
from search.backends.outcome import ExportReport, LayerExport
from search.cli import main, parse
from search.errors import ConfigError, UnsupportedError
from search.legal import in_words, runnable, without
from search.plan import Plan
from search.space import build_space
from search.ties import joined


class Fussy(Backend):
    """Stores int4 and int8 alone, int4 only together with uint8, in an `int8` that the rest is widened to."""

    name, proof = "fussy", "emitted"

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        weight, given = precision.weight, precision.input
        became = "float" if weight.is_float else "exact" if weight.bits in (4, 8) else "contained"
        takes = given.is_float or given.bits == 8 or (weight.bits != 4 and given.bits > 4)
        side = "float" if given.is_float else "exact" if takes else "altered"
        runs = "" if takes else f"{weight}/uint8"
        return LayerExport(layer.name, str(precision), became, side, "", "" if takes else "rounded to uint8", runs)

    def write(self, plan, task, folder, recalibrate):
        raise NotImplementedError

    def check(self, plan, task, folder, layers):
        raise NotImplementedError

    def ties(self, network: Network) -> list[list[str]]:
        return [["conv", "fc"]]


def space_of(weight: list[str], given: list[str]):
    return build_space(NETWORK, weight, given)


class TestCandidates:
    @pytest.mark.parametrize(
        ("keep", "weights", "inputs"),
        [
            ("exact", ["int4", "int8"], ["uint8"]),
            ("contained", ["int2", "int4", "int8"], ["uint8"]),
            ("any", ["int2", "int4", "int8"], ["uint4", "uint8"]),
        ],
    )
    def test_what_is_kept(self, keep: str, weights: list[str], inputs: list[str]) -> None:
        space = space_of(["int2", "int4", "int8"], ["uint4", "uint8"])
        kept, dropped = runnable(space, NETWORK, StorageModel(), [BackendTarget(Fussy(), keep)])
        formats = {d.side: [str(format) for format in d.formats] for d in kept.decisions}
        assert formats == {"weight": weights, "input": inputs}
        assert bool(dropped) == (keep != "any")

    def test_reasons_are_the_backends(self) -> None:
        _, dropped = runnable(
            space_of(["int2", "int8"], ["uint4", "uint8"]), NETWORK, StorageModel(), [BackendTarget(Fussy(), "exact")]
        )
        said = " ".join(in_words(dropped))
        assert "fussy would leave the weight contained" in said
        assert "fussy would leave the input altered: rounded to uint8" in said

    def test_a_tensor_left_without_candidates_stays_in_float(self) -> None:
        space = space_of(["int2", "int3"], ["uint8"])
        kept, dropped = runnable(space, NETWORK, StorageModel(), [BackendTarget(Fussy(), "exact")])
        formats = {(d.side, str(format)) for d in kept.decisions for format in d.formats}
        assert formats == {("weight", "float"), ("input", "uint8")}
        again = without(space, [asdict(one) for one in dropped])
        assert [d.formats for d in again.decisions] == [d.formats for d in kept.decisions]

    def test_float_that_the_device_cannot_run_is_an_error(self) -> None:
        class Integers(StorageModel):
            name = "integers"

            def refusal(self, layer: Layer, precision: Precision) -> str | None:
                return "integers only" if precision.weight.is_float else None

        with pytest.raises(ConfigError, match=r"conv can be quantized in none of space.weight .* integers cannot run"):
            runnable(space_of(["int2"], ["uint8"]), NETWORK, Integers(), [BackendTarget(Fussy(), "exact")])

    def test_a_backend_that_finds_its_own_ranges_keeps_its_formats(self) -> None:
        class Own(Fussy):
            ranges = "own"

            def express(self, layer: Layer, precision: Precision) -> LayerExport:
                return LayerExport(layer.name, str(precision), "altered", "float", "", "own ranges", str(precision))

        assert Own().refuses(NETWORK["fc"], Precision.parse("int4")) is None
        assert Own().refuses(NETWORK["fc"], Precision.parse("int4/uint8")) is not None


class TestTies:
    def test_ties_that_meet_are_one(self) -> None:
        assert joined([["fc", "conv"], ["conv", "depthwise"]], NETWORK) == [["conv", "depthwise", "fc"]]
        assert joined([["conv", "fc"], ["*.q", "*.k"]], NETWORK) == [["conv", "fc"], ["*.q", "*.k"]]
        assert joined([], NETWORK) == []

    def test_a_deployment_has_those_of_its_backends(self) -> None:
        assert Deployment((BackendTarget(Fussy(), "exact"),)).ties(NETWORK) == [["conv", "fc"]]
        assert Deployment().ties(NETWORK) == []


def test_a_search_for_a_backend_is_one_it_keeps_exactly(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    plan = search.find_plan(
        TinyTask(),
        hardware="storage",
        budget={"average_weight_bits": 6},
        strategy={"name": "random", "evaluations": 3},
        space={"weight": ["int3", "int4", "int8"], "input": ["uint4", "uint8"]},
        quantizer={"repair": "none"},
        backends=["onnxruntime"],
        run_dir=tmp_path / "run",
    )
    assert {precision.weight.bits for precision in plan.policy.values()} <= {4, 8}
    report = search.export(plan, "onnxruntime", TinyTask(), tmp_path / "out", strict=True)
    assert all(layer.weight == layer.input == "exact" for layer in report.layers)
    assert any("int3 dropped" in caution for caution in plan.cautions)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["dropped"]
    assert Plan.load(tmp_path / "run").config["export"]["backends"] == ["onnxruntime"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("export=onnxruntim", "export=onnxruntim is unknown (did you mean 'onnxruntime'?)"),
        ("export.backends=[onnxruntim]", "there is no backend 'onnxruntim' (did you mean 'onnxruntime'?)"),
        ("export.keep=exat", "export.keep=exat is unknown (did you mean 'exact'?)"),
    ],
)
def test_mistakes_are_named(override: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["search", override, f"run_dir={tmp_path}/run", f"run_root={tmp_path}", "tracking=none"])
    assert code == 2
    assert capsys.readouterr().err.startswith(f"error: {expected}")


def test_a_backend_of_ones_own() -> None:
    assert isinstance(backend("test_deployment.Fussy"), Backend)
    with pytest.raises(ConfigError, match="Fussy cannot be imported"):
        backend("nowhere.Fussy")
    with pytest.raises(ConfigError, match="must be a subclass"):
        backend("pathlib.Path")


def test_an_export_that_cannot_place_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    settings = ["export=torchao", "quantizer.placement=full", f"run_dir={tmp_path}/run", "tracking=none"]
    with pytest.raises(ConfigError, match=r"export=torchao and quantizer.placement=full do not go together"):
        search_command(settings)
    assert not (tmp_path / "run" / "trials.jsonl").exists()


def test_settings_may_stand_anywhere_behind_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["plan", "task.a=1", "--backend", "x"], ["plan", "--backend", "x", "task.a=1"]):
        assert parse(["verify", *words]).overrides == ["task.a=1"]
    with pytest.raises(SystemExit):
        parse(["verify", "plan", "--backend", "x", "--nonsense"])
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err


def test_a_model_that_a_backend_cannot_take_is_refused_before_the_search(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="vllm takes Hugging Face models"):
        search_command(["export=vllm", f"run_dir={tmp_path}/run", "tracking=none"])
    assert not (tmp_path / "run" / "trials.jsonl").exists()


def test_strict_refuses_and_writes_nothing(tmp_path: Path) -> None:
    faults = LayerExport("fc", "int4/uint8", "exact", "altered", "", "why", "int4/int8")
    report = ExportReport("fussy", (), (faults,))
    assert str(report.policy["fc"]) == "int4/int8"
    with pytest.raises(UnsupportedError, match=r"input of fc \(uint8\) is altered.*export=fussy"):
        report.require_faithful()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_package_that_is_not_installed_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.backends.find_spec", lambda package: None)
    entry = BACKENDS[name]
    missing = (*entry.writing, *entry.checking)
    with pytest.raises(UnsupportedError) as error:
        backend(name, "verify")
    assert f"pip install 'bitplan[{entry.extra}]'" in str(error.value)
    assert missing[0] in str(error.value)
    assert backend(name, "plan").name == name
