"""Vela, the Arm compiler, as an oracle for Ethos-U."""

from __future__ import annotations

from hwmodels.vela.compiler import NetworkReport, OperatorReport, Target
from hwmodels.vela.held import Held
from hwmodels.vela.oracle import ACCELERATORS, Vela
from hwmodels.vela.tflite import write_tflite

__all__ = ["ACCELERATORS", "Held", "NetworkReport", "OperatorReport", "Target", "Vela", "write_tflite"]
