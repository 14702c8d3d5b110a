"""A mixture of Gaussians over several fields, and its exact denoiser."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

SMALLEST_WEIGHT = 1e-4


class Mixture(nn.Module):
    """Σ_m w_m N(μ_m, Σ_m), Σ = U diag(v) Uᵀ + f I for the first `wide` channels, variances for the others.

    Covariances are those of probabilistic principal components (Tipping and Bishop 1999). Everything is a buffer,
    nothing is trained: `fit` sets it from groups of samples.
    """

    log_weight: Tensor
    mean: Tensor
    modes: Tensor
    values: Tensor
    floor: Tensor
    variance: Tensor

    def __init__(self, components: int, rank: int, wide: int, others: int) -> None:
        super().__init__()
        self.register_buffer("log_weight", torch.zeros(components))
        self.register_buffer("mean", torch.zeros(components, wide + others))
        self.register_buffer("modes", torch.zeros(components, rank, wide))
        self.register_buffer("values", torch.zeros(components, rank))
        self.register_buffer("floor", torch.ones(components))
        self.register_buffer("variance", torch.ones(components, others))

    def forward(
        self, z: Float[Tensor, "b c"], sigma: Float[Tensor, "b c"], hidden: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b c"]:
        """E[z₀ | z = z₀ + σ n]; the first `wide` channels have one σ. What is `hidden` (1) tells nothing."""
        wide = self.modes.shape[2]
        away = (z - self.mean[:, None]) * (1 - hidden)  # (m, b, c)
        d, rest = away[..., :wide], away[..., wide:]
        projected = d @ self.modes.transpose(1, 2)
        share = self._log(d, projected, rest, sigma, hidden).softmax(dim=0)[..., None]
        noise, floor, values = sigma[:, :1] ** 2, self.floor[:, None, None], self.values[:, None]
        kept = floor / (floor + noise)
        along = share * ((values + floor) / (values + floor + noise) - kept) * projected
        estimate = (along @ self.modes).sum(0) + (share * kept * d).sum(0)
        variance = self.variance[:, None]
        others = (share * variance / (variance + sigma[:, wide:] ** 2) * rest).sum(0)
        return (share * self.mean[:, None]).sum(0) + torch.cat([estimate, others], dim=1)

    def log_density(
        self, z: Float[Tensor, "b c"], sigma: Float[Tensor, "b c"], hidden: Float[Tensor, "b c"]
    ) -> Float[Tensor, " b"]:
        """ln p(z) of what is not hidden, noise included, up to a constant."""
        return self._logs(z, sigma, hidden).logsumexp(dim=0)

    def likeliest(
        self, z: Float[Tensor, "b c"], sigma: Float[Tensor, "b c"], hidden: Float[Tensor, "b c"]
    ) -> Int[Tensor, " b"]:
        """The component that z is most probably of."""
        return self._logs(z, sigma, hidden).argmax(dim=0)

    def _logs(
        self, z: Float[Tensor, "b c"], sigma: Float[Tensor, "b c"], hidden: Float[Tensor, "b c"]
    ) -> Float[Tensor, "m b"]:
        wide = self.modes.shape[2]
        away = (z - self.mean[:, None]) * (1 - hidden)
        d, rest = away[..., :wide], away[..., wide:]
        return self._log(d, d @ self.modes.transpose(1, 2), rest, sigma, hidden)

    def _log(
        self,
        d: Float[Tensor, "m b w"],
        projected: Float[Tensor, "m b r"],
        rest: Float[Tensor, "m b o"],
        sigma: Float[Tensor, "b c"],
        hidden: Float[Tensor, "b c"],
    ) -> Float[Tensor, "m b"]:
        """Logarithms of weight times density of every component."""
        rank, wide = self.modes.shape[1:]
        low = self.floor[:, None] + sigma[:, 0] ** 2
        high = self.values[:, None] + low[..., None]
        square = projected**2
        beyond = (d**2).sum(2) - square.sum(2)
        shape = (square / high + high.log()).sum(2) + beyond / low + (wide - rank) * low.log()
        total = self.variance[:, None] + sigma[:, wide:] ** 2
        others = ((rest**2 / total + total.log()) * (1 - hidden[:, wide:])).sum(2)
        return self.log_weight[:, None] - (shape * (1 - hidden[:, 0]) + others) / 2

    @torch.no_grad()
    def fit(
        self,
        number: int,
        samples: Float[Tensor, "n wide"],
        weights: Float[Tensor, " n"],
        others_mean: Float[Tensor, " o"],
        others_variance: Float[Tensor, " o"],
        share: float,
    ) -> None:
        """Set one component from weighted samples of the first channels, and moments of the others."""
        weights = weights / weights.sum()
        rank, wide = self.modes.shape[1:]
        mean = weights @ samples
        rows = (samples - mean) * weights.sqrt()[:, None]
        values, axes = torch.linalg.eigh((rows.T @ rows).double())
        values, axes = values.flip(0).clamp(min=0), axes.flip(1)
        floor = values[rank:].mean().clamp(min=1e-4) if wide > rank else torch.tensor(1e-4)
        self.log_weight[number] = math.log(max(share, SMALLEST_WEIGHT))
        self.mean[number] = torch.cat([mean, others_mean])
        self.modes[number] = axes[:, :rank].T
        self.values[number] = (values[:rank] - floor).clamp(min=0)
        self.floor[number] = floor
        self.variance[number] = others_variance
