from collections import Counter

import pytest
import torch
from tiny import tiny_denoiser
from torch import Generator

from genmed.fields import image_and_label
from genmed.loss import (
    MIXTURE,
    Batch,
    JointLoss,
    categorical_loss,
    continuous_loss,
    draw_modes,
    draw_sigma,
    random_region,
)

SIZE = torch.Size((6, 8, 10))


def test_modes_come_in_the_proportions_of_the_mixture() -> None:
    generator = Generator().manual_seed(0)
    found = Counter(mode for _ in range(500) for mode in draw_modes(4, generator))
    for mode, share in MIXTURE.items():
        assert found[mode] / 2000 == pytest.approx(share, abs=0.03)


def test_every_pair_holds_a_conditional_sample() -> None:
    generator = Generator().manual_seed(0)
    assert all(draw_modes(2, generator).count("conditional") >= 1 for _ in range(50))


def test_modes_set_the_noise_levels_they_are_named_after() -> None:
    generator = Generator().manual_seed(0)
    for _ in range(50):
        clean, hidden = draw_sigma("conditional", SIZE, 40.0, generator)
        assert clean.max() == 0 and hidden.min() == hidden.max() > 0
        image, label = draw_sigma("equal", SIZE, 40.0, generator)
        assert torch.equal(image, label) and image.min() == image.max()
        image, label = draw_sigma("independent", SIZE, 40.0, generator)
        assert image.min() == image.max() > 0 and label.min() == label.max() > 0
        partly = draw_sigma("partial", SIZE, 40.0, generator)
        assert 0 < int((partly == 0).sum()) < partly.numel()
        assert len(partly.unique()) == 2


def test_regions_leave_something_to_see_and_something_to_guess() -> None:
    generator = Generator().manual_seed(0)
    shares = torch.tensor([random_region(SIZE, generator).float().mean() for _ in range(200)])
    assert shares.min() > 0
    assert (shares < 1).float().mean() > 0.95
    assert shares.min() < 0.2 and shares.max() > 0.8


def test_continuous_loss_is_the_weighted_error_over_noisy_voxels_in_the_scan() -> None:
    target, estimate = torch.zeros(1, 1, 1, 1, 4), torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 1, 4)
    sigma = torch.tensor([2.0, 1.0, 0.0, 1.0]).reshape(1, 1, 1, 1, 4)
    inside = torch.tensor([1.0, 1.0, 1.0, 0.0]).reshape(1, 1, 1, 1, 4)
    assert continuous_loss(estimate, target, sigma, inside).item() == pytest.approx((1 * 5 / 4 + 4 * 2) / 2)


def test_categorical_loss_vanishes_for_the_truth_only() -> None:
    label = torch.randint(3, (2, 4, 4, 4), generator=Generator().manual_seed(0))
    truth = 50 * torch.nn.functional.one_hot(label, 3).movedim(-1, 1).float()
    inside = torch.ones(2, 1, 4, 4, 4)
    assert categorical_loss(truth, label, inside).item() == pytest.approx(0, abs=1e-3)
    assert categorical_loss(truth.roll(1, dims=1), label, inside).item() > 1


def test_the_loss_is_a_function_of_the_batch_and_its_seed() -> None:
    torch.manual_seed(0)
    objective = JointLoss(tiny_denoiser(image_and_label(("T1",), ("background", "front"))))
    generator = Generator().manual_seed(3)
    image = torch.randn(2, 1, *SIZE, generator=generator)
    label = torch.randint(2, (2, *SIZE), generator=generator)
    inside = torch.ones(2, 1, *SIZE)
    first, again, other = (objective(Batch(image, label, inside, seed))["loss"] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_lies_beyond_the_scan_does_not_count() -> None:
    torch.manual_seed(0)
    objective = JointLoss(tiny_denoiser(image_and_label(("T1",), ("background", "front"))))
    inside = torch.ones(1, 1, *SIZE)
    inside[..., 7:] = 0
    label = torch.zeros(1, *SIZE, dtype=torch.long)
    label[:, 2:4] = 1
    changed = torch.where(inside[:, 0] > 0, label, 1)
    generator = Generator().manual_seed(3)
    image = torch.randn(1, 1, *SIZE, generator=generator)
    equal = next(s for s in range(100) if draw_modes(1, Generator().manual_seed(s)) == ["equal"])
    losses = [objective(Batch(image, y, inside, equal))["loss"] for y in (label, changed)]
    torch.testing.assert_close(losses[0], losses[1])
