"""The exact-answer toy of `genmed.bench.mixture`, in the shape that the tests use it."""

import torch
from jaxtyping import Float
from torch import Tensor

from genmed.bench.mixture import FIELDS, SIZE, Mixture, draw, evaluate, together, toy

__all__ = ["FIELDS", "SIZE", "Mixture", "draw", "evaluate", "start", "together", "toy"]


def start(seeds: range, sigma_max: float = 20.0) -> Float[Tensor, "b 2 16 1 1"]:
    """Pure noise, each sample from its own seed."""
    draws = [torch.randn(2, SIZE, 1, 1, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return sigma_max * torch.stack(draws)
