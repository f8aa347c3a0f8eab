"""Sequences of repairs: kept only where they help, reported, and found again in the plan."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny import Bench, TinyTask, make_bench, tiny_plan

from hwmodels import CostModel, Precision, StorageModel
from search.budget import Budget
from search.errors import ConfigError
from search.job import Job, RecoverSettings, SpaceSettings
from search.plan import Plan
from search.policy import Policy
from search.quantize.simulate import QuantizedModel, exact_inference
from search.recover import REPAIRS, parse_steps, recover
from search.run import search
from search.strategies.solver import Solver
from search.tasks.task import Task


def state(simulated: QuantizedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in simulated.apply({}).state_dict().items()}


def harm(simulated: QuantizedModel, policy: Mapping[str, Precision], task: Task) -> QuantizedModel:
    """Makes every sample the last class."""
    fork = simulated.fork()
    fork.alter({"head.bias": torch.tensor([0.0, 0, 0, 0, 1e3])})
    return fork


SMALL = {"adaround": {"steps": 20, "samples": 200}, "finetune": {"steps": 10}, "awq": {"grid": 4}}


@pytest.mark.parametrize("name", list(REPAIRS))
def test_every_repair_leaves_its_argument_alone_and_works_alone(name: str) -> None:
    bench = make_bench()
    policy = Policy.uniform(bench.network, Precision.parse("int3/uint8"))
    before = state(bench.simulated)
    (step,) = parse_steps([{name: SMALL.get(name, {})}])
    repaired = step(bench.simulated, policy, bench.task, bench.simulated)
    assert repaired is not bench.simulated
    assert all(torch.equal(value, before[key]) for key, value in state(bench.simulated).items())
    again = step(bench.simulated, policy, bench.task, bench.simulated)
    assert all(torch.equal(value, state(again)[key]) for key, value in state(repaired).items()), "deterministic"


@pytest.mark.parametrize("seed", range(4))
def test_a_sequence_never_makes_the_selection_split_worse(seed: int) -> None:
    bench = make_bench(TinyTask(seed))
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint8"))
    before = bench.evaluator.measure(policy, "selection")
    found = recover(parse_steps(["gptq", "bias_correction"]), bench.evaluator, policy)
    assert found.quality.drop <= before.drop
    assert bench.evaluator.of(found.simulated).measure(policy, "selection") == found.quality
    assert [gain.repair for gain in found.gains] == ["gptq", "bias_correction"]
    assert found.gains[0].before == before.drop
    assert all(gain.kept == (gain.after <= gain.before) for gain in found.gains)


def test_what_does_not_help_is_not_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPAIRS, "harm", harm)
    policy = Policy.uniform(bench.network, Precision.parse("int8/uint8"))
    found = recover(parse_steps(["harm"]), bench.evaluator, policy)
    assert found.simulated is bench.simulated
    assert found.quality == bench.evaluator.measure(policy, "selection")
    assert not found.gains[0].kept
    assert found.gains[0].after > found.gains[0].before


def test_bias_correction_after_gptq_keeps_the_float_network_s_means(bench: Bench) -> None:
    policy = Policy.uniform(bench.network, Precision.parse("int2/float"))
    images = torch.cat([batch[0] for batch in bench.task.batches("calibration")])

    def means(simulated: QuantizedModel, under: Mapping[str, Precision]) -> torch.Tensor:
        with exact_inference():
            return simulated.apply(under)(images).mean(0)

    wanted, simulated = means(bench.simulated, {}), bench.simulated
    for step in parse_steps(["gptq", "bias_correction"]):
        simulated = step(simulated, policy, bench.task, bench.simulated)
    torch.testing.assert_close(means(simulated, policy), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(REPAIRS))
def test_what_repairs_alter_travels_in_the_plan(name: str, tmp_path: Path) -> None:
    bench = make_bench()
    policy = Policy.uniform(bench.network, Precision.parse("int3/uint8"))
    (step,) = parse_steps([{name: SMALL.get(name, {})}])
    simulated = step(bench.simulated, policy, bench.task, bench.simulated)
    bench.evaluator = bench.evaluator.of(simulated)
    plan = Plan.load(tiny_plan(bench, tmp_path, policy).save(tmp_path / "plan.json"))
    x = bench.task.example_input
    with exact_inference():
        assert torch.equal(plan.apply(bench.task.model)(x), simulated.apply(policy)(x))


def job(directory: Path, **recover_settings: object) -> Job:
    cost_model: CostModel = StorageModel()
    return Job(
        task=TinyTask(),
        cost_model=cost_model,
        strategy=Solver(evaluations=4),
        budget=Budget(average_weight_bits=3.0),
        run_dir=directory,
        space=SpaceSettings(["int2", "int4"], ["uint8"]),
        recover=RecoverSettings(**recover_settings),
    )


def test_a_search_repairs_before_and_after(tmp_path: Path) -> None:
    found = search(job(tmp_path, before=["equalization"], steps=["gptq", "bias_correction"], at="int4/uint8"))
    assert [step.repair for step in found.plan.recover] == ["equalization", "gptq", "bias_correction"]
    kept = [step for step in found.plan.recover if step.kept]
    assert found.plan.selection.drop == pytest.approx(kept[-1].after if kept else found.plan.recover[0].before)
    task = TinyTask()
    with exact_inference():
        scores = [task.score(found.plan.apply(task.model)(x), (x, y)) for x, y in task.batches("report")]
    assert torch.cat(scores).mean().item() == pytest.approx(found.plan.quality.value)


def test_a_plan_with_biases_repaired_in_the_loop_delivers_what_was_searched(tmp_path: Path) -> None:
    from search.quantize.settings import QuantizerSettings

    plain = job(tmp_path)
    found = search(Job(**{**vars(plain), "quantizer": QuantizerSettings(repair="bias")}))
    quantized = [layer.name for layer in found.plan.layers]
    assert set(found.plan.altered) == {f"{name}.bias" for name in quantized}
    task = TinyTask()
    before = copy.deepcopy(task.model.state_dict())
    with exact_inference():
        scores = [task.score(found.plan.apply(task.model)(x), (x, y)) for x, y in task.batches("report")]
    assert torch.cat(scores).mean().item() == pytest.approx(found.plan.quality.value)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["bias_corection"], r"recover.steps: 'bias_corection' is unknown.*did you mean 'bias_correction'.*allowed"),
        ([{"gptq": {"dampin": 1}}], r"recover.steps: gptq has no option dampin .did you mean 'damping'.*allowed"),
        ([{"finetune": {"on_step": 1}}], "finetune has no option on_step"),
        ([{"gptq": 3}], "the options of gptq must be a mapping"),
        ([3], "recover.steps: 3 is unknown"),
        ([{}], "is unknown"),
    ],
)
def test_wrong_steps_are_refused(steps: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RecoverSettings(steps=steps)


def test_steps_are_read_with_their_options() -> None:
    first, second = parse_steps(["bias_correction", {"gptq": {"damping": 0.1, "block": 64}}])
    assert (str(first), str(second)) == ("bias_correction", "gptq(damping=0.1, block=64)")
    with pytest.raises(ConfigError, match=r"recover.at: 'int99' is no format"):
        RecoverSettings(at="int99")
