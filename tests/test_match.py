"""Every misfit's gradient against finite differences; appearance models find what they can express."""

import pytest
import torch
from torch import Tensor

from genmed import match
from genmed.match import Match, Residual

SHAPE = (5, 4, 3)
SEEN = (torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(7)) > 0.2).double()

MATCHES: dict[str, Match] = {
    "none": match.none,
    "affine": match.affine,
    "poly": match.poly(4),
    "labels": match.labels(),
    "huber": match.huber(0.3),
    "huber of an affine fit": match.huber(0.3, match.affine),
    "lncc": match.lncc(1),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """x, y (two channels) and soft labels (three)."""
    shapes = (batch, 2, *SHAPE), (batch, 2, *SHAPE), (batch, 3, *SHAPE)
    x, y, scores = (random(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return x, y, scores.softmax(1)


def half_square(residual: Residual, x: Tensor, labels: Tensor) -> Tensor:
    return (residual(x, labels) ** 2).sum() / 2


@pytest.mark.parametrize(("name", "argument"), [*((name, "x") for name in MATCHES), ("labels", "labels")])
def test_gradient_of_every_misfit_by_finite_differences(name: str, argument: str) -> None:
    x, y, labels = example()
    residual = MATCHES[name](x, y, SEEN, labels)
    point = (x if argument == "x" else labels).clone().requires_grad_()
    direction = random(*point.shape, seed=9)

    def value(moved: Tensor) -> Tensor:
        return half_square(residual, *((moved, labels) if argument == "x" else (x, moved)))

    slope = (torch.autograd.grad(value(point), point)[0] * direction).sum().item()
    step = 1e-5
    numeric = (value(point + step * direction) - value(point - step * direction)).item() / (2 * step)
    assert slope == pytest.approx(numeric, rel=1e-5, abs=1e-7)


def test_gradient_of_the_robust_misfit_is_huber_s() -> None:
    x, y, labels = example()
    point = x.clone().requires_grad_()
    ours = torch.autograd.grad(half_square(match.huber(0.3)(x, y, SEEN, None), point, labels), point)[0]
    loss = torch.nn.functional.huber_loss(point, y, delta=0.3, reduction="none")
    theirs = torch.autograd.grad((SEEN * loss).sum(), point)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", MATCHES)
def test_misfit_ignores_unseen_voxels(name: str) -> None:
    x, y, labels = example()
    soiled = torch.where(SEEN > 0, y, torch.full_like(y, 50.0))
    ours, theirs = (MATCHES[name](x, values * SEEN, SEEN, labels)(x, labels) for values in (y, soiled))
    assert torch.equal(ours, theirs)
    assert not ours[(SEEN == 0).expand_as(ours)].any()


@pytest.mark.parametrize("name", MATCHES)
def test_appearance_is_fitted_to_every_sample_alone(name: str) -> None:
    x, y, labels = example()
    both = MATCHES[name](x, y, SEEN, labels)(x, labels)
    for i in (0, 1):
        part = slice(i, i + 1)
        alone = MATCHES[name](x[part], y[part], SEEN, labels[part])(x[part], labels[part])
        torch.testing.assert_close(both[part], alone, rtol=0, atol=1e-10)


def test_one_observation_fits_a_batch_of_estimates() -> None:
    x, y, labels = example()
    for fit in MATCHES.values():
        assert fit(x, y[:1], SEEN, labels)(x, labels).shape == x.shape


def test_affine_explains_an_inverted_scan() -> None:
    x, _, labels = example()
    assert match.affine(x, 3 - 2 * x, SEEN, labels)(x, labels).abs().max() < 1e-5


def test_polynomial_explains_a_curve_that_is_not_monotone_and_an_affine_map_cannot() -> None:
    x, _, labels = example()
    y = x**2 - 1
    assert match.poly(3, ridge=1e-8)(x, y, SEEN, labels)(x, labels).abs().max() < 1e-4
    assert match.affine(x, y, SEEN, labels)(x, labels).abs().max() > 0.5


def test_labels_explain_a_contrast_of_their_own_each() -> None:
    x, _, _ = example()
    hard = torch.nn.functional.one_hot(random(2, *SHAPE, seed=3).gt(0).long(), 2).movedim(-1, 1).double()
    y = torch.where(hard[:, 1:] > 0, 1 - x, 5 + 0.5 * x)
    assert match.labels(ridge=0)(x, y, SEEN, hard)(x, hard).abs().max() < 1e-4
    assert match.affine(x, y, SEEN, hard)(x, hard).abs().max() > 0.5


def test_lncc_is_blind_to_inversion_and_a_slow_change_of_brightness() -> None:
    x = random(1, 1, 12, 12, 12, seed=0)
    seen, ramp = torch.ones_like(x), torch.linspace(0, 3, 12, dtype=x.dtype)[:, None, None]
    changed = match.lncc(2)(x, 2 - 3 * x + ramp, seen, None)(x, None)
    other = match.lncc(2)(x, random(1, 1, 12, 12, 12, seed=5), seen, None)(x, None)
    assert changed.square().mean() < 0.1
    assert other.square().mean() > 0.8


def test_labels_need_a_label_field() -> None:
    x, y, _ = example()
    with pytest.raises(ValueError, match="categorical"):
        match.labels()(x, y, SEEN, None)
