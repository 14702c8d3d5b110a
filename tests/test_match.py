"""Every misfit's gradient against finite differences; appearance models find what they can express."""

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch import Tensor

from genmed import match
from genmed.errors import GenMedError
from genmed.fields import Field, Fields
from genmed.guide import guided, misfit
from genmed.match import Match, Residual
from genmed.observe import Mask, Observation

SHAPE = (5, 4, 3)
SEEN = (torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(7)) > 0.2).double()

MATCHES: dict[str, Match] = {
    "none": match.none,
    "affine": match.affine,
    "poly": match.poly(4),
    "curve": match.curve(6, trim=0.05),
    "labels": match.labels(),
    "one intensity a label": match.labels(slope=False),
    "bias": match.bias(1),
    "bias of a curve": match.bias(2, match.curve(6)),
    "lncc": match.lncc(1),
    "mind": match.mind(),
    "mutual information": match.mutual_information(8),
}
IN_X = [name for name in MATCHES if name != "one intensity a label"]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """x, y (two channels) and soft labels (three)."""
    shapes = (batch, 2, *SHAPE), (batch, 2, *SHAPE), (batch, 3, *SHAPE)
    x, y, scores = (random(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return x, y, scores.softmax(1)


def half_square(residual: Residual, x: Tensor, labels: Tensor) -> Tensor:
    return (residual(x, labels) ** 2).sum() / 2


@pytest.mark.parametrize(
    ("name", "argument"),
    [*((name, "x") for name in IN_X), ("labels", "labels"), ("one intensity a label", "labels")],
)
def test_gradient_of_every_misfit_by_finite_differences(name: str, argument: str) -> None:
    x, y, labels = example()
    residual = MATCHES[name](x, y, SEEN, labels)
    x = x + 0.1 * random(*x.shape, seed=8)  # where a curve was fitted, its range ends exactly at two voxels
    point = (x if argument == "x" else labels).clone().requires_grad_()
    direction = random(*point.shape, seed=9)

    def value(moved: Tensor) -> Tensor:
        return half_square(residual, *((moved, labels) if argument == "x" else (x, moved)))

    slope = (torch.autograd.grad(value(point), point)[0] * direction).sum().item()
    step = 1e-5
    numeric = (value(point + step * direction) - value(point - step * direction)).item() / (2 * step)
    assert slope == pytest.approx(numeric, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", MATCHES)
def test_misfit_ignores_unseen_voxels(name: str) -> None:
    x, y, labels = example()
    soiled = torch.where(SEEN > 0, y, torch.full_like(y, 50.0))
    ours, theirs = (MATCHES[name](x, values * SEEN, SEEN, labels)(x, labels) for values in (y, soiled))
    assert torch.equal(ours, theirs)
    assert not ours[(SEEN == 0).expand_as(ours)].any()


@pytest.mark.parametrize("name", MATCHES)
def test_what_the_model_expects_at_unseen_voxels_changes_nothing(name: str) -> None:
    x, y, labels = example()
    soiled = torch.where(SEEN > 0, x, torch.full_like(x, 50.0))
    ours, theirs = (MATCHES[name](values, y, SEEN, labels)(values, labels) for values in (x, soiled))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MATCHES)
def test_a_flat_estimate_and_a_channel_without_observations_stay_finite(name: str) -> None:
    x, y, labels = example()
    seen = SEEN * torch.tensor([1.0, 0.0]).double()[:, None, None, None]
    for expected in (x, torch.full_like(x, 100.0), torch.full_like(x, 100.0).float()):
        dtype = expected.dtype
        fitted = MATCHES[name](expected, y.to(dtype), seen.to(dtype), labels.to(dtype))
        assert torch.isfinite(fitted(expected, labels.to(dtype))).all()


PAIR = Fields(Field("image", "continuous", ("t1", "t2")), Field("label", "categorical", ("a", "b", "c")))


def observed() -> tuple[Tensor, Observation]:
    """Estimates of a pair and an observation of its image with holes, for the guide."""
    x, y, labels = example()
    return torch.cat([x, 2 * labels - 1], 1), Observation("image", y[:1], Mask(SEEN.bool()), sigma_y=0.1)


@pytest.mark.parametrize("name", MATCHES)
def test_forward_and_backward_derivatives_that_the_guide_takes_are_adjoint(name: str) -> None:
    z0, observation = observed()
    residual = misfit(z0, PAIR, [observation], MATCHES[name])
    moved = z0 + 0.1 * random(*z0.shape, seed=8)
    r, pullback = torch.func.vjp(residual, moved)
    v, w = random(*z0.shape, seed=4), random(*r.shape, seed=5)
    forward = (torch.func.jvp(residual, (moved,), (v,))[1] * w).sum()
    torch.testing.assert_close(forward, (pullback(w)[0] * v).sum())
    assert forward.abs() > 1e-3


@pytest.mark.parametrize("name", MATCHES)
def test_a_short_guided_step_lowers_every_misfit(name: str) -> None:
    z, observation = observed()

    def denoise(z: Tensor, sigma: float) -> Tensor:
        return z / (1 + sigma**2)

    residual = misfit(denoise(z, 0.5), PAIR, [observation], MATCHES[name])
    before = residual(denoise(z, 0.5)).square().sum(1)
    step = guided(denoise, PAIR, [observation], match=MATCHES[name], scale=0.05)
    after = residual(step(z, 0.5)).square().sum(1)
    assert (after < before).all()


@pytest.mark.parametrize("name", MATCHES)
def test_appearance_is_fitted_to_every_sample_alone(name: str) -> None:
    x, y, labels = example()
    both = MATCHES[name](x, y, SEEN, labels)(x, labels)
    for i in (0, 1):
        part = slice(i, i + 1)
        alone = MATCHES[name](x[part], y[part], SEEN, labels[part])(x[part], labels[part])
        torch.testing.assert_close(both[part], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MATCHES)
def test_one_observation_fits_a_batch_of_estimates(name: str) -> None:
    x, y, labels = example()
    one, each = (MATCHES[name](x, values, SEEN, labels)(x, labels) for values in (y[:1], y[:1].expand_as(y)))
    channels = 6 * x.shape[1] if name == "mind" else x.shape[1]
    assert one.shape == (x.shape[0], channels, *x.shape[2:])
    torch.testing.assert_close(one, each)


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


def test_one_intensity_a_label_is_the_mean_of_its_voxels() -> None:
    x, y, _ = example()
    inside = random(2, 1, *SHAPE, seed=3) > 0
    hard = torch.cat([inside, ~inside], 1).double()
    r = match.labels(ridge=0, slope=False)(x, y, SEEN, hard)(x, hard)
    chosen = (inside & (SEEN > 0))[1, 0]
    torch.testing.assert_close(r[1, 0, chosen], y[1, 0, chosen] - y[1, 0, chosen].mean(), rtol=0, atol=1e-6)


# Curves ---------------------------------------------------------------------------------------------------


def even(*shape: int) -> Tensor:
    """Values spread evenly over [-1, 1]."""
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1


@pytest.mark.parametrize("smooth", [1e-4, 100.0])
def test_curve_explains_an_affine_map_however_smooth(smooth: float) -> None:
    x = even(2, 1, 12, 12, 12)
    assert match.curve(9, smooth, trim=0)(x, 3 - 2 * x, torch.ones_like(x), None)(x, None).abs().max() < 1e-4


def test_curve_without_penalty_explains_a_cubic_and_a_stiff_one_cannot() -> None:
    x = even(2, 1, 12, 12, 12)
    y, seen = x**3 - 2 * x, torch.ones_like(x)
    assert match.curve(6, 0.0, trim=0)(x, y, seen, None)(x, None).abs().max() < 1e-5
    assert match.curve(6, 100.0, trim=0)(x, y, seen, None)(x, None).abs().max() > 0.1


def test_curve_is_the_penalised_spline_of_an_independent_library() -> None:
    knots, smooth = 10, 0.01
    x, y, _ = example()
    r = match.curve(knots, smooth, trim=0)(x, y, SEEN, None)(x, None)
    chosen = SEEN[0, 0] > 0
    values, target = x[1, 0, chosen].numpy(), y[1, 0, chosen].numpy()
    position = 1 + (knots - 3) * (values - values.min()) / (values.max() - values.min())
    basis = BSpline.design_matrix(position.clip(1, knots - 2), np.arange(-2.0, knots + 2), 3).toarray()
    bend = np.diff(np.eye(knots), n=2, axis=0)
    control = np.linalg.solve(basis.T @ basis / len(values) + smooth * bend.T @ bend, basis.T @ target / len(values))
    np.testing.assert_allclose(r[1, 0, chosen].numpy(), target - basis @ control, atol=1e-5)


def test_curve_follows_a_tent_that_a_cubic_cannot() -> None:
    x = random(1, 1, 12, 12, 12, seed=0)
    seen, y = torch.ones_like(x), 1 - x.abs()
    curve, cubic = (fit(x, y, seen, None)(x, None).square().mean().sqrt() for fit in (match.curve(), match.poly(3)))
    assert curve < 0.05
    assert curve < cubic / 3


def test_curve_ignores_outliers_of_the_estimate_and_is_constant_beyond_its_range() -> None:
    x = random(1, 1, 12, 12, 12, seed=0)
    seen, y = torch.ones_like(x), torch.sin(2 * x)
    x[0, 0, 0, 0, :3] = 1e4
    residual = match.curve(trim=0.005)(x, y, seen, None)
    assert residual(x, None)[0, 0, 1:].square().mean().sqrt() < 0.1
    beyond = torch.full_like(x, 50.0).requires_grad_()
    r = residual(beyond, None)
    torch.testing.assert_close(r, residual(2 * beyond, None))
    assert not torch.autograd.grad(r.square().sum(), beyond)[0].any()


# Uneven brightness ----------------------------------------------------------------------------------------


def positions() -> tuple[Tensor, Tensor, Tensor]:
    return torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in SHAPE), indexing="ij")


def test_bias_explains_gain_and_offset_that_change_slowly() -> None:
    x, _, labels = example()
    i, j, k = positions()
    y = (2 + i - 0.5 * j * k) * x + k**2 - j
    assert match.bias(2, ridge=0)(x, y, SEEN, labels)(x, labels).abs().max() < 1e-5
    assert match.bias(1, ridge=0)(x, y, SEEN, labels)(x, labels).abs().max() > 0.1


def test_bias_is_the_dense_least_squares_fit() -> None:
    x, y, labels = example()
    r = match.bias(2, ridge=0)(x, y, SEEN, labels)(x, labels)
    p = positions()
    terms = [torch.ones(SHAPE).double(), *p, *(p[a] * p[b] for a in range(3) for b in range(a, 3))]
    chosen = SEEN[0, 0] > 0
    design = torch.stack([*(term * x[1, 1] for term in terms), *terms])[:, chosen].T
    weights = torch.linalg.lstsq(design, y[1, 1, chosen]).solution
    torch.testing.assert_close(r[1, 1, chosen], y[1, 1, chosen] - design @ weights, rtol=0, atol=1e-5)


def test_bias_acts_on_what_its_match_has_mapped() -> None:
    x, _, labels = example()
    y = 2 * x**2 - 1
    assert match.bias(1, match.poly(2, ridge=0), ridge=0)(x, y, SEEN, labels)(x, labels).abs().max() < 1e-4
    assert match.bias(1, ridge=0)(x, y, SEEN, labels)(x, labels).abs().max() > 0.5


# Self-similarity ------------------------------------------------------------------------------------------


def described(values: np.ndarray, seen: np.ndarray, floor: float) -> dict[tuple[int, ...], float]:
    """MIND of one small image by its definition, with patches of 3 × 3 × 3: (axis, side, voxel) to value."""
    steps = {(a, s): tuple(int(a == b) * (2 * s - 1) for b in range(3)) for a in range(3) for s in range(2)}

    def inside(at: tuple[int, ...]) -> bool:
        return all(0 <= i < n for i, n in zip(at, values.shape, strict=True)) and bool(seen[at])

    found = {}
    for voxel in np.ndindex(values.shape):
        distance = {}
        for key, step in steps.items():
            squares = []
            for offset in np.ndindex(3, 3, 3):
                here = tuple(v + o - 1 for v, o in zip(voxel, offset, strict=True))
                there = tuple(h + s for h, s in zip(here, step, strict=True))
                if inside(here) and inside(there):
                    squares.append((values[here] - values[there]) ** 2)
            if squares:
                distance[key] = np.mean(squares)
        scale = np.mean(list(distance.values())) + floor**2 if distance else 1.0
        found |= {(*key, *voxel): float(np.exp(-d / scale)) for key, d in distance.items()}
    return found


def test_mind_is_its_definition() -> None:
    x, y, _ = example()
    r = match.mind(floor=0.2)(x, y, SEEN, None)(x, None).unflatten(1, (2, 6))[1, 1]
    chosen = SEEN[0, 0].numpy() > 0
    of_x, of_y = (described(values[1, 1].numpy(), chosen, 0.2) for values in (x, y))
    table, difference = np.ones((6, *SHAPE)), np.zeros((6, *SHAPE))
    for (axis, side, *voxel), value in of_y.items():
        at = (2 * axis + side, *voxel)
        table[at], difference[at] = value, of_x[(axis, side, *voxel)] - value
    scale = y[1, 1].numpy()[chosen].std() / np.sqrt(table[:, chosen].var(axis=1).sum())
    np.testing.assert_allclose(r.numpy(), scale * difference * chosen, atol=1e-10)


def test_mind_is_blind_to_inversion_and_misses_an_unrelated_image_by_its_contrast() -> None:
    x, y = random(1, 1, 12, 12, 12, seed=0), 2 * random(1, 1, 12, 12, 12, seed=5)
    seen = torch.ones_like(x)
    assert match.mind()(x, 3 - x, seen, None)(x, None).abs().max() < 1e-10
    assert match.mind(floor=1e-6)(x, 3 - 5 * x, seen, None)(x, None).abs().max() < 1e-5
    missed = match.mind()(x, y, seen, None)(x, None).square().sum(1).mean().sqrt()
    assert 0.7 < missed / y.std() < 2


# Mutual information ---------------------------------------------------------------------------------------


def mutual(x: Tensor, y: Tensor) -> float:
    """Mutual information in nats, from a plain histogram."""
    joint, _, _ = np.histogram2d(x.flatten().numpy(), y.flatten().numpy(), bins=16)
    p = joint / joint.sum()
    independent = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    return float((p[p > 0] * np.log(p[p > 0] / independent[p > 0])).sum())


def test_descending_the_joint_likelihood_raises_the_mutual_information() -> None:
    y = random(1, 1, 20, 20, 20, seed=0)
    seen = torch.ones_like(y)
    x = ((y.abs() - 1).tanh() + 0.3 * random(*y.shape, seed=1)).requires_grad_()
    slope = torch.autograd.grad(half_square(match.mutual_information()(x, y, seen, None), x, seen), x)[0]
    assert mutual((x - 0.3 * slope).detach(), y) > mutual(x.detach(), y) + 0.1


def test_joint_histogram_gives_every_seen_voxel_the_window_of_a_cubic_spline() -> None:
    at = torch.tensor([1, 4]).view(1, 1, 2, 1, 1)
    joint = match._histogram(at, 5 - at, torch.tensor([3.0, 0.0]).view_as(at), 6)[0, 0]
    window = torch.tensor([1 / 6, 2 / 3, 1 / 6])
    expected = torch.zeros(6, 6)
    expected[0:3, 3:6] = 3 * window[:, None] * window
    torch.testing.assert_close(joint, expected)


def test_mutual_information_is_blind_to_inversion() -> None:
    x, y, _ = example()
    ours, theirs = (match.mutual_information(8)(x, values, SEEN, None)(x, None) for values in (y, 3 - 2 * y))
    torch.testing.assert_close(2 * ours, theirs)


def test_mutual_information_misses_in_units_of_y() -> None:
    x = 2 * even(1, 1, 30, 30, 30)
    error = 0.5 * random(*x.shape, seed=1)
    inner = x.abs() < 1  # where every y has an x that explains it best
    r = match.mutual_information(32)(x, x + error, torch.ones_like(x), None)(x, None)
    assert r[inner].square().mean().sqrt().item() == pytest.approx(0.5, rel=0.2)
    assert torch.corrcoef(torch.stack([r[inner], error[inner].abs()]))[0, 1] > 0.9


def test_mutual_information_knows_two_intensities_for_one_and_a_curve_does_not() -> None:
    x = 1.5 + even(1, 1, 20, 20, 20) / 2
    y = x * random(*x.shape, seed=1).sign()
    growth = {}
    for name, fit in {"curve": match.curve(), "mutual information": match.mutual_information(48)}.items():
        residual = fit(x, y, torch.ones_like(x), None)
        growth[name] = half_square(residual, x + 0.2, x) / half_square(residual, x, x)
    assert growth["curve"] < 1.1
    assert growth["mutual information"] > 5


def test_splines_need_four_control_points() -> None:
    with pytest.raises(GenMedError, match="knots of the match is 3"):
        match.curve(3)
    with pytest.raises(GenMedError, match="bins of the match is 2"):
        match.mutual_information(2)


def test_labels_need_a_label_field() -> None:
    x, y, _ = example()
    with pytest.raises(ValueError, match="categorical"):
        match.labels()(x, y, SEEN, None)
