"""Misfits between what the model expects to be observed, x = A(ẑ₀), and the observation y.

A match is fitted first and differentiated afterwards: `fit(x, y, seen, labels)` settles, without gradient
and for each sample alone, whatever is unknown about the appearance (y ≈ g(x)) and returns the residual
`r(x, labels)` with that frozen. Every misfit is ½ Σ r² / σ_y². Only voxels with `seen` = 1 count.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool3d

Residual = Callable[[Tensor, Tensor | None], Tensor]
Match = Callable[[Tensor, Tensor, Tensor, Tensor | None], Residual]


def none(
    x: Float[Tensor, "b c x y z"],
    y: Float[Tensor, "#b c x y z"],
    seen: Float[Tensor, "#b c x y z"],
    labels: Float[Tensor, "b l x y z"] | None = None,
) -> Residual:
    """Same modality: r = y − x."""
    return lambda x, labels: seen * (y - x)


def poly(order: int = 3, ridge: float = 1e-3) -> Match:
    """Another modality: y ≈ g(x), g a polynomial per channel in the Legendre basis on the range of x.

    It need not be monotone. `order=1` is an affine change of intensity.
    """

    def fit(x: Tensor, y: Tensor, seen: Tensor, labels: Tensor | None = None) -> Residual:
        seen = seen.expand_as(x)
        low = x.detach().masked_fill(seen == 0, torch.inf).amin(dim=(2, 3, 4), keepdim=True)
        high = x.detach().masked_fill(seen == 0, -torch.inf).amax(dim=(2, 3, 4), keepdim=True)
        half = ((high - low) / 2).clamp(min=1e-6)

        def basis(x: Tensor) -> Tensor:
            return _legendre((x - low) / half - 1, order)

        weights = _least_squares(basis(x), y, seen, ridge)
        return lambda x, labels: seen * (y - torch.einsum("bck,bckxyz->bcxyz", weights, basis(x)))

    return fit


affine: Match = poly(order=1, ridge=0.0)


def labels(ridge: float = 1e-3) -> Match:
    """Another modality: y ≈ Σ_l p_l (a_l x + b_l), affine within every label, p the current soft labels.

    The intensity model of SAMSEG (Puonti et al. 2016) with a slope added. The labels stay differentiable, so
    the guide can also move a boundary to explain y.
    """

    def basis(x: Tensor, soft: Tensor) -> Tensor:
        return torch.cat([torch.stack([part * x, part.expand_as(x)], 2) for part in soft.split(1, dim=1)], 2)

    def fit(x: Tensor, y: Tensor, seen: Tensor, labels: Tensor | None = None) -> Residual:
        if labels is None:
            raise ValueError("match.labels needs a categorical field in the model")
        weights = _least_squares(basis(x, labels), y, seen.expand_as(x), ridge)

        def residual(x: Tensor, labels: Tensor | None) -> Tensor:
            assert labels is not None
            return seen * (y - torch.einsum("bck,bckxyz->bcxyz", weights, basis(x, labels)))

        return residual

    return fit


def huber(delta: float, match: Match = none) -> Match:
    """Bounded pull of outliers: beyond |r| = delta (in units of y) the gradient of `match` stays constant.

    Written as a weighted residual, r √min(1, δ/|r|), whose gradient at the fit is Huber's (1964).
    """

    def fit(x: Tensor, y: Tensor, seen: Tensor, labels: Tensor | None = None) -> Residual:
        residual = match(x, y, seen, labels)
        with torch.no_grad():
            weight = (delta / residual(x, labels).abs().clamp(min=delta)).sqrt()
        return lambda x, labels: weight * residual(x, labels)

    return fit


def lncc(radius: int = 2, floor: float = 0.1) -> Match:
    """Another modality, local: r² = 1 − ρ², ρ the correlation of x and y in the window round each voxel.

    Blind to every slow change of brightness and contrast, inversion included. `floor` (in units of x and y)
    is the contrast below which a window counts as flat.
    """

    def fit(x: Tensor, y: Tensor, seen: Tensor, labels: Tensor | None = None) -> Residual:
        mass = _window(seen, radius).clamp(min=1e-6)

        def mean(values: Tensor) -> Tensor:
            return _window(seen * values, radius) / mass

        y_mean = mean(y)
        y_variance = (mean(y * y) - y_mean**2).clamp(min=0) + floor**2

        def residual(x: Tensor, labels: Tensor | None) -> Tensor:
            x_mean = mean(x)
            x_variance = (mean(x * x) - x_mean**2).clamp(min=0) + floor**2
            covariance = mean(x * y) - x_mean * y_mean
            return seen * (1 - covariance**2 / (x_variance * y_variance)).clamp(min=1e-6).sqrt()

        return residual

    return fit


def _window(values: Tensor, radius: int) -> Tensor:
    return avg_pool3d(values, 2 * radius + 1, stride=1, padding=radius)


def _legendre(t: Float[Tensor, "b c x y z"], order: int) -> Float[Tensor, "b c k x y z"]:
    """Legendre polynomials P_0 … P_order by Bonnet's recursion."""
    terms = [torch.ones_like(t), t]
    for n in range(1, order):
        terms.append(((2 * n + 1) * t * terms[n] - n * terms[n - 1]) / (n + 1))
    return torch.stack(terms[: order + 1], dim=2)


@torch.no_grad()
def _least_squares(
    basis: Float[Tensor, "b c k x y z"],
    y: Float[Tensor, "#b c x y z"],
    seen: Float[Tensor, "b c x y z"],
    ridge: float,
) -> Float[Tensor, "b c k"]:
    """Weights w of min mean_seen (y − w·basis)² + ridge |w|², for every sample and channel alone."""
    columns = (basis * seen[:, :, None]).flatten(3).double()
    target = (y * seen).flatten(2).double()
    count = seen.flatten(2).sum(-1).clamp(min=1)[..., None]
    gram = columns @ columns.mT / count[..., None]
    gram = gram + (ridge + 1e-8) * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    moment = (columns @ target[..., None]).squeeze(-1) / count
    return torch.linalg.solve(gram, moment).to(basis.dtype)
