"""Guidance: wrap a denoiser so that its estimates agree with what was observed.

The estimate ẑ₀ = D(z, σ) is moved by the gradient of all misfits, summed, taken through the network to every
field: an observed image steers the label and an observed label steers the image.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from genmed.fields import Fields, probabilities
from genmed.match import Match, none
from genmed.observe import Observation
from genmed.samplers import Denoise
from genmed.space import apply_matrices

Residual = Callable[[Tensor], Tensor]
Fit = Callable[[Tensor], Residual]  # settles what is unknown at an estimate; residual of z₀ (b, n) with that frozen


class Diverged(RuntimeError):
    """A guided trajectory left the range of the data; see `retry`."""


def guided(
    denoise: Denoise,
    fields: Fields,
    observations: Sequence[Observation] | Fit,
    *,
    method: Literal["linesearch", "variance"] = "linesearch",
    match: Match = none,
    steer: Literal["all", "observed"] = "all",
    relax: float = 2.0,
    gamma: float = 0.3,
    sigma_data: float = 1.0,
    scale: float = 1.0,
    limit: float = 10.0,
) -> Denoise:
    """A denoiser whose estimate is corrected towards the observations, one backward call each time.

    With the denoiser's Jacobian J, z₀ given z is close to a Gaussian with mean ẑ₀ and covariance σ² J
    (Tweedie). `g = σ² Jᵀ Aᵀ r` with the whitened residual r = (y − A ẑ₀) / σ_y is the direction, and

    - `linesearch`: ẑ₀ + α g with α = |r|² / (r·A g + |r|²), per sample: one conjugate-gradient iteration of
      the Gaussian posterior mean ẑ₀ + Σ Aᵀ (A Σ Aᵀ + σ_y²)⁻¹ (y − A ẑ₀), Σ = σ² J, times `relax`.
    - `variance`: ẑ₀ + g where r is whitened by σ_y² + γ r(σ)², r(σ)² = σ² σ_d² / (σ² + σ_d²), instead
      (ΠGDM, Song et al. 2023; SDA, arXiv 2306.10574, eq. 15).

    A step never makes the linearised residual grow, and is halved while it leads out of the data's range.

    Args:
        denoise: (z, sigma) -> z0_hat of all fields, differentiable in z.
        fields: what the channels of z are.
        observations: all are used at once. Or a function that makes the whitened residual itself, of whatever
            observations are not linear in a field.
        match: misfit and appearance model of the continuous fields; refitted at every call.
        steer: correct all fields (the paper's GenMed-Full), or the observed fields only (GenMed-Base).
        relax: over-relaxation of the line search. 2 recovers the exact posterior of the toy best.
        gamma, sigma_data: of the variance method.
        scale: shortens every step; below 1 after a failure.
        limit: largest believable root mean square of an estimate, in units of z.

    Raises:
        Diverged: from the returned callable, when the denoiser's own estimate is out of range.
    """
    steered = _steered(fields, observations, steer)

    def corrected(z: Float[Tensor, "b c x y z"], sigma: float) -> Float[Tensor, "b c x y z"]:
        spread = gamma / (sigma**-2 + sigma_data**-2) if method == "variance" else 0.0
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            z0_hat = denoise(z, sigma)
            residual = misfit(z0_hat.detach(), fields, observations, match, spread)
            r = residual(z0_hat)
            (slope,) = torch.autograd.grad((r**2).sum() / 2, z)
        z0_hat, r = z0_hat.detach(), r.detach()
        g = -(sigma**2) * slope * steered.to(slope)
        a_g = -torch.func.jvp(residual, (z0_hat,), (g,))[1]
        along, square = (r * a_g).sum(1), (r**2).sum(1)
        longest = (2 * along / (a_g**2).sum(1).clamp(min=1e-30)).clamp(min=0)
        step = torch.ones_like(along)
        if method == "linesearch":
            step = relax * square / (along + square).clamp(min=1e-30)
        step = scale * step.minimum(longest)
        return _within_range(z0_hat, step.nan_to_num(0, 0, 0)[:, None, None, None, None] * g, limit)

    return corrected


def misfit(
    z0: Float[Tensor, "b c x y z"],
    fields: Fields,
    observations: Sequence[Observation] | Fit,
    match: Match = none,
    spread: float = 0.0,
) -> Residual:
    """The whitened residuals of all observations as one differentiable function of z₀.

    Appearances are fitted at `z0` and stay frozen. The summed misfit is ½ |r|², per sample.
    """
    if callable(observations):
        return observations(z0)
    categorical = [field.name for field in fields if field.kind == "categorical"]

    def expected(z0: Tensor, observation: Observation) -> tuple[Tensor, Tensor | None]:
        x = observation.operator(z0[:, fields.slice(observation.field)])
        if not categorical or observation.field in categorical:
            return x, None
        return x, observation.operator(probabilities(z0[:, fields.slice(categorical[0])]))

    def fit(observation: Observation) -> Callable[[Tensor, Tensor | None], Tensor]:
        x, labels = expected(z0, observation)
        chosen = none if observation.field in categorical else match
        return chosen(x, observation.y, observation.seen, labels)

    fits = [(observation, fit(observation)) for observation in observations]

    def residual(z0: Tensor) -> Tensor:
        return torch.cat([
            (fitted(*expected(z0, observation)) / (observation.sigma_y**2 + spread) ** 0.5).flatten(1)
            for observation, fitted in fits
        ], dim=1)  # fmt: skip

    return residual


def consistent(
    z0: Float[Tensor, "b c x y z"],
    fields: Fields,
    observations: Sequence[Observation] | Fit,
    *,
    match: Match = none,
    length: float = 2.0,
    amplitude: float = 0.3,
    iterations: int = 20,
) -> Float[Tensor, "b c x y z"]:
    """Add to the observed fields what a sample still misses of the observations; a few cheap iterations.

    What is missed is taken as a Gaussian process with covariance C = amplitude² exp(−d / length), d the
    city-block distance in voxels: z₀ + C Aᵀ (A C Aᵀ + σ_y²)⁻¹ (y − A z₀), solved by conjugate gradients.
    `length=0` is white noise (Tikhonov). Other fields are returned as they are.
    """
    residual = misfit(z0, fields, observations, match)
    r, pullback = torch.func.vjp(residual, z0)  # type: ignore[misc]
    steered = _steered(fields, observations, "observed").to(z0)
    kernels = [amplitude ** (2 / 3) * _covariance(n, length).to(z0) for n in z0.shape[2:]]

    def spread(v: Tensor) -> Tensor:
        return -apply_matrices(steered * pullback(v)[0], kernels)

    def system(v: Tensor) -> Tensor:
        return v - torch.func.jvp(residual, (z0,), (spread(v),))[1]

    return z0 + spread(_conjugate_gradients(system, r, iterations))


def _covariance(size: int, length: float) -> Float[Tensor, "n n"]:
    """exp(−d / length) of the voxels along one axis."""
    position = torch.arange(size, dtype=torch.float64)
    return torch.exp(-(position[:, None] - position).abs() / max(length, 1e-3))


def _conjugate_gradients(
    system: Callable[[Tensor], Tensor], r: Float[Tensor, "b n"], iterations: int
) -> Float[Tensor, "b n"]:
    """Solve system(v) = r for every sample alone; `system` symmetric and positive definite."""
    v, direction, square = torch.zeros_like(r), r, (r**2).sum(1, keepdim=True)
    for _ in range(iterations):
        mapped = system(direction)
        step = square / (direction * mapped).sum(1, keepdim=True).clamp(min=1e-30)
        v, r = v + step * direction, r - step * mapped
        following = (r**2).sum(1, keepdim=True)
        direction = r + following / square.clamp(min=1e-30) * direction
        square = following
    return v


def retry(sample: Callable[[float], Tensor], scales: Sequence[float] = (1.0, 0.5, 0.25, 0.1)) -> Tensor:
    """`sample(scale)` with the first step scale whose trajectory stays within the data's range.

    Raises:
        Diverged: when none does.
    """
    for scale in scales[:-1]:
        try:
            return sample(scale)
        except Diverged:
            continue
    return sample(scales[-1])


def _steered(fields: Fields, observations: Sequence[Observation] | Fit, steer: str) -> Float[Tensor, "1 c 1 1 1"]:
    """1 for the channels of z that the guide may correct."""
    if steer == "all" or callable(observations):
        return torch.ones(1, fields.channels, 1, 1, 1)
    names = [observation.field for observation in observations]
    channels = torch.zeros(1, fields.channels, 1, 1, 1)
    for name in names:
        channels[:, fields.slice(name)] = 1
    return channels


def _within_range(z0_hat: Tensor, correction: Tensor, limit: float) -> Tensor:
    """z0_hat + correction, the correction of each sample halved until the sum is believable."""

    def out_of_range(z0: Tensor) -> Tensor:
        return ~((z0**2).flatten(1).mean(1) <= limit**2)  # also true of NaN

    if bool(out_of_range(z0_hat).any()):
        raise Diverged("the denoiser's estimate left the range of the data")
    for _ in range(8):
        bad = out_of_range(z0_hat + correction)
        if not bool(bad.any()):
            break
        correction = torch.where(bad[:, None, None, None, None], correction / 2, correction)
    else:
        correction = torch.where(bad[:, None, None, None, None], torch.zeros_like(correction), correction)
    return z0_hat + correction
