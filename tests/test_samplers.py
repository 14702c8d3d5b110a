"""Samplers of a Gaussian, whose answer is known, and the contract of their arguments."""

import pytest
import torch
from torch import Tensor

from genmed.samplers import euler, heun, noise, schedule, seeded, time_travel

SPREAD = 0.5


def gaussian(z: Tensor, sigma: float) -> Tensor:
    """Exact denoiser of N(1, SPREAD²)."""
    return 1 + SPREAD**2 / (SPREAD**2 + sigma**2) * (z - 1)


def white(count: int, size: int = 2) -> Tensor:
    return noise(torch.zeros(count, 1, size, 1, 1, dtype=torch.float64), seeded(range(count)))


SAMPLERS = {
    "euler": lambda denoise, z, sigmas, seeds: euler(denoise, z, sigmas),
    "heun": lambda denoise, z, sigmas, seeds: heun(denoise, z, sigmas),
    "ancestral": lambda denoise, z, sigmas, seeds: time_travel(denoise, z, sigmas, 0, seeded(seeds)),
    "time travel": lambda denoise, z, sigmas, seeds: time_travel(denoise, z, sigmas, 2, seeded(seeds)),
}


def test_schedule_is_eq_5_of_edm_and_ends_in_zero() -> None:
    sigmas = schedule(80, 0.002, 18)
    assert len(sigmas) == 19
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    torch.testing.assert_close(sigmas[[0, 17]], torch.tensor([80, 0.002], dtype=torch.float64))
    expected = (80 ** (1 / 7) + 5 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert sigmas[5].item() == pytest.approx(expected)


def test_schedule_of_one_step_starts_at_sigma_max() -> None:
    assert schedule(10, 0.1, 1).tolist() == pytest.approx([10, 0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_recovers_mean_and_spread_of_a_gaussian(name: str) -> None:
    sigmas = schedule(20, 0.01, 80)
    z0 = SAMPLERS[name](gaussian, 20 * white(300, 16), sigmas, range(300))
    assert z0.mean().item() == pytest.approx(1, abs=0.05)
    assert z0.std().item() == pytest.approx(SPREAD, abs=0.05)


def test_heun_is_closer_to_the_exact_flow_than_euler_at_the_same_steps() -> None:
    z = 20 * white(50)
    exact = 1 + (z - 1) * SPREAD / (SPREAD**2 + 20**2) ** 0.5
    sigmas = schedule(20, 0.01, 20)
    assert (heun(gaussian, z, sigmas) - exact).abs().max() < (euler(gaussian, z, sigmas) - exact).abs().max() / 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_seed_gives_the_same_sample_and_another_seed_another(name: str) -> None:
    z, sigmas = 20 * white(2), schedule(20, 0.01, 5)
    once, again = (SAMPLERS[name](gaussian, z, sigmas, range(2)) for _ in range(2))
    assert torch.equal(once, again)
    if name in ("ancestral", "time travel"):
        assert not torch.equal(once, SAMPLERS[name](gaussian, z, sigmas, range(5, 7)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_batch_of_two_equals_two_single_runs(name: str) -> None:
    z, sigmas = 20 * white(2), schedule(20, 0.01, 5)
    both = SAMPLERS[name](gaussian, z, sigmas, range(2))
    alone = [SAMPLERS[name](gaussian, z[i : i + 1], sigmas, range(i, i + 1)) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-5)


def test_no_added_noise_and_no_travel_are_euler() -> None:
    z, sigmas = 20 * white(3), schedule(20, 0.01, 7)
    expected = euler(gaussian, z, sigmas)
    assert torch.equal(time_travel(gaussian, z, sigmas, 0, seeded(range(3)), eta=0.0), expected)


def test_callback_sees_every_evaluation_of_the_level_it_was_made_at() -> None:
    seen: list[tuple[int, float]] = []
    sigmas = schedule(20, 0.01, 4)
    z0 = time_travel(
        gaussian, 20 * white(1), sigmas, 1, seeded(range(1)), between=(0.1, 5.0),
        callback=lambda step, sigma, z, z0_hat: seen.append((step, sigma)),
    )  # fmt: skip
    repeated = [step for step in range(4) if 0.1 <= sigmas[step] <= 5]
    assert [step for step, _ in seen] == sorted([*range(4), *repeated])
    assert all(sigma == sigmas[step].item() for step, sigma in seen)
    assert torch.isfinite(z0).all()


def test_result_is_the_last_estimate() -> None:
    estimates: list[Tensor] = []
    z0 = euler(gaussian, 20 * white(1), schedule(20, 0.01, 3), lambda step, sigma, z, x: estimates.append(x))
    assert torch.equal(z0, estimates[-1])
