"""Strategies that draw policies from Optuna's samplers."""

from search.strategies.samplers.base import OptunaSearch
from search.strategies.samplers.named import AnySampler, CmaEs, Gp, Nsga2, Nsga3, Qmc, Tpe

__all__ = ["AnySampler", "CmaEs", "Gp", "Nsga2", "Nsga3", "OptunaSearch", "Qmc", "Tpe"]
