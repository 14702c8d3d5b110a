"""Operators have exact adjoints, and an observation holds nothing that was not observed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genmed.errors import GenMedError
from genmed.observe import (
    Compose,
    Identity,
    Observation,
    Operator,
    Resample,
    box,
    downsample,
    drop_slices,
    masked,
    planes,
    voxels,
)  # fmt: skip

SHAPE = (6, 8, 5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def resample() -> Resample:
    return Resample((random(3, 6), random(8, 8), random(4, 5)))


OPERATORS: dict[str, Operator] = {
    "identity": Identity(),
    "voxels": voxels(random(*SHAPE) > 0),
    "planes": planes(SHAPE, x=[1], y=[0, 7], z=[4]),
    "box": box(SHAPE, (1, 2, 0), (4, 6, 5)),
    "outside a box": box(SHAPE, (1, 2, 0), (4, 6, 5), inside=False),
    "dropped slices": drop_slices(SHAPE, 2, [1, 2]),
    "downsample": downsample(SHAPE, (2, 1, 2.5)),
    "resample": resample(),
    "slices of a resampled stack": masked(downsample(SHAPE, (1, 1, 2.5)), random(6, 8, 2) > 0),
    "any matrices, masked": masked(resample(), random(3, 8, 4) > 0),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoint_of_every_operator(name: str) -> None:
    operator = OPERATORS[name]
    x = random(2, 3, *SHAPE)
    y = random(*operator(x).shape, seed=1)
    torch.testing.assert_close((operator(x) * y).sum(), (x * operator.adjoint(y)).sum())


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.floats(1, 5)] * 3))
def test_adjoint_of_downsampling_by_any_factor(shape: tuple[int, ...], factors: tuple[float, ...]) -> None:
    operator = downsample(shape, factors)
    x = random(1, 1, *shape)
    y = random(*operator(x).shape, seed=1)
    torch.testing.assert_close((operator(x) * y).sum(), (x * operator.adjoint(y)).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_zero_where_it_sees_nothing(name: str) -> None:
    operator = OPERATORS[name]
    y = operator(random(2, 3, *SHAPE))
    assert not y[~operator.seen.expand_as(y)].any()


@pytest.mark.parametrize("name", OPERATORS)
def test_values_outside_the_mask_change_no_byte(name: str) -> None:
    operator = OPERATORS[name]
    y = operator(random(1, 1, *SHAPE))
    clean = Observation("image", y, operator)
    for rubbish in (1e30, float("nan"), float("inf")):
        soiled = torch.where(operator.seen.expand_as(y), y, torch.full_like(y, rubbish))
        assert Observation("image", soiled, operator).y.numpy().tobytes() == clean.y.numpy().tobytes()


def test_observation_does_not_touch_the_array_it_was_given() -> None:
    y = random(1, 1, *SHAPE)
    before = y.clone()
    Observation("image", y, planes(SHAPE, x=[1]))
    assert torch.equal(y, before)


def test_downsampling_averages() -> None:
    x = random(1, 1, 8, 4, 4)
    expected = x.view(1, 1, 4, 2, 2, 2, 1, 4).mean(dim=(3, 5, 7))
    torch.testing.assert_close(downsample((8, 4, 4), (2, 2, 4))(x), expected[..., :1])


def test_planes_box_and_dropped_slices_see_what_they_say() -> None:
    assert planes(SHAPE, x=[1], z=[0, 2]).seen.sum() == 8 * 5 + 2 * 6 * 8 - 2 * 8
    assert box(SHAPE, (1, 2, 0), (4, 6, 5)).seen.sum() == 3 * 4 * 5
    assert drop_slices(SHAPE, 2, [1, 2]).seen[0, 0, 0, 0].tolist() == [True, False, False, True, True]


def test_composition_applies_the_first_operator_first() -> None:
    x, coarse, seen = random(1, 2, *SHAPE), downsample(SHAPE, (2, 2, 1)), random(3, 4, 5) > 0
    torch.testing.assert_close(Compose(coarse, voxels(seen))(x), coarse(x) * seen)


@pytest.mark.parametrize(
    ("y", "operator", "sigma_y", "message"),
    [
        (torch.zeros(1, 1, *SHAPE), Identity(), 0.0, "sigma_y"),
        (torch.zeros(1, 1, *SHAPE), planes(SHAPE), 0.1, "no voxel"),
        (torch.full((1, 1, *SHAPE), torch.nan), Identity(), 0.1, "not finite"),
    ],
)
def test_bad_observation_says_what_is_wrong(y: Tensor, operator: Operator, sigma_y: float, message: str) -> None:
    with pytest.raises(GenMedError, match=message):
        Observation("image", y, operator, sigma_y)
