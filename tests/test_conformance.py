"""The built-in tasks, cost models, strategies and backends fulfil their contracts."""

from __future__ import annotations

import pytest
import torch
from conformance import BackendContract, CostModelContract, StrategyContract, TaskContract
from tiny import TinyTask

from hwmodels import Roofline, StorageModel
from search.backends import backend as backend_of
from search.strategies.samplers import Tpe
from search.strategies.solver import Solver
from search.tasks.digits import Digits
from search.tasks.function import FunctionTask


class TestDigits(TaskContract):
    @pytest.fixture
    def task(self):
        return Digits()


class TestTinyTask(TaskContract):
    @pytest.fixture
    def task(self):
        return TinyTask()


class TestFunctionTask(TaskContract):
    @pytest.fixture
    def task(self):
        model = torch.nn.Linear(4, 3).eval()
        data = {split: torch.randn(20, 4) for split in ("selection", "report")}
        calibration = [torch.randn(8, 4), torch.randn(8, 4)]
        return FunctionTask(model, calibration[0], calibration, lambda m, split: m(data[split]).square().mean().item())


class TestZen5(CostModelContract):
    @pytest.fixture
    def cost_model(self):
        return Roofline("zen5")


class TestStorage(CostModelContract):
    @pytest.fixture
    def cost_model(self):
        return StorageModel()


class TestSolver(StrategyContract):
    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: Solver(evaluations)


class TestTpe(StrategyContract):
    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: Tpe(evaluations)


class TestOnnxRuntime(BackendContract):
    @pytest.fixture
    def backend(self):
        pytest.importorskip("onnxruntime")
        return backend_of("onnxruntime")


class TestTorchAO(BackendContract):
    precision = "int8"

    @pytest.fixture
    def backend(self):
        pytest.importorskip("torchao")
        return backend_of("torchao")
