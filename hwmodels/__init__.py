"""What a precision costs on a piece of hardware: no torch, no search, usable alone."""

from __future__ import annotations

from hwmodels.base import CostModel, StorageModel
from hwmodels.cost import Cost, CostReport, CostTable, LayerCost, Workload
from hwmodels.device import Device, list_devices, load_device
from hwmodels.network import Layer, Network, Operation, Tensor
from hwmodels.precision import FLOAT, Format, Precision
from hwmodels.roofline import Roofline

__all__ = [
    "FLOAT",
    "Cost",
    "CostModel",
    "CostReport",
    "CostTable",
    "Device",
    "Format",
    "Layer",
    "LayerCost",
    "Network",
    "Operation",
    "Precision",
    "Roofline",
    "StorageModel",
    "Tensor",
    "Workload",
    "list_devices",
    "load_device",
]
