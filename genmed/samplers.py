"""Samplers: pure functions that walk σ from high to low with any `denoise(z, sigma) -> z0_hat`."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, float, Tensor, Tensor], None]  # (step, sigma, z, z0_hat)


def schedule(sigma_max: float, sigma_min: float, steps: int, rho: float = 7) -> Float[Tensor, " steps+1"]:
    """Noise levels σ_0 > … > σ_{steps-1} > σ_steps = 0 (EDM, arXiv 2206.00364, eq. 5), on the CPU."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def seeded(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator per sample, so that a sample does not depend on the rest of its batch."""
    return [torch.Generator(device).manual_seed(seed % 2**62) for seed in seeds]


def noise(like: Float[Tensor, " b *n"], generators: Sequence[torch.Generator]) -> Float[Tensor, " b *n"]:
    """White noise of unit variance; sample i is drawn from generator i."""
    return torch.stack([torch.randn(like.shape[1:], generator=generator, dtype=like.dtype, device=like.device)
                        for generator in generators])  # fmt: skip


@torch.no_grad()
def euler(
    denoise: Denoise,
    z: Float[Tensor, "b c x y z"],
    sigmas: Float[Tensor, " n"],
    callback: Callback | None = None,
) -> Float[Tensor, "b c x y z"]:
    """Deterministic first-order sampler of dz/dσ = (z − D(z, σ)) / σ (EDM, arXiv 2206.00364, eq. 3)."""
    for step, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        z0_hat = _estimate(denoise, z, sigma, step, callback)
        z = z0_hat + following / sigma * (z - z0_hat)
    return z


@torch.no_grad()
def heun(
    denoise: Denoise,
    z: Float[Tensor, "b c x y z"],
    sigmas: Float[Tensor, " n"],
    callback: Callback | None = None,
) -> Float[Tensor, "b c x y z"]:
    """Deterministic second-order sampler, two evaluations a step (EDM, arXiv 2206.00364, algorithm 1)."""
    for step, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        z0_hat = _estimate(denoise, z, sigma, step, callback)
        slope = (z - z0_hat) / sigma
        ahead = z + (following - sigma) * slope
        if following > 0:
            slope = (slope + (ahead - denoise(ahead, following)) / following) / 2
        z = z + (following - sigma) * slope
    return z


@torch.no_grad()
def ancestral(
    denoise: Denoise,
    z: Float[Tensor, "b c x y z"],
    sigmas: Float[Tensor, " n"],
    generators: Sequence[torch.Generator],
    eta: float = 1.0,
    callback: Callback | None = None,
) -> Float[Tensor, "b c x y z"]:
    """Stochastic sampler (DDPM, arXiv 2006.11239, in σ notation): step below the level, then add noise.

    `eta` scales the added noise: 0 is `euler`, 1 the full posterior variance σ'² (σ² − σ'²) / σ².
    """
    for step, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        z0_hat = _estimate(denoise, z, sigma, step, callback)
        z = _ancestral_step(z, z0_hat, sigma, following, eta, generators)
    return z


@torch.no_grad()
def time_travel(
    denoise: Denoise,
    z: Float[Tensor, "b c x y z"],
    sigmas: Float[Tensor, " n"],
    travels: int,
    generators: Sequence[torch.Generator],
    *,
    eta: float = 1.0,
    between: tuple[float, float] = (0.1, 3.0),
    callback: Callback | None = None,
) -> Float[Tensor, "b c x y z"]:
    """Steps of `ancestral` (of `euler` with eta 0), each undone by re-noising and repeated `travels` times.

    Going back lets the fields agree at a level before it is left (RePaint, arXiv 2201.09865, algorithm 1;
    FreeDoM, arXiv 2303.09833, section 4.3). Only levels `between` two values of σ, where the content of data
    of unit variance is decided, are repeated.
    """
    for step, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        repeats = travels if between[0] <= sigma <= between[1] else 0
        for travel in range(repeats + 1):
            z0_hat = _estimate(denoise, z, sigma, step, callback)
            z = _ancestral_step(z, z0_hat, sigma, following, eta, generators)
            if travel < repeats:
                z = z + (sigma**2 - following**2) ** 0.5 * noise(z, generators)
    return z


def _ancestral_step(
    z: Tensor,
    z0_hat: Tensor,
    sigma: float,
    following: float,
    eta: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    added = eta * following * (1 - (following / sigma) ** 2) ** 0.5
    kept = (following**2 - added**2) ** 0.5
    z = z0_hat + kept / sigma * (z - z0_hat)
    return z + added * noise(z, generators) if added > 0 else z


def _estimate(denoise: Denoise, z: Tensor, sigma: float, step: int, callback: Callback | None) -> Tensor:
    z0_hat = denoise(z, sigma)
    if callback is not None:
        callback(step, sigma, z, z0_hat)
    return z0_hat
