"""The pipeline on one page: from a task and a budget to a plan, every stage a file in the run directory."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any
from uuid import uuid4

import numpy as np

from hwmodels import Precision
from search.assignment import check_feasible, variable_limits
from search.backends.deployment import Deployment
from search.errors import InfeasibleError, one_line
from search.events import EventLog, LoggedProgress
from search.front import compose_front, front_costs, front_table, rank_correlation, rank_correlations
from search.history import history_table
from search.job import Job, Result
from search.legal import in_words, runnable
from search.objective import Objective, SpentError
from search.plan import fingerprint
from search.planning import identity, make_plan
from search.policy import Policy
from search.pricing import Pricing, placed
from search.progress import Progress
from search.quality.evaluate import Evaluator, Quality
from search.quality.loop_repair import LoopRepair, choose_repair
from search.quality.store import open_store
from search.quantize.fold import fold_batch_norm
from search.quantize.simulate import QuantizedModel
from search.recover import Gain, parse_steps, recover
from search.recover.tuned import TunedEvaluator
from search.rundir import RunDirectory
from search.sensitivity.scoring import score_space
from search.sensitivity.table import SensitivityTable
from search.shortlist import settle
from search.space import SearchSpace, build_space
from search.starts import starting_policies
from search.strategies.forecaster import proofs
from search.strategies.projection import Projection
from search.ties import joined, shared_input_ties
from search.trace import shared_parameters, trace
from search.trials import TrialLog

TABLES, EVALUATIONS = "scores", "evaluations"
"""Folders of the store: sensitivity tables, and what policies scored sample by sample."""


def search(
    job: Job, progress: Progress | None = None, on_start: Callable[[RunDirectory], None] = lambda run: None
) -> Result:
    """Runs a search, or goes on with the one that was interrupted in the same directory.

    Args:
        job: What to search.
        progress: Where to show how far it is; silent by default.
        on_start: Called once the run directory is claimed and says that it is running.

    Raises:
        BitplanError: If the settings, the data or the model cannot be used, or the budget cannot be met.
    """
    job.strategy.check_sources()
    run, started = RunDirectory(job.run_dir), time.time()
    run.claim()
    try:
        facts = identity(job)
        earlier = run.info() if run.resume(job.config, facts) else {"run_id": uuid4().hex, "started": started}
        run.update(**earlier | facts | {"status": "running", "config": dict(job.config)})
        log = EventLog(run.file("log.jsonl"))
        log.write("resumed" if "status" in earlier else "started", run_id=earlier["run_id"])
        on_start(run)
        result = pipeline(job, run, LoggedProgress(log, progress or Progress()))
        run.update(status="finished", finished=time.time(), seconds=time.time() - started)
        log.write("finished", digest=result.plan.digest)
        return result
    except BaseException as error:
        if run.file("run.json").is_file() and run.info()["status"] == "running":
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            run.update(status=status, finished=time.time())
            EventLog(run.file("log.jsonl")).write(status, error=f"{type(error).__name__}: {one_line(error)}")
        raise
    finally:
        run.release()


def pipeline(job: Job, run: RunDirectory, progress: Progress) -> Result:
    """Goes through the stages; those whose files are there already take no time."""
    job = replace(job, cost_model=placed(job.cost_model, job.quantizer.placement))
    task, budget, strategy = job.task, job.budget, job.strategy

    progress.stage("reading the network")
    folded = fold_batch_norm(task.model, task.example_input)
    network = trace(folded.model, task.example_input)
    run.write_network(network)

    deployment = Deployment.of(job.export.backends, job.export.keep, job.quantizer.placement)
    deployment.check(task.model)
    asked = shared_input_ties(network) if job.space.ties == "auto" else job.space.ties or []
    ties = joined([*asked, *map(list, shared_parameters(folded.model, network)), *deployment.ties(network)], network)
    run.update(ties=ties)
    asked_for = build_space(network, job.space.weight, job.space.input, job.space.pins, ties)
    space, dropped = runnable(asked_for, network, job.cost_model, deployment.targets)
    run.update(dropped=[asdict(entry) for entry in dropped])
    pricing = Pricing.of(network, space, job.cost_model, job.workload)
    limits = budget.limits(pricing.reference(budget.reference))
    unpinned = build_space(network, job.space.weight, job.space.input)
    unrestricted, _ = runnable(unpinned, network, job.cost_model, deployment.targets)
    try:
        check_feasible(pricing, limits, unrestricted, budget)
    except InfeasibleError as error:
        raise InfeasibleError("; ".join([f"{error}", *in_words(dropped)[:3]])) from error
    run.write_table("costs.parquet", pricing.to_frame())

    progress.stage("calibrating ranges")
    simulated = QuantizedModel(folded.model, network, job.quantizer, reuse_memory=True)
    simulated.calibrate(task.inputs(batch) for batch in task.batches("calibration"))
    store = None
    if job.store:
        model = fingerprint(task.model)
        store = open_store(job.store / EVALUATIONS, task, simulated, model, lambda why: run.update(not_shared=why))
    racing = None if strategy.costs else job.racing  # a race is about one cost
    evaluator = Evaluator(task, simulated, run.path, racing, store=store)
    evaluator.float_scores("selection")
    if job.quantizer.repair == "auto":
        progress.stage("choosing what choices repair")
        known = run.info().get("loop_repair")
        chosen = LoopRepair.from_dict(known) if known else choose_repair(evaluator, space, progress=progress.step)
        simulated.repair_with(chosen.repair)
        run.update(loop_repair=chosen.to_dict())
        job = replace(job, quantizer=job.quantizer.with_repair(chosen.repair))
    gains: tuple[Gain, ...] = ()
    before: list[Any] = []  # repairs of the network that all policies share
    if job.recover.before:
        evaluator.float_scores("report")
        middle = _middle(space, job.recover.at)
        repaired = recover(parse_steps(job.recover.before), evaluator, middle, progress.stage, run.path, "before")
        simulated, gains = repaired.simulated, repaired.gains
        before = [job.recover.before, middle.to_dict()]
        evaluator = evaluator.of(simulated, before)

    def score() -> SensitivityTable:
        progress.stage("scoring choices")
        tables = job.store / TABLES if job.store else None
        table = score_space(
            task, simulated, space, job.sensitivity, run.path, made_from(job, simulated), tables, progress.step
        )
        run.write_table("sensitivity.parquet", table.to_frame(space))
        progress.stage("measuring policies")
        return table

    progress.stage("measuring policies")
    tuned = TunedEvaluator(evaluator, strategy.finetune_steps, before) if strategy.finetune_steps else None
    measuring = tuned or evaluator
    log = TrialLog(run.file("trials.jsonl"))
    objective = Objective(
        measuring,
        pricing,
        limits,
        log,
        allowance=strategy,
        score=score,
        primary_cost=next(iter(limits), "weight_bytes"),
        quality_drop=budget.quality_drop,
        on_trial=progress.trial,
        starts=lambda objective: starting_policies(strategy, objective, job.seed),
    )
    costs = front_costs(objective, strategy.costs)
    with suppress(SpentError):
        strategy.search(space, objective, np.random.default_rng(job.seed))
    ensure_measured(objective, log)
    strategy.keep(run.path, objective, log.trials)
    winner, confirmed = settle(objective, log.trials)

    progress.stage("measuring the front on the report split")
    reports = run.measurements()

    def on_report(policy: Policy, key: str) -> Quality:
        return reports.get(key) or reports.add(key, measuring.measure(policy, "report"))

    members = compose_front(objective, log.trials, winner, network, job.space.input, costs)
    front = front_table(
        [(member, on_report(member.policy, member.policy.digest)) for member in members], objective, budget
    )
    run.write_table("front.csv", front)
    run.write_table("history.csv", history_table(objective, log.trials, costs))

    if tuned:
        evaluator, gain = tuned.settle(winner.policy, winner.drop)
        gains += (gain,)
    selection, report_key = Quality.of_trial(winner.metrics), winner.digest
    if job.recover.steps:
        repaired = recover(parse_steps(job.recover.steps), evaluator, winner.policy, progress.stage, run.path)
        measuring = evaluator = evaluator.of(repaired.simulated)
        selection = repaired.quality
        gains += repaired.gains
        report_key += "".join(f"+{gain.repair}" for gain in repaired.gains if gain.kept)
    qualities = {"selection": selection, "report": on_report(winner.policy, report_key)}
    plan = make_plan(
        job, objective, evaluator, winner.policy, qualities, folded.folds, gains, confirmed, in_words(dropped)
    )
    plan.save(run.file("plan.json"))

    run.update(
        digest=plan.digest,
        verdict=plan.budget.verdict,
        evaluations=round(objective.spent_evaluations, 3),
        limits=limits,
        primary_cost=objective.primary_cost,
        front_costs=list(costs),
        rank_correlation=rank_correlation(log.trials),
        proofs=proofs(objective.sensitivity, pricing, variable_limits(pricing, limits))
        if limits and objective.is_scored
        else {},
        rank_correlations=rank_correlations(objective, log.trials),
    )
    return Result(plan, front, run)


def made_from(job: Job, simulated: QuantizedModel) -> dict[str, Any]:
    """What sensitivities depend on besides the space: the model, repairs before the search, data and quantizer."""
    return {
        "model": fingerprint(job.task.model),
        "before": [job.recover.before, job.recover.at] if job.recover.before else [],
        "data": job.task.fingerprint,
        "quantizer": asdict(simulated.settings),
    }


def _middle(space: SearchSpace, precision: str | None) -> Policy:
    """The policy that repairs before the search repair for: the given precision, or each choice's middle format."""
    middle = space.decode([len(decision.formats) // 2 for decision in space.decisions])
    if precision is None:
        return middle
    return Policy({layer: space.precision_of(layer, Precision.parse(precision)) for layer in middle})


def ensure_measured(objective: Objective, log: TrialLog) -> None:
    """Measures the largest policy within the limits where the strategy found none: there always is a plan."""
    if any(trial.is_whole for trial in log.trials):
        return
    largest = [len(decision.formats) - 1 for decision in objective.space.decisions]
    with suppress(SpentError):
        objective(objective.space.decode(Projection(objective.pricing, objective.limits).nearest(largest)))
