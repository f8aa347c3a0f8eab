"""What a precision costs on a piece of hardware: no torch, no search, usable alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hwmodels.base import CostModel, StorageModel
from hwmodels.capability import Capability
from hwmodels.cost import BoundaryCost, Cost, CostReport, CostTable, LayerCost, LayerCosts, Workload
from hwmodels.device import Device, list_devices, load_device
from hwmodels.network import Layer, Network, Operation, Tensor
from hwmodels.precision import FLOAT, Format, Precision
from hwmodels.quantity import Quantity
from hwmodels.roofline import Roofline
from hwmodels.sequence import at_workload
from hwmodels.site import Gemm, Site

if TYPE_CHECKING:
    from hwmodels.bitfusion import BitFusion
    from hwmodels.bitserial import BitSerial
    from hwmodels.haq_table import BitTable
    from hwmodels.lookup import LookupTable, Timing
    from hwmodels.lookup_model import Lookup

__all__ = [
    "FLOAT",
    "BitFusion",
    "BitSerial",
    "BitTable",
    "BoundaryCost",
    "Capability",
    "Cost",
    "CostModel",
    "CostReport",
    "CostTable",
    "Device",
    "Format",
    "Gemm",
    "Layer",
    "LayerCost",
    "LayerCosts",
    "Lookup",
    "LookupTable",
    "Network",
    "Operation",
    "Precision",
    "Quantity",
    "Roofline",
    "Site",
    "StorageModel",
    "Tensor",
    "Timing",
    "Workload",
    "at_workload",
    "list_devices",
    "load_device",
]

_LATER = {
    "BitFusion": "hwmodels.bitfusion",
    "BitSerial": "hwmodels.bitserial",
    "BitTable": "hwmodels.haq_table",
    "Lookup": "hwmodels.lookup_model",
    "LookupTable": "hwmodels.lookup",
    "Timing": "hwmodels.lookup",
}
"""Imported when first asked for: importing the package stays quick."""


def __getattr__(name: str) -> Any:
    """Imports what is imported late."""
    from importlib import import_module

    if name not in _LATER:
        raise AttributeError(f"module 'hwmodels' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
