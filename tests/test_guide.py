"""Guided sampling against exact posteriors, and the promises that every guided task relies on."""

from functools import partial

import pytest
import torch
from mixture import FIELDS, SIZE, draw, evaluate, start, together, toy
from torch import Tensor

from genmed import match
from genmed.bench.mixture import LIMITS, SCENES, chosen
from genmed.fields import Field, Fields
from genmed.guide import Diverged, consistent, guided, misfit, retry
from genmed.observe import Identity, Mask, Observation, downsample, planes
from genmed.samplers import Denoise, euler, schedule, seeded, time_travel

PAIR = Fields(Field("image", "continuous", ("mr",)), Field("label", "categorical", ("outside", "inside")))
SHAPE = (6, 5, 4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair_denoiser(z: Tensor, sigma: float) -> Tensor:
    """A smooth toy in which image and label depend on each other and on their neighbours."""
    weights = random(3, 3, 3, 3, 3, seed=5) / 5
    mixed = torch.nn.functional.conv3d(z / (1 + sigma**2) ** 0.5, weights, padding=1).tanh()
    return torch.cat([mixed[:, :1], 2 * mixed[:, 1:].softmax(1) - 1], dim=1)


def image_observed(seed: int = 1, sigma_y: float = 0.1) -> Observation:
    return Observation("image", random(1, 1, *SHAPE, seed=seed), Identity(), sigma_y)


# The exact answer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCENES)
def test_default_guide_and_sampler_find_the_exact_posterior(kind: str) -> None:
    score = evaluate(guided, chosen, kind, draws=4, samples=256, mixtures=1)
    assert score.error <= LIMITS[kind]
    assert 0.75 < score.spread < 1.3


def test_steering_the_observed_field_only_loses_the_other_one() -> None:
    base = partial(guided, steer="observed")
    full, half = (evaluate(g, chosen, "first field", draws=2, samples=128, mixtures=1) for g in (guided, base))
    assert full.error < half.error


def test_exact_denoiser_and_posterior_of_the_toy_agree_with_numbers() -> None:
    mixture = toy()
    z = start(range(2), sigma_max=1.5)
    noisy = mixture.posterior(torch.eye(2 * SIZE, dtype=torch.float64), z[0].flatten(), 1.5)
    torch.testing.assert_close(mixture.denoiser()(z, 1.5)[0].flatten(), noisy.mean())


# Steps ----------------------------------------------------------------------------------------------------


def gaussian_denoiser(covariance: Tensor) -> Denoise:
    def denoise(z: Tensor, sigma: float) -> Tensor:
        gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(len(covariance)).double())
        return (z.flatten(1) @ gain.T).view_as(z)

    return denoise


def test_line_search_is_exact_for_one_observed_number_of_a_gaussian() -> None:
    root = random(2 * SIZE, 2 * SIZE)
    covariance, sigma, sigma_y = root @ root.T / SIZE, 0.8, 0.3
    operator = planes((SIZE, 1, 1), x=[3])
    observation = Observation("image", torch.full((1, 1, SIZE, 1, 1), 0.7).double(), operator, sigma_y)
    z = start(range(1), sigma_max=1.0)
    eye = torch.eye(2 * SIZE, dtype=torch.float64)
    given_z = torch.linalg.inv(torch.linalg.inv(covariance) + eye / sigma**2)
    mean = given_z @ z.flatten() / sigma**2
    exact = mean + given_z[:, 3] * (0.7 - mean[3]) / (given_z[3, 3] + sigma_y**2)
    ours = guided(gaussian_denoiser(covariance), FIELDS, [observation], relax=1.0)(z, sigma)
    torch.testing.assert_close(ours.flatten(), exact)


@pytest.mark.parametrize("method", ["linesearch", "variance"])
@pytest.mark.parametrize("appearance", [match.none, match.affine, match.poly(), match.labels(), match.lncc(1)])
def test_step_reduces_the_misfit(method: str, appearance: match.Match) -> None:
    z = random(2, 3, *SHAPE, seed=2)
    step = guided(pair_denoiser, PAIR, [image_observed()], method=method, match=appearance, scale=0.1)  # type: ignore[arg-type]
    before, after = pair_denoiser(z, 0.5), step(z, 0.5)
    residual = misfit(before, PAIR, [image_observed()], appearance)
    assert (residual(after).square().sum(1) < residual(before).square().sum(1)).all()


def test_variance_step_is_the_gradient_of_the_formula() -> None:
    z, sigma, gamma, observation = random(1, 3, *SHAPE, seed=2), 0.5, 0.3, image_observed(sigma_y=0.5)
    point = z.clone().requires_grad_()
    z0_hat = pair_denoiser(point, sigma)
    variance = 0.5**2 + gamma * sigma**2 / (1 + sigma**2)
    (slope,) = torch.autograd.grad((observation.y - z0_hat[:, :1]).square().sum() / (2 * variance), point)
    ours = guided(pair_denoiser, PAIR, [observation], method="variance", gamma=gamma)(z, sigma)
    torch.testing.assert_close(ours, z0_hat.detach() - sigma**2 * slope)


def test_steering_all_fields_moves_the_label_and_steering_the_observed_does_not() -> None:
    z = random(1, 3, *SHAPE, seed=2)
    plain = pair_denoiser(z, 0.5)
    full, base = (
        guided(pair_denoiser, PAIR, [image_observed()], steer=steer)(z, 0.5)
        for steer in ("all", "observed")  # type: ignore[arg-type]
    )
    assert not torch.equal(full[:, 1:], plain[:, 1:])
    assert torch.equal(base[:, 1:], plain[:, 1:])
    assert torch.equal(base[:, :1], full[:, :1])


def test_all_misfits_share_one_backward_call_and_one_evaluation() -> None:
    forward = backward = 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, z: Tensor) -> Tensor:
            nonlocal forward
            forward += 1
            return z * 0.5

        @staticmethod
        def backward(ctx: object, slope: Tensor) -> Tensor:  # type: ignore[override]
            nonlocal backward
            backward += 1
            return slope * 0.5

    label = Observation("label", random(1, 2, *SHAPE), planes(SHAPE, x=[1]), 0.1)
    guided(lambda z, sigma: Counted.apply(z), PAIR, [image_observed(), label])(random(1, 3, *SHAPE), 0.5)
    assert (forward, backward) == (1, 1)


# Promises -------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes() -> None:
    mixture = toy()
    observations = together([draw(mixture, "quarter", 0.05, 0)], 2)
    steered = guided(mixture.denoiser(), FIELDS, observations)
    once, again = (chosen(steered, start(range(2), 1.0), seeded(range(2))) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("method", ["linesearch", "variance"])
@pytest.mark.parametrize("appearance", [match.none, match.poly(), match.labels(), match.lncc(1)])
def test_batch_of_two_equals_two_single_runs(method: str, appearance: match.Match) -> None:
    steered = guided(pair_denoiser, PAIR, [image_observed()], method=method, match=appearance)  # type: ignore[arg-type]
    z, sigmas = 10 * random(2, 3, *SHAPE, seed=2), schedule(10, 0.05, 5)
    both = time_travel(steered, z, sigmas, 1, seeded(range(2)), eta=1.0)
    alone = [time_travel(steered, z[i : i + 1], sigmas, 1, seeded(range(i, i + 1)), eta=1.0) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("appearance", [match.none, match.poly(), match.labels(), match.lncc(1)])
def test_hidden_values_change_no_byte_of_the_result(appearance: match.Match) -> None:
    y, operator = random(1, 1, *SHAPE, seed=1), planes(SHAPE, x=[1, 4], z=[0])
    results = []
    for hidden in (0.0, 1e20, float("nan")):
        observation = Observation("image", torch.where(operator.seen, y, torch.full_like(y, hidden)), operator, 0.1)
        steered = guided(pair_denoiser, PAIR, [observation], match=appearance)
        z0 = euler(steered, 10 * random(1, 3, *SHAPE, seed=2), schedule(10, 0.05, 4))
        results.append(consistent(z0, PAIR, [observation], match=appearance).numpy().tobytes())
    assert results[0] == results[1] == results[2]


def test_single_precision_is_enough() -> None:
    mixture, case = toy(), draw(toy(), "4× averages", 0.05, 0)
    exact = euler(guided(mixture.denoiser(), FIELDS, case.observations), start(range(4)), schedule(20, 0.02, 8))
    single = [Observation(o.field, o.y.float(), o.operator, o.sigma_y) for o in case.observations]
    rounded = guided(lambda z, sigma: mixture.denoiser()(z.double(), sigma).float(), FIELDS, single)
    ours = euler(rounded, start(range(4)).float(), schedule(20, 0.02, 8))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-3)


# Divergence -----------------------------------------------------------------------------------------------


def test_step_never_leaves_the_range_of_the_data() -> None:
    observation = image_observed(sigma_y=1e-4)
    steered = guided(lambda z, sigma: 1e-3 * z.sin(), PAIR, [observation], limit=2.0, method="variance", gamma=0.0)
    z0 = steered(random(2, 3, *SHAPE), 5.0)
    assert torch.isfinite(z0).all()
    assert (z0.square().flatten(1).mean(1) <= 4).all()


@pytest.mark.parametrize("wrong", [float("nan"), 1e9])
def test_denoiser_that_leaves_the_range_is_never_returned(wrong: float) -> None:
    def exploding(z: Tensor, sigma: float) -> Tensor:
        return z * (wrong if sigma < 1 else 1.0)

    steered = guided(exploding, PAIR, [image_observed()])
    with pytest.raises(Diverged, match="range"):
        euler(steered, random(1, 3, *SHAPE), schedule(5, 0.1, 6))


def test_denoiser_with_an_adversarial_jacobian_is_not_followed_uphill() -> None:
    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, z: Tensor) -> Tensor:
            return z * 0.1

        @staticmethod
        def backward(ctx: object, slope: Tensor) -> Tensor:  # type: ignore[override]
            return -100 * slope

    z = random(1, 3, *SHAPE)
    for method in ("linesearch", "variance"):
        steered = guided(lambda z, sigma: Reversed.apply(z), PAIR, [image_observed()], method=method)  # type: ignore[arg-type]
        torch.testing.assert_close(steered(z, 1.0), 0.1 * z)


def test_diverged_trajectory_is_restarted_with_smaller_steps_and_given_up_at_last() -> None:
    tried: list[float] = []

    def sample(works_at: float, scale: float) -> Tensor:
        tried.append(scale)
        if scale > works_at:
            raise Diverged("too long")
        return torch.tensor(scale)

    assert retry(partial(sample, 0.3)) == 0.25
    assert tried == [1.0, 0.5, 0.25]
    with pytest.raises(Diverged):
        retry(partial(sample, 0.0))


# Data consistency -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0.0, 2.0, 5.0])
def test_consistent_sample_explains_the_observation_to_within_its_noise(length: float) -> None:
    z0 = random(2, 3, *SHAPE)
    for operator in (planes(SHAPE, x=[1, 4]), downsample(SHAPE, (2, 1, 2)), Identity()):
        missed = torch.linspace(-0.3, 0.3, SHAPE[1], dtype=z0.dtype)[:, None].expand(2, 1, *SHAPE)
        y = operator(z0[:, :1] + missed)
        observation = Observation("image", y, operator, 0.05)
        ours = consistent(z0, PAIR, [observation], length=length, iterations=60)
        r = misfit(ours, PAIR, [observation])(ours)
        assert (r.square().sum(1) / observation.seen.sum()).max() < 0.25
        assert torch.equal(ours[:, 1:], z0[:, 1:])


def test_consistency_equals_the_closed_formula() -> None:
    z0, operator, sigma_y = random(1, 2, SIZE, 1, 1), Mask(random(1, 1, SIZE, 1, 1, seed=3) > 0), 0.1
    observation = Observation("image", random(1, 1, SIZE, 1, 1, seed=4), operator, sigma_y)
    position = torch.arange(SIZE).double()
    prior = 0.3**2 * torch.exp(-(position[:, None] - position).abs() / 1.5)
    rows = torch.eye(SIZE).double()[operator.seen.flatten()]
    gain = prior @ rows.T @ torch.linalg.inv(rows @ prior @ rows.T + sigma_y**2 * torch.eye(len(rows)))
    image = z0[0, 0].flatten()
    exact = image + gain @ (rows @ (observation.y.flatten() - image))
    ours = consistent(z0, FIELDS, [observation], length=1.5, amplitude=0.3, iterations=100)
    torch.testing.assert_close(ours[0, 0].flatten(), exact)


def test_consistency_follows_a_fitted_appearance() -> None:
    z0 = random(1, 3, *SHAPE)
    observation = Observation("image", 2 - 3 * z0[:, :1] + 0.3 * random(1, 1, *SHAPE, seed=3), Identity(), 0.05)
    ours = consistent(z0, PAIR, [observation], match=match.affine, length=0.0)
    before, after = (misfit(z0, PAIR, [observation], match.affine)(z).square().mean() for z in (z0, ours))
    assert after < before / 20
