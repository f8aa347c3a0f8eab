"""Cost tables as files that other tools read: CSV, Parquet, or HAQ's array of latencies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hwmodels import CostModel, Network, Precision, Workload
from hwmodels.cost_file import write_costs
from hwmodels.haq_table import to_haq_table, write_haq_table
from search.errors import ConfigError, DataError


def write_table(model: CostModel, network: Network, precisions: Sequence[str], workload: Workload, path: Path) -> None:
    """Writes what every layer of a network costs at every precision that the target can run.

    Args:
        model: The target.
        network: The network.
        precisions: Names of precisions; layers that keep their input in float take the weight format alone. The array
            of HAQ's format has integers of 1 to 8 bits instead.
        workload: What is asked of the network at once.
        path: `.csv`, `.parquet` or `.npy`.

    Raises:
        ConfigError: If a precision does not exist, or the target cannot price the network.
        DataError: If the file cannot be written, or has another suffix.
    """
    try:
        wanted = [Precision.parse(name) for name in precisions]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    choices = {}
    for layer in network:
        fitting = dict.fromkeys(one if layer.quantizes_input else Precision(one.weight) for one in wanted)
        choices[layer.name] = tuple(one for one in fitting if model.refusal(layer, one) is None)
    try:
        if path.suffix == ".npy":
            write_haq_table(path, to_haq_table(model, network, workload))
        else:
            write_costs(path, model.cost_table(network, choices, workload))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
