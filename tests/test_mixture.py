"""The mixture of Gaussians that the denoiser of shapes starts from, against dense formulas."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from genmed.nets.mixture import Mixture

COMPONENTS, RANK, WIDE, OTHERS = 3, 2, 5, 2


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    generator = torch.Generator().manual_seed(0)
    made = Mixture(COMPONENTS, RANK, WIDE, OTHERS).double()
    made.log_weight.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    made.mean.copy_(torch.randn(made.mean.shape, generator=generator) * 2)
    for number in range(COMPONENTS):
        made.modes[number] = torch.linalg.qr(torch.randn(WIDE, RANK, generator=generator).double())[0].T
    made.values.copy_(torch.rand(made.values.shape, generator=generator) * 3)
    made.floor.copy_(torch.tensor([0.1, 0.2, 0.3]))
    made.variance.copy_(torch.rand(made.variance.shape, generator=generator) + 0.1)
    return made


def covariance(mixture: Mixture, number: int) -> Tensor:
    modes = mixture.modes[number]
    wide = modes.T @ torch.diag(mixture.values[number]) @ modes + mixture.floor[number] * torch.eye(WIDE)
    return torch.block_diag(wide, torch.diag(mixture.variance[number]))


def dense(mixture: Mixture, noise: Tensor, channels: Tensor) -> MixtureSameFamily:
    parts = [(covariance(mixture, m) + torch.diag(noise**2))[channels][:, channels] for m in range(COMPONENTS)]
    normals = MultivariateNormal(mixture.mean[:, channels], torch.stack(parts))
    return MixtureSameFamily(Categorical(logits=mixture.log_weight), normals)


NOISE = torch.tensor([0.7] * WIDE + [0.4, 1.3], dtype=torch.float64)


def test_the_estimate_is_the_mean_of_the_posterior(mixture: Mixture) -> None:
    z = torch.randn(4, WIDE + OTHERS, generator=torch.Generator().manual_seed(1)).double() * 2
    found = mixture(z, NOISE.expand(4, -1), torch.zeros_like(z))
    every = torch.ones(WIDE + OTHERS, dtype=torch.bool)
    z.requires_grad_()
    (score,) = torch.autograd.grad(dense(mixture, NOISE, every).log_prob(z).sum(), z)
    torch.testing.assert_close(found, (z + NOISE**2 * score).detach())  # Tweedie's formula


def test_the_density_is_that_of_the_noisy_mixture(mixture: Mixture) -> None:
    z = torch.randn(4, WIDE + OTHERS, generator=torch.Generator().manual_seed(2)).double() * 2
    found = mixture.log_density(z, NOISE.expand(4, -1), torch.zeros_like(z))
    expected = dense(mixture, NOISE, torch.ones(WIDE + OTHERS, dtype=torch.bool)).log_prob(z)
    torch.testing.assert_close(found - found[0], expected - expected[0])


def test_what_is_hidden_tells_nothing(mixture: Mixture) -> None:
    z = torch.randn(4, WIDE + OTHERS, generator=torch.Generator().manual_seed(3)).double()
    hidden = torch.zeros_like(z)
    hidden[:, :WIDE] = 1
    other = z.clone()
    other[:, :WIDE] = 100.0
    sigma = NOISE.expand(4, -1)
    torch.testing.assert_close(mixture(z, sigma, hidden), mixture(other, sigma, hidden), atol=0, rtol=0)
    seen = torch.tensor([False] * WIDE + [True] * OTHERS)
    found = mixture.log_density(z, sigma, hidden)
    expected = dense(mixture, NOISE, seen).log_prob(z[:, WIDE:])
    torch.testing.assert_close(found - found[0], expected - expected[0])


def test_a_component_is_fitted_to_its_samples() -> None:
    generator = torch.Generator().manual_seed(4)
    axes = torch.linalg.qr(torch.randn(6, 2, generator=generator))[0]
    samples = torch.randn(40_000, 2, generator=generator) * torch.tensor([3.0, 1.0]) @ axes.T + 5
    samples = samples + 0.2 * torch.randn(samples.shape, generator=generator)
    mixture = Mixture(2, 2, 6, 1)
    mixture.fit(1, samples, torch.ones(len(samples)), torch.tensor([7.0]), torch.tensor([2.0]), 0.25)
    torch.testing.assert_close(mixture.mean[1], torch.tensor([5.0] * 6 + [7.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(mixture.values[1], torch.tensor([9.0, 1.0]), atol=0.2, rtol=0)
    assert float(mixture.floor[1]) == pytest.approx(0.04, rel=0.05)
    assert float((mixture.modes[1] @ axes).det().abs()) == pytest.approx(1, abs=1e-3)
    assert float(mixture.log_weight[1].exp()) == pytest.approx(0.25)
