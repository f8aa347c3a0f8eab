"""The one call that scores a space: whatever the settings ask for, once, kept for whoever asks the same again."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import numpy as np

from hwmodels import Precision
from search.errors import ConfigError, DataError, closest
from search.files import write_json
from search.quantize.simulate import QuantizedModel
from search.sensitivity.choices import Base, Choice, choices_of
from search.sensitivity.gram import scaled
from search.sensitivity.pairs import pair_divergences
from search.sensitivity.settings import BACKWARD, CURVATURE, DISTORTION, FORWARD, MEASURED, SensitivitySettings
from search.sensitivity.table import SensitivityTable
from search.space import SearchSpace
from search.tasks.task import Task

if TYPE_CHECKING:
    from search.sensitivity.cotangents import Kind
    from search.sensitivity.forward import Share, Sweep

TABLE = "sensitivity.npz"
PARTIAL = "scoring"
Progress = Callable[[int, int], None]


def score_space(
    task: Task,
    simulated: QuantizedModel,
    space: SearchSpace,
    settings: SensitivitySettings | None = None,
    directory: Path | None = None,
    made_from: Mapping[str, Any] | None = None,
    store: Path | None = None,
    progress: Progress = lambda done, total: None,
    share: Share | None = None,
) -> SensitivityTable:
    """Scores every choice of a space on the calibration split, or finds the scores where they were kept.

    Args:
        task: Gives data, divergence and metric.
        simulated: The network, calibrated.
        space: What may be decided.
        settings: What to score.
        directory: Where the table is written, and parts of it while they come: what is there is not computed again.
        made_from: Digests of model, data and quantizer, and whatever else tells whether scores apply.
        store: Folder of the tables of all runs; one that was made from the same is taken from there.
        progress: Called with the number of single choices scored and their total.
        share: Has others sweep some of the choices, who write to `directory`; see `search.sensitivity.forward`.

    Raises:
        DataError: If a score is not a number.
    """
    settings = settings or SensitivitySettings()
    if directory and (directory / TABLE).is_file():
        return SensitivityTable.load(directory / TABLE)
    identity = identity_of(space, settings, made_from or {})
    kept = store / digest_of(identity) if store else None
    if kept and (kept / TABLE).is_file():
        table = SensitivityTable.load(kept / TABLE)
    else:
        partial = directory / PARTIAL if directory else None
        table = _score(task, simulated, space, settings, partial, progress, share)
        if kept:
            _keep(table, kept, identity)
    if directory:
        table.save(directory / TABLE)
        shutil.rmtree(directory / PARTIAL, ignore_errors=True)
    return table


def identity_of(space: SearchSpace, settings: SensitivitySettings, made_from: Mapping[str, Any]) -> dict[str, Any]:
    """What a table is made from, as plain values: two tables with the same are the same."""
    decisions = [
        {"side": d.side, "layers": list(d.layers), "formats": list(map(str, d.formats))} for d in space.decisions
    ]
    return {"made_from": dict(made_from), "settings": asdict(settings), "decisions": decisions}


def digest_of(identity: Mapping[str, Any]) -> str:
    """Name of the folder that keeps a table."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _keep(table: SensitivityTable, folder: Path, identity: Mapping[str, Any]) -> None:
    """Puts a table into the store, whole or not at all; where another run was faster, its table stays."""
    aside = folder.with_name(f".{folder.name}.{uuid4().hex}.part")
    try:
        table.save(aside / TABLE)
        write_json(aside / "made_from.json", identity)
        aside.rename(folder)
    except OSError:
        if not (folder / TABLE).is_file():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _score(
    task: Task,
    simulated: QuantizedModel,
    space: SearchSpace,
    settings: SensitivitySettings,
    partial: Path | None,
    progress: Progress,
    share: Share | None,
) -> SensitivityTable:
    """Runs whatever the settings ask for, and puts it together."""
    from search.sensitivity.backward import backward_scores
    from search.sensitivity.forward import forward_scores

    choices, base = choices_of(space), base_of(space, settings.base)
    columns: dict[str, np.ndarray] = {}
    interactions: dict[str, np.ndarray] = {}
    superposition, linear, constant = None, None, 0.0
    if settings.sweeps:
        swept = forward_scores(
            task,
            simulated,
            choices,
            base,
            width=settings.width,
            seed=settings.seed,
            directory=partial,
            progress=progress,
            share=share,
        )
        found = {"kl": swept.kl, "loss": swept.loss, "drop": swept.drop}
        columns |= _asked(task, settings, FORWARD, found) or {"kl": swept.kl}
        columns.setdefault("kl", swept.kl)
        linear, constant = (swept.linear, swept.constant) if base else (None, 0.0)
        if "forward" in settings.interactions:
            interactions["forward"] = swept.gram.mean
        superposition = swept.superposition if settings.superposition else None
    if settings.goes_backward:
        gone = backward_scores(
            task, simulated, choices, base, draws=settings.draws, seed=settings.seed, kind=cast("Kind", settings.drawn)
        )
        columns |= _asked(task, settings, BACKWARD, vars(gone))
        if "backward" in settings.interactions:
            interactions["backward"] = gone.gram.mean
        if base and linear is None:
            linear = gone.gradient
    if set(settings.scores) & set(DISTORTION):
        from search.sensitivity.distortion import distortion

        columns |= _asked(task, settings, DISTORTION, vars(distortion(task, simulated, choices)))
    if set(settings.scores) & set(CURVATURE):
        from search.sensitivity.curvature import curvature

        asked = [name for name in CURVATURE if name in settings.scores]
        columns |= curvature(task, simulated, choices, asked, probes=settings.probes, seed=settings.seed)
    if settings.pairs:
        estimated = scaled(interactions[settings.interactions[0]], _curvature(columns["kl"], linear))
        interactions[MEASURED] = _with_pairs(task, simulated, space, settings.pairs, base, estimated)
    simulated.apply({})
    _check_finite(columns, choices)
    ordered = {name: columns.pop(name) for name in settings.scores if name in columns} | columns
    return SensitivityTable(ordered, interactions, superposition, linear, constant, settings.predictor)


def sweep_of(
    task: Task, simulated: QuantizedModel, space: SearchSpace, settings: SensitivitySettings, directory: Path
) -> Sweep:
    """The sweep that scoring a space takes, for those who do a part of it.

    Args:
        task: Gives data, divergence and metric.
        simulated: The network, calibrated.
        space: What may be decided.
        settings: What is scored.
        directory: That of the table.
    """
    from search.sensitivity.forward import Sweep
    from search.sensitivity.lens import Bounds
    from search.sensitivity.reduction import NUMBERS, OUTPUTS

    bounds = Bounds(settings.width, OUTPUTS, NUMBERS, settings.seed)
    base = base_of(space, settings.base)
    return Sweep(task, simulated, choices_of(space), base, bounds, directory=directory / PARTIAL)


def _curvature(kl: np.ndarray, linear: np.ndarray | None) -> np.ndarray:
    """What single choices cost beyond first order, at least 0."""
    beyond: np.ndarray = kl if linear is None else np.maximum(kl - linear, 0)
    return beyond


def _with_pairs(
    task: Task,
    simulated: QuantizedModel,
    space: SearchSpace,
    named: Sequence[Sequence[str]],
    base: Base,
    estimated: np.ndarray,
) -> np.ndarray:
    """Interactions in which those of the named pairs are measured, all joint choices of them."""
    choices, form = choices_of(space), estimated.copy()
    pairs = [
        (int(first), int(second))
        for pair in named
        for first, second in itertools.product(*(_positions_of(space, name) for name in pair))
        if not (choices[first].is_in(base) or choices[second].is_in(base))
    ]
    found = pair_divergences(task, simulated, choices, pairs, base)
    for (first, second), interaction in zip(pairs, found, strict=True):
        form[first, second] = form[second, first] = interaction
    return form


def _positions_of(space: SearchSpace, name: str) -> list[int]:
    """Positions of the choices of the decision called `name`: a layer's weight, or a tensor.

    Raises:
        ConfigError: If there is none.
    """
    found = [at for at, choice in enumerate(choices_of(space)) if choice.decision.name == name]
    if not found:
        names = [decision.name for decision in space.decisions]
        raise ConfigError(
            f"sensitivity.pairs: no layer or tensor is decided under the name {name!r}{closest(name, names)}; "
            f"there are {', '.join(names)}"
        )
    return found


def base_of(space: SearchSpace, precision: str) -> Base:
    """The policy that gives every layer one precision, weight-only layers a float input; empty for float."""
    parsed = Precision.parse(precision)
    if parsed == Precision():
        return {}
    return {layer: space.precision_of(layer, parsed) for unit in space.units for layer in unit.layers}


def _asked(
    task: Task, settings: SensitivitySettings, names: tuple[str, ...], found: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The columns among `names` that the settings ask for.

    Raises:
        DataError: If the task cannot give one of them.
    """
    asked = {name: found[name] for name in names if name in settings.scores}
    for name, column in asked.items():
        if column is None:
            needed = "a `loss` with labels" if name in ("loss", "gradient") else "a score per sample"
            raise DataError(f"sensitivity.scores: {name} needs {needed}, which task {task.name} does not have")
    return asked


def _check_finite(columns: Mapping[str, np.ndarray], choices: tuple[Choice, ...]) -> None:
    for name, column in columns.items():
        wrong = np.flatnonzero(np.isnan(column))
        if len(wrong):
            raise DataError(
                f"the score {name} is not a number with {choices[wrong[0]]}; "
                "the model's outputs on the calibration split must be finite"
            )
