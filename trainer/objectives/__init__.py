"""Objectives by name. Each returns sums with counts; the division is the step's."""

from trainer.config.schema import Objective
from trainer.objectives.balance import per_target
from trainer.objectives.likelihood import Likelihood, Terms

OBJECTIVES = {"supervised": Likelihood, "language-modeling": Likelihood, "classification": Likelihood}


def build_objective(settings: Objective) -> Likelihood:
    """The objective that the recipe names."""
    return OBJECTIVES[settings.name](settings)


__all__ = ["OBJECTIVES", "Likelihood", "Terms", "build_objective", "per_target"]
