"""What every task, cost model, strategy, backend and board must fulfil.

Inherit the class, and give the one fixture it asks for:

    from conformance import StrategyContract

    class TestMyStrategy(StrategyContract):
        @pytest.fixture
        def make_strategy(self):
            return lambda evaluations: MyStrategy(evaluations=evaluations)

Pytest then runs the contract's tests against the subclass; tests of one's own go into the same class.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tiny import Bench, TinyTask, make_bench, tiny_plan

from hwmodels import CostModel, Layer, Network, Operation, Precision, Tensor, Workload
from hwmodels.base import Choices
from hwmodels.cost import ADDITIVE_COSTS, COSTS, TIERS
from search.backends.base import Backend, Emitter
from search.backends.outcome import Validation
from search.errors import DataError
from search.objective import SpentError
from search.plan import Plan, tensor_digests
from search.policy import Policy
from search.quality.evaluate import sample_scores
from search.strategies.base import Strategy
from search.tasks.task import SPLITS, Task, tensors_in
from search.trace import trace
from search.trials import Trial, TrialLog
from search.workers.board import Board, Outcome, Work


class TaskContract:
    """Any task. Fixture `task`:

    class TestMyTask(TaskContract):
        @pytest.fixture
        def task(self):
            return MyTask()
    """

    def test_network_can_be_traced(self, task: Task) -> None:
        assert not task.model.training, "the model must be in evaluation mode"
        assert len(trace(task.model, task.example_input)) > 0

    def test_batches_are_the_same_every_time(self, task: Task) -> None:
        for split in SPLITS:
            first, second = ([t.clone() for batch in task.batches(split) for t in tensors_in(batch)] for _ in range(2))
            assert len(first) == len(second)
            assert all(map(torch.equal, first, second))

    def test_splits_share_no_sample(self, task: Task) -> None:
        if not task.per_sample:
            pytest.skip("the splits lie within the task's function")
        seen = {split: {key for batch in task.batches(split) for key in samples(task, batch)} for split in SPLITS}
        assert all(seen.values()), "a split is empty"
        for split, other in (("calibration", "selection"), ("calibration", "report"), ("selection", "report")):
            shared = seen[split] & seen[other]
            assert not shared, f"{len(shared)} samples are in {split} and in {other}"

    def test_scores(self, task: Task) -> None:
        before = tensor_digests(task.model)
        for split in ("selection", "report"):
            scores = sample_scores(task, task.model, split)
            count = sum(len(samples(task, batch)) for batch in task.batches(split)) if task.per_sample else 1
            assert scores.shape == (count,), "score must return one value per sample"
            assert np.isfinite(scores).all()
            assert np.array_equal(scores, sample_scores(task, task.model, split)), "scores must be repeatable"
            if task.metric == "accuracy":
                assert scores.min() >= 0
                assert scores.max() <= 1
        assert tensor_digests(task.model) == before, "scoring must not alter the model"

    def test_divergence(self, task: Task) -> None:
        with torch.no_grad():
            outputs = task.outputs(task.model, next(iter(task.batches("calibration"))))
        same = task.divergence(outputs, outputs)
        other = task.divergence(outputs, outputs + torch.randn(outputs.shape, dtype=outputs.dtype))
        assert same.shape == other.shape == (len(outputs),), "divergence must return one value per sample"
        assert same.abs().max() <= 1e-6
        assert other.min() >= 0
        assert other.max() > 0

    def test_fingerprint_is_stable(self, task: Task) -> None:
        again = copy.copy(task)
        again.__dict__.pop("fingerprint", None)
        assert again.fingerprint == task.fingerprint


def samples(task: Task, batch: Any) -> list[bytes]:
    """The inputs of every sample of a batch, as bytes."""
    inputs = tensors_in(task.inputs(batch))
    return [b"".join(tensor[i].contiguous().numpy().tobytes() for tensor in inputs) for i in range(len(inputs[0]))]


class CostModelContract:
    """Any cost model. Fixture `cost_model`, and `precisions` where it does not know all of these:

    class TestMyChip(CostModelContract):
        precisions = ("int8/uint8", "float")

        @pytest.fixture
        def cost_model(self):
            return MyChip()
    """

    precisions: ClassVar[Sequence[str]] = ("int2/uint4", "int4/uint8", "int8/uint8", "int8", "float")
    workload: ClassVar[Workload] = Workload()

    def test_prices_every_choice(self, cost_model: CostModel) -> None:
        table = cost_model.cost_table(NETWORK, self.choices(), self.workload)
        assert cost_model.name
        assert table.source
        assert set(table.tiers.values()) <= set(TIERS)
        for layer, precisions in self.choices().items():
            for precision in precisions:
                cost = dataclasses.asdict(table.layers[layer][precision].cost)
                assert all(math.isnan(value) or 0 <= value < math.inf for value in cost.values()), (layer, precision)
        for cost in COSTS:
            known = {math.isnan(getattr(priced.cost, cost)) for row in table.layers.values() for priced in row.values()}
            assert len(known) == 1, f"{cost} is known for some choices only"

    def test_network_costs_what_its_choices_add_up_to(self, cost_model: CostModel) -> None:
        table = cost_model.cost_table(NETWORK, self.choices(), self.workload)
        for policy in self.policies():
            report = cost_model.network_cost(NETWORK, policy, self.workload)
            assert set(report.layers) == set(policy)
            for cost in ADDITIVE_COSTS:
                parts = [getattr(table.layers[layer][precision].cost, cost) for layer, precision in policy.items()]
                met = [getattr(one.cost(policy[one.producer], policy[one.consumer]), cost) for one in table.boundaries]
                expected = sum(parts) + sum(met) + getattr(table.fixed, cost)
                assert getattr(report.total, cost) == pytest.approx(expected, rel=1e-12, nan_ok=True), cost

    def test_is_repeatable(self, cost_model: CostModel) -> None:
        tables = [str(cost_model.cost_table(NETWORK, self.choices(), self.workload)) for _ in range(2)]
        assert tables[0] == tables[1]

    def test_larger_batches_cost_no_less(self, cost_model: CostModel) -> None:
        policy = next(self.policies())
        one, eight = (
            cost_model.network_cost(NETWORK, policy, dataclasses.replace(self.workload, batch=batch)).total
            for batch in (1, 8)
        )
        for cost in COSTS:
            assert not getattr(eight, cost) < getattr(one, cost), cost
        assert eight.weight_bytes == one.weight_bytes

    def choices(self) -> Choices:
        precisions = tuple(map(Precision.parse, self.precisions))
        weight_only = tuple(dict.fromkeys(Precision(precision.weight) for precision in precisions))
        return {layer.name: precisions if layer.quantizes_input else weight_only for layer in NETWORK}

    def policies(self) -> Iterator[Policy]:
        for name in self.precisions:
            yield Policy.uniform(NETWORK, Precision.parse(name))
        rng = np.random.default_rng(0)
        for _ in range(5):
            yield Policy({layer: rows[rng.integers(len(rows))] for layer, rows in self.choices().items()})


def _layer(
    name: str, kind: str, reads: str, weight: tuple[int, ...], macs: int, read: tuple[int, ...], **more
) -> Layer:
    return Layer(name, kind, (reads,), (name,), weight_shape=weight, macs=macs, input_shape=read, **more)


NETWORK = Network(
    layers=(
        _layer("conv", "conv2d", "input", (8, 3, 3, 3), 3456, (2, 3, 4, 4), output_shape=(2, 8, 4, 4), bias_count=8),
        _layer("depthwise", "conv2d", "relu", (8, 1, 3, 3), 1152, (2, 8, 4, 4), output_shape=(2, 8, 4, 4), groups=8),
        _layer("fc", "linear", "depthwise", (10, 128), 1280, (2, 128), output_shape=(2, 10), bias_count=10),
    ),
    operations=(Operation("relu", "relu", ("conv",), ("relu",)),),
    tensors={
        tensor.name: tensor
        for tensor in (
            Tensor("input", (2, 3, 4, 4), None, ("conv",)),
            Tensor("conv", (2, 8, 4, 4), "conv", ("relu",)),
            Tensor("relu", (2, 8, 4, 4), "relu", ("depthwise",)),
            Tensor("depthwise", (2, 8, 4, 4), "depthwise", ("fc",)),
            Tensor("fc", (2, 10), "fc"),
        )
    },
    other_parameters=16,
    order=("conv", "relu", "depthwise", "fc"),
    outputs=("fc",),
)
"""A convolution, a depthwise one and a classifier, written down by hand."""


class StrategyContract:
    """Any strategy. Fixture `make_strategy`, a function from a number of evaluations to a strategy:

    class TestMyStrategy(StrategyContract):
        @pytest.fixture
        def make_strategy(self):
            return lambda evaluations: MyStrategy(evaluations=evaluations)
    """

    evaluations: ClassVar[int] = 10

    @pytest.fixture(scope="class")
    @classmethod
    def search_bench(cls) -> Bench:
        return make_bench()

    @pytest.fixture
    def run(self, search_bench: Bench, make_strategy: Callable[[int], Strategy]) -> Callable[..., list[Trial]]:
        """Runs the strategy on the tiny network, by default under a size budget between all 4 and all 8 bits."""
        limits = {"weight_bytes": 0.25 * search_bench.pricing.reference("float")["weight_bytes"]}

        def run(folder: Path, seed: int = 0, evaluations: int = self.evaluations, **options: Any) -> list[Trial]:
            folder.mkdir(exist_ok=True)
            strategy = make_strategy(evaluations)
            kept = options.pop("limits", limits)
            objective = search_bench.objective(folder / "trials.jsonl", kept, strategy, **options)
            with suppress(SpentError):
                strategy.search(search_bench.space, objective, np.random.default_rng(seed))
            for trial in TrialLog(folder / "trials.jsonl").trials:
                over = [name for name in kept if trial.cost[name] > kept[name]]
                assert (trial.state == "infeasible") == bool(over), "only policies within budget are measured"
            return TrialLog(folder / "trials.jsonl").trials

        return run

    def test_measures_something_within_budget(self, run, tmp_path: Path) -> None:
        assert any(trial.state == "complete" for trial in run(tmp_path))

    @pytest.mark.parametrize("evaluations", [1, 2, 5])
    def test_spends_no_more_than_allowed(self, run, tmp_path: Path, evaluations: int) -> None:
        trials = run(tmp_path, evaluations=evaluations)
        assert 0 < sum(trial.fidelity for trial in trials if trial.state == "complete") <= evaluations + 1e-9

    def test_proposes_only_policies_of_the_space(self, run, tmp_path: Path, search_bench: Bench) -> None:
        for trial in run(tmp_path):
            assert search_bench.space.decode(search_bench.space.encode(trial.policy)) == trial.policy

    def test_one_seed_gives_one_sequence(self, run, tmp_path: Path) -> None:
        assert what(run(tmp_path / "first", seed=3)) == what(run(tmp_path / "second", seed=3))

    def test_ends_under_a_budget_only_one_policy_keeps(self, run, tmp_path: Path, search_bench: Bench) -> None:
        lowest = search_bench.pricing.costs(search_bench.space.decode([0] * len(search_bench.space.decisions)))
        trials = run(tmp_path, limits={"weight_bytes": lowest["weight_bytes"]})
        assert {trial.state for trial in trials} <= {"complete", "infeasible"}

    def test_minimises_cost_where_the_drop_is_limited(self, run, tmp_path: Path) -> None:
        trials = run(tmp_path, limits={}, quality_drop=0.1)
        assert any(trial.state == "complete" for trial in trials)

    def test_resumes_to_the_same_trials(self, run, tmp_path: Path, search_bench: Bench, monkeypatch) -> None:
        """Killed after any trial, also in the middle of writing it, it goes on without measuring anything twice."""
        whole = run(tmp_path / "whole")
        lines = (tmp_path / "whole" / "trials.jsonl").read_text().splitlines(keepends=True)
        measured: list[str] = []
        measure = search_bench.evaluator.measure

        def counted(policy: Policy, *arguments: Any) -> Any:
            measured.append(policy.digest)
            return measure(policy, *arguments)

        monkeypatch.setattr(search_bench.evaluator, "measure", counted)
        for cut in range(len(lines) + 1):
            folder = tmp_path / f"cut{cut}"
            folder.mkdir()
            torn = lines[cut][: len(lines[cut]) // 2] if cut < len(lines) else ""
            (folder / "trials.jsonl").write_text("".join(lines[:cut]) + torn)
            measured.clear()
            assert what(run(folder)) == what(whole), f"cut after {cut} trials"
            assert measured == [trial.digest for trial in whole[cut:] if trial.state != "infeasible"]


def what(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Trials without the seconds they took."""
    return [trial.to_dict() | {"seconds": None, "proposing_seconds": None} for trial in trials]


class BackendContract:
    """Any backend, run or only read. Fixture `backend`, and a precision that it keeps:

    class TestMyBackend(BackendContract):
        precision = "int4-g32"

        @pytest.fixture
        def backend(self):
            return MyBackend()

    Set `agreement` lower where it computes otherwise than the simulation, and `make_task` where it takes none but
    certain models.
    """

    precision: ClassVar[str] = "int8/uint8"
    agreement: ClassVar[float] = 0.995

    def make_task(self) -> Task:
        """Whose network is exported."""
        return TinyTask()

    @pytest.fixture
    def planned(self, tmp_path: Path) -> tuple[Plan, Task]:
        bench = make_bench(self.make_task(), directory=tmp_path)
        return tiny_plan(bench, tmp_path, uniform(bench.network, self.precision)), bench.task

    def test_says_what_becomes_of_every_format(self, backend: Backend) -> None:
        for layer, wanted in itertools.product(EXPORTED, map(Precision.parse, EXPORTED_PRECISIONS)):
            precision = wanted if layer.quantizes_input else Precision(wanted.weight)
            said = backend.express(layer, precision)
            assert (said.name, said.precision) == (layer.name, str(precision))
            for side, format, became in said.sides:
                assert became in ("exact", "contained", "altered", "float")
                assert not format.is_float or became == "float", f"{side} of {layer.kind} in {precision}"
            runs = Precision.parse(said.runs or said.precision)
            assert not said.faults or (said.note and said.runs), f"{precision}: say why, and what runs instead"
            assert said.faults or runs == precision, f"{precision}: what runs is not what was planned"
            again = backend.express(layer, runs)
            assert (again.runs or again.precision) == str(runs), (
                f"{precision} runs as {runs}, which does not run itself"
            )
            if backend.ranges == "plan":
                assert not again.faults, f"{runs} is what runs, so it must run as planned"

    def test_reports_every_layer(self, backend: Backend, planned: tuple[Plan, Task], tmp_path: Path) -> None:
        plan, task = planned
        before = tensor_digests(task.model)
        report = backend.export(plan, task, tmp_path / "out")
        assert report.backend == backend.name
        assert report.files
        assert all(file.is_file() for file in report.files)
        assert [layer.name for layer in report.layers] == [layer.name for layer in plan.layers]
        for layer in report.layers:
            said = backend.express(plan.network[layer.name], plan.policy[layer.name])
            assert (layer.weight, layer.input, layer.runs) == (said.weight, said.input, said.runs)
            assert layer.precision == str(plan.policy[layer.name])
        assert tensor_digests(task.model) == before, "exporting must not alter the model"

    def test_the_folder_is_whole_and_the_same_every_time(
        self, backend: Backend, planned: tuple[Plan, Task], tmp_path: Path
    ) -> None:
        plan, task = planned
        for name in ("first", "second", "first"):
            backend.export(plan, task, tmp_path / "out" / name)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first", "second"]
        first, second = (contents(tmp_path / "out" / name) for name in ("first", "second"))
        assert first == second
        assert set(first) > {"README.md", "manifest.json"}
        assert 2 <= len(first["README.md"].decode().strip().splitlines()) <= 5
        manifest = json.loads(first["manifest.json"])
        assert set(manifest["files"]) == set(first) - {"manifest.json"}

    def test_a_damaged_or_foreign_folder_is_refused(
        self, backend: Backend, planned: tuple[Plan, Task], tmp_path: Path
    ) -> None:
        plan, task = planned
        with pytest.raises(DataError, match="bitplan export"):
            backend.verify(plan, task, tmp_path / "nothing")
        report = backend.export(plan, task, tmp_path / "out")
        other = plan.model_copy(update={"digest": "another"})
        with pytest.raises(DataError, match="not from another"):
            backend.verify(other, task, tmp_path / "out")
        report.files[0].write_bytes(report.files[0].read_bytes()[:-1])
        with pytest.raises(DataError, match="is damaged"):
            backend.verify(plan, task, tmp_path / "out")
        foreign = tmp_path / "mine"
        foreign.mkdir()
        (foreign / "thesis.txt").write_text("all of it")
        with pytest.raises(DataError, match="no export wrote"):
            backend.export(plan, task, foreign)
        assert contents(foreign) == {"thesis.txt": b"all of it"}

    def test_delivers_what_the_plan_promises(
        self, backend: Backend, planned: tuple[Plan, Task], tmp_path: Path
    ) -> None:
        plan, task = planned
        report = backend.export(plan, task, tmp_path / "out")
        found = backend.verify(plan, task, tmp_path / "out")
        assert found.layers == report.layers
        if isinstance(found, Validation):
            assert found.proof == backend.proof
            assert found.by
            assert len(found.checks) > 1, "the real package, or its document, must be asked"
            return
        assert backend.proof == "executed"
        assert found.samples == plan.quality.samples
        assert found.promised == plan.quality.value
        assert found.agreement >= self.agreement
        if not any(layer.faults for layer in report.layers):
            assert abs(found.quality - found.promised) <= (1 - self.agreement) * abs(found.promised) + 1 / found.samples
        assert found.bytes_on_disk > 0
        assert found.low is None or found.low <= found.quality <= found.high


class SeparateBackendContract(BackendContract):
    """A backend whose package has an environment of its own: `make verify-backends` asks it there.

    The everyday suite runs everything else: what it says, what it writes, and what is read back.
    """

    @pytest.mark.backend
    def test_delivers_what_the_plan_promises(
        self, backend: Backend, planned: tuple[Plan, Task], tmp_path: Path
    ) -> None:
        super().test_delivers_what_the_plan_promises(backend, planned, tmp_path)


class EmitterContract(SeparateBackendContract):
    """A backend whose files are read back and validated, not run."""

    def test_reads_back_what_it_wrote(self, backend: Emitter, planned: tuple[Plan, Task], tmp_path: Path) -> None:
        plan, task = planned
        report = backend.export(plan, task, tmp_path / "out")
        said = backend.read(tmp_path / "out")
        assert {name: said.get(name, Precision()) for name in report.policy} == dict(report.policy)


class BoardContract:
    """Any board. Fixture `make_board`, which gives another process' view of the same place each time:

    class TestMyBoard(BoardContract):
        @pytest.fixture
        def make_board(self, tmp_path):
            return lambda: MyBoard(tmp_path / "board")
    """

    @pytest.fixture
    def posted(self, make_board: Callable[[], Board]) -> Board:
        """An open board with four pieces of work."""
        board = make_board()
        board.open(ABOUT)
        board.post(WORKS)
        return board

    def test_nothing_before_it_is_opened(self, make_board: Callable[[], Board]) -> None:
        board = make_board()
        assert board.about() is None
        assert not board.is_open
        assert board.claim("ada") is None
        assert board.outcome("first") is None
        assert board.workers() == {}
        board.close()
        assert make_board().about() is None, "closing opens nothing"

    def test_opens_closes_and_opens_again(self, make_board: Callable[[], Board]) -> None:
        board, other = make_board(), make_board()
        board.open(ABOUT)
        assert eventually(other.about) == ABOUT
        assert other.is_open
        board.close()
        assert eventually(lambda: not other.is_open)
        assert other.about() == ABOUT
        make_board().open(ABOUT)
        assert eventually(lambda: other.is_open)

    def test_work_comes_whole_and_in_the_order_of_posting(self, posted: Board, make_board: Callable[[], Board]) -> None:
        posted.post([Work("a-fifth", "score", {"from": 0})])
        worker = make_board()
        assert [worker.claim("ada") for _ in range(6)] == [*WORKS, Work("a-fifth", "score", {"from": 0}), None]

    def test_nothing_is_posted_twice(self, posted: Board, make_board: Callable[[], Board]) -> None:
        claimed, done = posted.claim("ada"), posted.claim("ada")
        assert claimed
        assert done
        posted.finish(done, found(1))
        for board in (posted, make_board()):
            board.post(WORKS)
        assert drained(make_board()) == [work.key for work in WORKS[2:]]

    def test_work_is_claimed_once(self, posted: Board, make_board: Callable[[], Board]) -> None:
        first, second = make_board(), make_board()
        claimed = [board.claim(name) for board, name in ((first, "ada"), (second, "bob"), (second, "bob"))]
        assert sorted(work.key for work in claimed if work) == sorted(work.key for work in WORKS[:3])
        assert drained(first, "ada") + drained(second, "bob") == [WORKS[3].key]

    def test_withdraws_only_what_is_open(self, posted: Board, make_board: Callable[[], Board]) -> None:
        worker = make_board()
        claimed, done = worker.claim("ada"), worker.claim("ada")
        assert claimed
        assert done
        worker.finish(done, found(1))
        posted.withdraw([claimed.key, done.key, WORKS[2].key, "unknown"])
        assert drained(make_board()) == [WORKS[3].key]
        worker.finish(claimed, found(2))
        assert eventually(lambda: posted.outcome(claimed.key)) == found(2)
        assert eventually(lambda: posted.outcome(done.key)) == found(1)

    def test_withdrawn_work_can_be_posted_again(self, posted: Board, make_board: Callable[[], Board]) -> None:
        posted.withdraw([WORKS[0].key, WORKS[3].key])
        posted.post([WORKS[0]])
        make_board().post([WORKS[3]])
        assert drained(make_board()) == [WORKS[i].key for i in (1, 2, 0, 3)]

    def test_outcomes_are_seen_by_all(self, posted: Board, make_board: Callable[[], Board]) -> None:
        worker = make_board()
        work = worker.claim("ada")
        assert work
        assert posted.outcome(work.key) is None
        worker.finish(work, found(0.25))
        for board in (worker, posted, make_board()):
            assert eventually(lambda board=board: board.outcome(work.key)) == found(0.25)
        assert posted.outcome("second") is None
        assert posted.outcome("unknown") is None

    def test_what_failed_may_be_tried_again_by_the_next_search(
        self, posted: Board, make_board: Callable[[], Board]
    ) -> None:
        failed, done = posted.claim("ada"), posted.claim("ada")
        assert failed
        assert done
        posted.finish(failed, Outcome("ada", {}, "out of memory"))
        posted.finish(done, found(1))
        assert eventually(lambda: make_board().outcome(failed.key)) == Outcome("ada", {}, "out of memory")
        posted.post(WORKS)
        assert drained(make_board()) == [work.key for work in WORKS[2:]], "not by the same search"
        again = make_board()
        again.open(ABOUT)
        again.post(WORKS)
        retried = again.claim("bob")
        assert retried == failed
        assert again.claim("bob") is None
        again.finish(retried, found(2))
        assert eventually(lambda: again.outcome(failed.key)) == found(2)
        assert eventually(lambda: again.outcome(done.key)) == found(1)

    def test_what_the_dead_claimed_is_open_again(self, posted: Board, make_board: Callable[[], Board]) -> None:
        dead, alive = make_board(), make_board()
        for board, name in ((dead, "dead"), (alive, "alive")):
            board.beat(name, {"host": "here"})
        lost, kept = dead.claim("dead"), alive.claim("alive")
        assert lost
        assert kept

        def reopened() -> list[str]:
            alive.beat("alive", {"host": "here"})
            time.sleep(0.02)
            return posted.reopen(0.3)

        assert eventually(reopened) == [lost.key]
        assert posted.silent == {"dead"}, "no claim is left to one who is said to be dead"
        got = alive.claim("alive")
        assert got is not None
        keys = {got.key, *drained(alive)}
        assert keys == {work.key for work in WORKS} - {kept.key}

    def test_the_silent_are_dead_even_where_they_never_beat(
        self, posted: Board, make_board: Callable[[], Board]
    ) -> None:
        lost = make_board().claim("dead")
        assert lost
        assert posted.reopen(0.1) == [], "not at first sight"
        assert eventually(lambda: time.sleep(0.02) or posted.reopen(0.1)) == [lost.key]

    def test_the_silent_are_named_whether_they_claimed_or_not(
        self, posted: Board, make_board: Callable[[], Board]
    ) -> None:
        idle = make_board()
        idle.beat("idle", {"host": "here"})
        assert posted.reopen(0.1) == []
        assert posted.silent == frozenset(), "not at first sight"
        eventually(lambda: time.sleep(0.02) or posted.reopen(0.1) or posted.silent)
        assert posted.silent == {"idle"}
        idle.beat("idle", {"host": "here"})
        eventually(lambda: time.sleep(0.02) or posted.reopen(0.3) or not posted.silent)

    def test_one_thought_dead_may_finish(self, posted: Board, make_board: Callable[[], Board]) -> None:
        late, other = make_board(), make_board()
        work = late.claim("late")
        assert work
        eventually(lambda: time.sleep(0.02) or posted.reopen(0.1))
        again = next(claimed for claimed in iter(lambda: other.claim("bob"), None) if claimed.key == work.key)
        assert again == work
        late.finish(work, Outcome("late", {"drop": 1.0}))
        other.finish(again, Outcome("bob", {"drop": 1.0}))
        assert eventually(lambda: posted.outcome(work.key)).content == {"drop": 1.0}
        claimed = {other.key for other in WORKS} - {work.key}
        reopened = [key for _ in range(40) for key in (time.sleep(0.01) or posted.reopen(0.1))]
        assert set(reopened) <= claimed, "what is finished is not opened again"

    def test_what_was_finished_late_is_not_done_again(self, posted: Board, make_board: Callable[[], Board]) -> None:
        late = make_board()
        work = late.claim("late")
        assert work
        eventually(lambda: time.sleep(0.02) or posted.reopen(0.1))
        late.finish(work, found(1))
        assert eventually(lambda: posted.outcome(work.key)) == found(1)
        assert drained(make_board()) == [work.key for work in WORKS[1:]]

    def test_one_started_anew_gets_what_it_had_claimed(self, posted: Board, make_board: Callable[[], Board]) -> None:
        before = make_board()
        had, finished = before.claim("ada"), before.claim("ada")
        assert finished
        before.finish(finished, found(1))
        anew = make_board()
        assert anew.claim("ada") == had
        assert drained(anew, "ada") == [work.key for work in WORKS[2:]]

    def test_says_who_works(self, posted: Board, make_board: Callable[[], Board]) -> None:
        one, two = make_board(), make_board()
        one.beat("ada.host-1_7", {"host": "one", "done": 0})
        two.beat("bob", {"host": "two"})
        one.beat("ada.host-1_7", {"host": "one", "done": 3})
        assert posted.workers() == {"ada.host-1_7": {"host": "one", "done": 3}, "bob": {"host": "two"}}

    @pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a b", "a~b", "é", "a\n"])
    def test_names_that_no_file_could_have_are_refused(self, posted: Board, name: str) -> None:
        for use in (posted.claim, lambda given: posted.beat(given, {}), lambda given: Work(given, "measure", {})):
            with pytest.raises(ValueError, match="letters, digits, dots, dashes and underscores"):
                use(name)

    def test_what_is_no_json_is_refused(self, posted: Board) -> None:
        work = posted.claim("ada")
        assert work
        with pytest.raises(ValueError, match="JSON"):
            posted.finish(work, found(math.nan))
        posted.finish(work, found(1))
        assert eventually(lambda: posted.outcome(work.key)) == found(1)


ABOUT = {"task": "digits", "seeds": [1, 2], "settings": {"bits": 3.5, "none": None}}
WORKS = [Work(key, "measure", {"policy": [key, 1, None], "text": "é ~ \u0000"}) for key in ("first", "2nd", "c.d", "_")]


def found(drop: float) -> Outcome:
    """An outcome of ada's."""
    return Outcome("ada", {"drop": drop, "metrics": {"quality": 1 - drop}})


def drained(board: Board, worker: str = "carol") -> list[str]:
    """The keys of everything that is still open, claimed in order."""
    return [work.key for work in iter(lambda: board.claim(worker), None)]


def eventually(look: Callable[[], Any], within_s: float = 60.0) -> Any:
    """What `look` returns as soon as it is something."""
    until = time.monotonic() + within_s
    while not (seen := look()):
        assert time.monotonic() < until, "this should have been seen by now"
    return seen


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def uniform(network: Network, precision: str) -> Policy:
    """One precision for all layers; the input of weight-only layers stays in float."""
    chosen = Precision.parse(precision)
    return Policy({layer.name: chosen if layer.quantizes_input else Precision(chosen.weight) for layer in network})


EXPORTED = (
    Layer("linear", "linear", weight_shape=(16, 128)),
    Layer("odd", "linear", weight_shape=(10, 27)),
    Layer("conv", "conv2d", weight_shape=(8, 16, 3, 3), kernel=(3, 3), stride=(1, 1)),
    Layer("depthwise", "conv2d", weight_shape=(8, 1, 3, 3), groups=8, kernel=(3, 3), stride=(1, 1)),
    Layer("embedding", "embedding", weight_shape=(50, 64), quantizes_input=False),
    Layer("lstm.weight_hh_l0", "lstm", weight_shape=(24, 6), quantizes_input=False),
)
"""A layer of every kind that backends tell apart."""

EXPORTED_PRECISIONS = (
    *("float", "int8/uint8", "int4/uint8", "int3/uint6", "int2/uint4", "int1/uint8", "int16/uint16", "int8/int8"),
    *("int4", "int8", "int4-g32", "int8-g128", "int2-g32", "int4-asym-g128", "uint4-g32", "int8-tensor/uint8"),
    *("uint8/uint8", "int8-full/uint8-sym", "int8-asym/int8-asym", "int4-g32/int8-token", "int8/int8-token"),
    *("int8/int8-dynamic", "fp8_e4m3/fp8_e4m3", "mxfp4/mxfp8", "nvfp4/nvfp4", "nf4", "codebook4", "ternary", "fp16"),
    *("bf16/bf16", "float/uint8", "int4/float"),
)
