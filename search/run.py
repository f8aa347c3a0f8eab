"""The pipeline on one page: from a task and a budget to a plan, every stage a file in the run directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from search.assignment import check_feasible, variable_limits
from search.errors import InfeasibleError
from search.events import recorded
from search.front import compose_front, front_costs, front_table, rank_correlation, rank_correlations
from search.headway import amount
from search.history import history_table
from search.job import Job, Result
from search.legal import in_words, runnable
from search.objective import Objective, SpentError
from search.plan import fingerprint
from search.planning import identity, make_plan
from search.policy import Policy
from search.preparation import Ground, Stages
from search.pricing import Pricing
from search.progress import Progress
from search.quality.evaluate import Quality
from search.quality.loop_repair import LoopRepair, choose_repair
from search.quantize.simulate import QuantizedModel
from search.recover import parse_steps, recover
from search.rundir import TABLES, RunDirectory
from search.sensitivity.scoring import score_space
from search.sensitivity.table import SensitivityTable
from search.shortlist import settle
from search.space import build_space
from search.starts import starting_policies
from search.stopping import Stop, StoppedError
from search.strategies.forecaster import proofs
from search.strategies.projection import Projection
from search.trials import Trial, TrialLog
from search.workers.crew import Crew
from search.workers.opening import open_board


def search(
    job: Job,
    progress: Progress | None = None,
    on_start: Callable[[RunDirectory], None] = lambda run: None,
    stop: Stop | None = None,
) -> Result:
    """Runs a search, or goes on with the one that was interrupted in the same directory.

    One that is asked to stop makes a plan of what it has measured; its run is then `interrupted`, and says how far it
    came under `stopped`.

    Args:
        job: What to search.
        progress: Where to show how far it is; silent by default.
        on_start: Called once the run directory is claimed and says that it is running.
        stop: Whether the search is to stop early.

    Raises:
        StoppedError: If it was asked to stop before anything was measured.
        BitplanError: If the settings, the data or the model cannot be used, or the budget cannot be met.
    """
    job.strategy.check_sources()
    if job.study:
        open_board(job.study)  # one that cannot be is refused before there is a run
    stop = stop or Stop()
    run = RunDirectory(job.run_dir)
    run.claim()
    try:
        facts = identity(job)
        run.resume(job.config, facts)
        about = facts | {"config": dict(job.config), "stopped": None}
        with recorded(run, about, progress or Progress()) as shown:
            on_start(run)
            with Crew(job, run, shown, shown.log.write, stop) as crew:
                result = pipeline(job, run, shown, crew, stop)
            shown.is_stopped = bool(run.info()["stopped"])
        return result
    finally:
        run.release()


def pipeline(job: Job, run: RunDirectory, progress: Progress, crew: Crew, stop: Stop) -> Result:
    """Goes through the stages; those whose files are there already take no time."""

    def step(done: int, total: int) -> None:
        progress.step(done, total)
        stop.check()

    progress.stage("reading the network")
    ground = Ground.of(job)
    job, network, space = ground.job, ground.network, ground.space
    task, budget, strategy = job.task, job.budget, job.strategy
    run.write_network(network)
    run.update(ties=ground.ties, dropped=[asdict(entry) for entry in ground.dropped])
    pricing = Pricing.of(network, space, job.cost_model, job.workload)
    limits = budget.limits(pricing.reference(budget.reference))
    unpinned = build_space(network, job.space.weight, job.space.input)
    unrestricted, _ = runnable(unpinned, network, job.cost_model, ground.deployment.targets)
    try:
        check_feasible(pricing, limits, unrestricted, budget)
    except InfeasibleError as error:
        raise InfeasibleError("; ".join([f"{error}", *in_words(ground.dropped)[:3]])) from error
    run.write_table("costs.parquet", pricing.to_frame())

    progress.stage("calibrating ranges")
    stages = Stages(ground, run.path, job.store, crew.own_store, lambda why: run.update(not_shared=why))
    evaluator = stages.calibrated
    stop.check()
    evaluator.float_scores("selection")
    crew.begin(stages)
    if job.quantizer.repair == "auto":
        progress.stage("choosing what choices repair")
        known = run.info().get("loop_repair")
        chosen = LoopRepair.from_dict(known) if known else choose_repair(evaluator, space, progress=step)
        evaluator.simulated.repair_with(chosen.repair)
        run.update(loop_repair=chosen.to_dict())
        job = replace(job, quantizer=job.quantizer.with_repair(chosen.repair))
    stop.check()
    evaluator, gains = stages.repaired(progress.stage)
    simulated = evaluator.simulated

    def score() -> SensitivityTable:
        progress.stage("scoring choices")
        tables = job.store / TABLES if job.store else None
        about = made_from(job, simulated)
        table = score_space(
            task, simulated, space, job.sensitivity, run.path, about, tables, step, crew.sharing(evaluator)
        )
        run.write_table("sensitivity.parquet", table.to_frame(space))
        progress.stage("measuring policies")
        return table

    progress.stage("measuring policies")
    tuned = stages.tuned()
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
        is_stopped=lambda: stop.is_asked,
    )
    costs = front_costs(objective, strategy.costs)
    with suppress(SpentError, StoppedError):
        strategy.search(space, objective, np.random.default_rng(job.seed))
    ensure_measured(objective, log)
    if not any(trial.is_whole for trial in log.trials):
        stop.check()
    strategy.keep(run.path, objective, log.trials)
    winner, confirmed = settle(objective, log.trials)

    progress.stage("measuring the front on the report split")
    reports = run.measurements()

    def on_report(policy: Policy, key: str) -> Quality:
        return reports.get(key) or reports.add(key, measuring.measure(policy, "report"))

    members = compose_front(objective, log.trials, winner, network, job.space.input, costs)
    measuring.order([m.policy for m in members if not reports.get(m.policy.digest)], "report")
    needed = ("winner", "float")
    for number, member in enumerate(sorted(members, key=lambda member: member.role not in needed)):
        progress.step(number, len(members))
        if member.role in needed or not stop.is_late:
            on_report(member.policy, member.policy.digest)
    known = ((member, reports.get(member.policy.digest)) for member in members)
    front = front_table([(member, quality) for member, quality in known if quality], objective, budget)
    run.write_table("front.csv", front)
    run.write_table("history.csv", history_table(objective, log.trials, costs))
    crew.end()

    if tuned:
        evaluator, gain = tuned.settle(winner.policy, winner.drop)
        gains += (gain,)
    selection, report_key = Quality.of_trial(winner.metrics), winner.digest
    if job.recover.steps and not stop.is_asked:
        repaired = recover(parse_steps(job.recover.steps), evaluator, winner.policy, progress.stage, run.path)
        measuring = evaluator = evaluator.of(repaired.simulated)
        selection = repaired.quality
        gains += repaired.gains
        report_key += "".join(f"+{gain.repair}" for gain in repaired.gains if gain.kept)
    qualities = {"selection": selection, "report": on_report(winner.policy, report_key)}
    early = stopped_early(log.trials, strategy.evaluations) if stop.is_asked else None
    remarks = [*in_words(ground.dropped), *([early] if early else [])]
    plan = make_plan(job, objective, evaluator, winner.policy, qualities, ground.folds, gains, confirmed, remarks)
    plan.save(run.file("plan.json"))

    run.update(
        stopped=early,
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


def stopped_early(trials: Sequence[Trial], allowance: int) -> str:
    """Says that a search was stopped, and after how many of its evaluations."""
    evaluations = sum(trial.fidelity for trial in trials if trial.state != "infeasible")
    return f"the search was stopped early, after {amount(evaluations, None)} of {allowance} evaluations"


def ensure_measured(objective: Objective, log: TrialLog) -> None:
    """Measures the largest policy within the limits where the strategy found none: there always is a plan."""
    if any(trial.is_whole for trial in log.trials):
        return
    largest = [len(decision.formats) - 1 for decision in objective.space.decisions]
    with suppress(SpentError):
        objective(objective.space.decode(Projection(objective.pricing, objective.limits).nearest(largest)))
