"""A linear autoencoder of signed distances: principal components with codes of unit variance."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn


class LinearAutoencoder(nn.Module):
    """x ≈ mean + (codes · deviation) modes, the modes orthonormal; everything is a buffer, nothing is trained.

    Distances are in voxels of the stored cube throughout, whatever the side that modes are kept at.
    """

    mean: Tensor
    modes: Tensor
    deviation: Tensor

    def __init__(self, side: int, modes: int) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("mean", torch.zeros(side**3))
        self.register_buffer("modes", torch.zeros(modes, side**3))
        self.register_buffer("deviation", torch.ones(modes))

    def encode(self, x: Float[Tensor, "b 1 n n n"]) -> Float[Tensor, "b k"]:
        """Codes of distances, which are averaged to the autoencoder's side first."""
        return (lower(x, self.side).flatten(1) - self.mean) @ self.modes.T / self.deviation

    def decode(self, codes: Float[Tensor, "b k"], size: int | None = None) -> Float[Tensor, "b 1 n n n"]:
        """Distances on the autoencoder's grid, or linearly interpolated to size³ voxels."""
        n = self.side
        x = ((codes * self.deviation) @ self.modes + self.mean).view(-1, 1, n, n, n)
        return x if size in (None, n) else F.interpolate(x, size=(size,) * 3, mode="trilinear", align_corners=False)


def lower(x: Float[Tensor, "b 1 n n n"], side: int) -> Float[Tensor, "b 1 m m m"]:
    """Averages over blocks of voxels: the cube with `side` voxels a side, or as it is if it has no more."""
    return x if x.shape[-1] <= side else F.adaptive_avg_pool3d(x, side)


def principal_components(
    x: Float[Tensor, "m n3"], weights: Float[Tensor, " m"], modes: int, seed: int = 0
) -> LinearAutoencoder:
    """Fit the autoencoder to weighted rows by a randomised SVD (Halko et al., arXiv 0909.4061), always the same.

    `modes` is an upper bound: there are no more than rows that differ. Rows are changed in place.
    """
    side = round(x.shape[1] ** (1 / 3))
    weights = weights / weights.sum()
    mean = weights @ x
    x.sub_(mean).mul_(weights.sqrt()[:, None])
    modes = max(1, min(modes, len(x) - 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, values, axes = torch.svd_lowrank(x, q=min(modes + 16, *x.shape), niter=3)
    kept = values[:modes] > 1e-4 * values[0]  # beyond that it is rounding, which whitening would amplify
    kept[0] = True
    model = LinearAutoencoder(side, int(kept.sum()))
    model.mean.copy_(mean)
    model.modes.copy_(from_bytes(*to_bytes(axes.T[:modes][kept])))
    model.deviation.copy_(values[:modes][kept].clamp(min=1e-6))
    return model


def to_bytes(modes: Float[Tensor, "k m"]) -> tuple[Int8[Tensor, "k m"], Float[Tensor, " k"]]:
    """Rows as multiples of 1/127 of their largest entry: a byte a number, and the scale of every row."""
    scale = modes.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (modes / scale[:, None]).round().to(torch.int8), scale


def from_bytes(rounded: Int8[Tensor, "k m"], scale: Float[Tensor, " k"]) -> Float[Tensor, "k m"]:
    """Inverse of `to_bytes`; going through both once more changes no more than the last bit."""
    return rounded * scale[:, None]
