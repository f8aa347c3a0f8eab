"""Policies compared on devices: latencies with their intervals, what is faster how surely, and what layers spend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwmodels import CostModel, CostReport, Device, Network, Precision, Roofline, Workload
from hwmodels.compare import bound_seconds, latency_interval, probability_faster, tier_seconds
from search.errors import ConfigError
from search.figures.style import layer_kind
from search.files import replacing
from search.policy import Policy

if TYPE_CHECKING:
    import pandas as pd

FLOAT = "float"
PRECISIONS = (FLOAT, "int8/uint8", "int4/uint8")
"""What is compared where nothing else is asked for."""

PARTS = ("compute", "memory", "overhead", "conversion")
"""What a layer's time is made of; of models that do not say, `other` holds what has no bound."""


@dataclass(frozen=True)
class Option:
    """A cost model that is no roofline of a device, as the configuration knows it.

    Attributes:
        name: What `hardware=NAME` takes.
        target: Its class.
        summary: What that says of itself, in a sentence.
        settings: Its arguments.
    """

    name: str
    target: str
    summary: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Listing:
    """The targets there are.

    Attributes:
        devices: Devices whose files are valid.
        broken: File name to what is wrong with it.
        options: Cost models of other kinds.
    """

    devices: tuple[Device, ...]
    broken: Mapping[str, str]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class LayerTime:
    """The seconds of one layer, and how near it comes to the roofs.

    Attributes:
        layer: Its name.
        kind: What legends call it, such as `depthwise`.
        precision: Its precision.
        seconds: Part to seconds.
        operations: Two per multiply-accumulate; NaN where the model does not count them.
        traffic: Bytes moved, conversions left out; NaN where the model does not count them.
        level: Memory level they move through.
        compute: Type the multiplications run in.
        support: How well the device runs it.
        bound: What it is mostly spent on.
    """

    layer: str
    kind: str
    precision: str
    seconds: Mapping[str, float]
    operations: float
    traffic: float
    level: str
    compute: str
    support: str
    bound: str

    @property
    def intensity(self) -> float:
        """Operations per byte moved."""
        return self.operations / self.traffic

    @property
    def attained(self) -> float:
        """Operations per second, conversions left out."""
        seconds = sum(self.seconds.values()) - self.seconds.get("conversion", 0.0)
        return self.operations / seconds if seconds else math.nan


@dataclass(frozen=True)
class Priced:
    """One policy on one target.

    Attributes:
        policy: What it is called: its precision where it is uniform.
        report: What it costs; None where the target refuses it.
        refusal: Why it is refused.
        interval: Seconds between which its latency lies with 80% probability; None where that is not known.
        speedup: Latency of the float network on the same target over its own; NaN where not known.
        faster: Probability that it is faster than that; NaN where not known.
        layers: Its layers; none where the latency is not known.
    """

    policy: str
    report: CostReport | None = None
    refusal: str = ""
    interval: tuple[float, float] | None = None
    speedup: float = math.nan
    faster: float = math.nan
    layers: tuple[LayerTime, ...] = ()


@dataclass(frozen=True)
class Compared:
    """All policies on one target.

    Attributes:
        model: The target.
        workload: What it is asked to do.
        rows: The policies.
    """

    model: CostModel
    workload: Workload
    rows: tuple[Priced, ...] = field(default=())

    @property
    def device(self) -> Device | None:
        """The device, where the model is a roofline of one."""
        return self.model.device if isinstance(self.model, Roofline) else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the reports warn of, each once."""
        reports = [row.report for row in self.rows if row.report is not None]
        return tuple(dict.fromkeys(warning for report in reports for warning in report.warnings))


def uniform_policies(network: Network, precisions: Sequence[str]) -> dict[str, Policy]:
    """The policies that give every layer the same precision, the float one first, by precision.

    Raises:
        ConfigError: If a name is no precision.
    """
    try:
        parsed = dict.fromkeys(map(Precision.parse, (FLOAT, *precisions)))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return {precision_name(precision): Policy.uniform(network, precision) for precision in parsed}


def precision_name(precision: Precision) -> str:
    """A precision's name, just `float` where nothing is quantized."""
    return FLOAT if precision == Precision() else str(precision)


def compare(
    model: CostModel, network: Network, policies: Mapping[str, Mapping[str, Precision]], workload: Workload
) -> Compared:
    """Prices policies on one target and holds each against the one named `float`."""
    rows = [_price(model, network, name, policy, workload) for name, policy in policies.items()]
    reference = next((row.report for row in rows if row.policy == FLOAT), None)
    return Compared(model, workload, tuple(_held_against(row, reference) for row in rows))


def probability(one: Priced, other: Priced) -> float:
    """The probability that a policy on one target is faster than one on another.

    NaN where it is not known, or where a latency is an index, good only for comparing policies on its own target.
    """
    tiers = {row.report.tiers.get("latency_s") for row in (one, other) if row.report is not None}
    return math.nan if "index" in tiers else _probability(one.report, other.report)


def totals_frame(compared: Sequence[Compared]) -> pd.DataFrame:
    """One row per target and policy: costs in SI units, interval, shares of bounds and tiers, or the refusal."""
    import pandas as pd

    rows = []
    for target in compared:
        for row in target.rows:
            record: dict[str, Any] = {"hardware": target.model.name} | asdict(target.workload)
            record |= {"policy": row.policy, "refusal": row.refusal}
            if row.report is not None:
                low, high = row.interval or (math.nan, math.nan)
                record |= asdict(row.report.total) | {"latency_low_s": low, "latency_high_s": high}
                record |= {"speedup": row.speedup, "probability_faster": row.faster}
                record |= {f"{key or 'other'}_share": share for key, share in bound_shares(row.report).items()}
                record |= {"latency_tier": row.report.tiers.get("latency_s", ""), "tiers": describe_tiers(row.report)}
            rows.append(record)
    return pd.DataFrame(rows)


def layers_frame(compared: Sequence[Compared]) -> pd.DataFrame:
    """One row per target, policy and layer: the parts of its time, operations and bytes."""
    import pandas as pd

    rows = []
    for target in compared:
        for row in target.rows:
            for layer in row.layers:
                record = {"hardware": target.model.name, "policy": row.policy} | asdict(layer)
                seconds = record.pop("seconds")
                record |= {f"{part}_s": seconds.get(part, 0.0) for part in (*PARTS, "other")}
                rows.append(record | {"intensity": layer.intensity, "attained": layer.attained})
    return pd.DataFrame(rows)


def bound_shares(report: CostReport) -> dict[str, float]:
    """Bound to its share of the latency; empty where that is not known."""
    total = report.total.latency_s
    return {bound: part / total for bound, part in bound_seconds(report).items()} if total > 0 else {}


def describe_tiers(report: CostReport) -> str:
    """The tiers of the latency, with their shares where there are several; empty where the latency is not known."""
    total = report.total.latency_s
    shares = {tier or "not known": part / total for tier, part in tier_seconds(report).items()} if total > 0 else {}
    return ", ".join(shares) if len(shares) == 1 else ", ".join(f"{tier} {share:.0%}" for tier, share in shares.items())


def write_comparison(compared: Sequence[Compared], folder: Path) -> list[Path]:
    """Writes `comparison.csv` and `layers.csv`, and per target the figures `roofline-NAME.png` and `layers-NAME.png`.

    A target that knows no time has no figures, one that is no roofline of a device has none of that.
    """
    from search.figures.hardware import draw_layer_times, draw_roofline, layer_times_info, roofline_info
    from search.figures.style import png

    totals, layers = totals_frame(compared), layers_frame(compared)
    content = {"comparison.csv": totals.to_csv(index=False).encode(), "layers.csv": layers.to_csv(index=False).encode()}
    for target in compared:
        name = target.model.name
        if not any(row.layers for row in target.rows):
            continue
        mine = layers[layers["hardware"] == name]
        ours = totals[totals["hardware"] == name]
        content[f"layers-{name}.png"] = png(draw_layer_times(layer_times_info(ours, mine)))
        if target.device is not None:
            info = roofline_info(target.device, target.workload.threads, ours, mine)
            content[f"roofline-{name}.png"] = png(draw_roofline(info))
    for name, data in content.items():
        with replacing(folder / name) as aside:
            aside.write_bytes(data)
    return [folder / name for name in content]


def _price(
    model: CostModel, network: Network, name: str, policy: Mapping[str, Precision], workload: Workload
) -> Priced:
    """Prices one policy on its own."""
    refused = {layer: why for layer in policy if (why := model.refusal(network[layer], policy[layer])) is not None}
    if refused:
        return Priced(name, refusal=f"{len(refused)} of {len(policy)} layers refused: {next(iter(refused.values()))}")
    try:
        report = model.network_cost(network, policy, workload)
    except ValueError as error:  # shown in its row, so that the others are still compared
        return Priced(name, refusal=str(error))
    if math.isnan(report.total.latency_s):
        return Priced(name, report)
    try:
        interval = latency_interval(report)
    except ValueError:  # no error is known: a table has a dash for it
        interval = None
    return Priced(name, report, interval=interval, layers=_layer_times(model, network, policy, workload, report))


def _layer_times(
    model: CostModel,
    network: Network,
    policy: Mapping[str, Precision],
    workload: Workload,
    report: CostReport,
) -> tuple[LayerTime, ...]:
    """The parts of every layer's time; a model that is no roofline gives all of it to what bounds the layer."""
    parts = model.parts(network, policy, workload) if isinstance(model, Roofline) else {}
    found = []
    for name, cost in report.layers.items():
        if name in parts:
            part = parts[name]
            seconds = {key: getattr(part, f"{key}_s") for key in PARTS}
            operations, traffic, level = part.operations, part.traffic, part.level
        else:
            seconds = {cost.bound or "other": cost.cost.latency_s}
            operations, traffic, level = math.nan, math.nan, ""
        about = {"compute": cost.compute, "support": cost.support, "bound": cost.bound}
        precision, kind = precision_name(policy[name]), layer_kind(asdict(network[name]))
        found.append(LayerTime(name, kind, precision, seconds, operations, traffic, level, **about))
    return tuple(found)


def _held_against(row: Priced, reference: CostReport | None) -> Priced:
    """A row with its speedup and its probability of being faster than the reference."""
    if row.report is None or reference is None or row.report is reference:
        return row
    speedup = reference.total.latency_s / row.report.total.latency_s if row.report.total.latency_s else math.nan
    return replace(row, speedup=speedup, faster=_probability(row.report, reference))


def _probability(one: CostReport | None, other: CostReport | None) -> float:
    if one is None or other is None:
        return math.nan
    try:
        return probability_faster(one, other)
    except ValueError:  # a latency or its error is not known: a table has a dash for it
        return math.nan
