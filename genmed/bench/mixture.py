"""Exact-answer toy: guides and samplers against the known posterior of a Gaussian mixture.

    python -m genmed.bench.mixture

Two fields of 16 coordinates, jointly a mixture of 8 Gaussians with full covariances: the denoiser and the
posterior under any linear observation are closed formulas, so the error of a guided sampler is its own.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from genmed.fields import Field, Fields
from genmed.guide import guided
from genmed.observe import Identity, Observation, Operator, downsample, voxels
from genmed.samplers import Denoise, ancestral, euler, heun, noise, schedule, seeded, time_travel

SIZE = 16
FIELDS = Fields(Field("image", "continuous", ("image",)), Field("shape", "continuous", ("shape",)))


@dataclass(frozen=True)
class Mixture:
    """Σ_k π_k N(m_k, C_k) over d = 32 coordinates, the two fields one after the other."""

    weights: Float[Tensor, "k"]
    means: Float[Tensor, "k d"]
    covariances: Float[Tensor, "k d d"]

    def posterior(self, matrix: Float[Tensor, "m d"], y: Float[Tensor, "m"], sigma_y: float) -> "Mixture":
        """The exact distribution given y = matrix · x + sigma_y n."""
        cross = self.covariances @ matrix.T
        inner = matrix @ cross + sigma_y**2 * torch.eye(len(y), dtype=y.dtype)
        gain = torch.linalg.solve(inner, cross.mT).mT
        surprise = y - self.means @ matrix.T
        evidence = torch.distributions.MultivariateNormal(torch.zeros_like(y), inner).log_prob(surprise)
        return Mixture(
            (self.weights.log() + evidence).softmax(0),
            self.means + (gain @ surprise[..., None]).squeeze(-1),
            self.covariances - gain @ cross.mT,
        )

    def mean(self) -> Float[Tensor, "d"]:
        return self.weights @ self.means

    def covariance(self) -> Float[Tensor, "d d"]:
        centred = self.means - self.mean()
        within = torch.einsum("k,kde->de", self.weights, self.covariances)
        return within + torch.einsum("k,kd,ke->de", self.weights, centred, centred)

    def sample(self, generator: torch.Generator) -> Float[Tensor, "d"]:
        k = int(torch.multinomial(self.weights, 1, generator=generator))
        white = torch.randn(self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + torch.linalg.cholesky(self.covariances[k]) @ white

    def denoiser(self) -> Denoise:
        """E[x | x + σ n = z] with z of shape (b, 2, 16, 1, 1)."""
        lengths, directions = torch.linalg.eigh(self.covariances)

        def denoise(z: Float[Tensor, "b 2 16 1 1"], sigma: float) -> Float[Tensor, "b 2 16 1 1"]:
            total = lengths + sigma**2
            rotated = torch.einsum("kde,bkd->bke", directions, z.flatten(1)[:, None] - self.means)
            log_weights = self.weights.log() - total.log().sum(1) / 2 - (rotated**2 / total).sum(2) / 2
            shrunk = torch.einsum("kde,bke->bkd", directions, rotated * lengths / total)
            return torch.einsum("bk,bkd->bd", log_weights.softmax(1), self.means + shrunk).view_as(z)

        return denoise


def toy(seed: int = 0, components: int = 8) -> Mixture:
    """Random means of unit variance; Wishart covariances, half of it within the components."""
    generator = torch.Generator().manual_seed(seed)
    d = 2 * SIZE
    means = torch.randn(components, d, generator=generator, dtype=torch.float64)
    roots = torch.randn(components, d, d, generator=generator, dtype=torch.float64)
    weights = torch.full((components,), 1 / components, dtype=torch.float64)
    covariances = 0.5 * roots @ roots.mT / d + 1e-3 * torch.eye(d, dtype=torch.float64)
    return Mixture(weights, means, covariances)
