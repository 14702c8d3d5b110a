"""Poses that are fitted to a cue, and completion in a toy whose answer is known."""

import math

import numpy as np
import pytest
import torch
from tiny_shapes import ellipsoid_distance
from torch import Tensor

from genmed.cue import Cue, cue_of_labels
from genmed.guide import guided
from genmed.pose import SIGMA, SIZE_SIGMA, Posed, first_poses, sample, sample_slope
from genmed.samplers import euler, schedule
from genmed.shape_model import ShapeModel, ShapePlan, build_shapes_model

SIZE, MODES = 32, 3
RADII = np.array([6.0, 9.0, 12.0])  # voxels


def model(modes: int = MODES) -> ShapeModel:
    """An ellipsoid as the mean shape, and smooth modes; the network is untrained."""
    torch.manual_seed(0)
    plan = ShapePlan("toy", {"kidney": ("left",)}, SIZE, SIZE, modes, 2, 8, 1, math.log(2.0), 0.3)
    made = build_shapes_model(plan)
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    made.autoencoder.mean.copy_(torch.from_numpy(ellipsoid_distance(RADII, points).clip(-4, 4)).flatten())
    waves = np.stack([np.cos(points[..., k] / (6 + 2 * k)) for k in range(3)][:modes])
    made.autoencoder.modes.copy_(torch.from_numpy(waves).flatten(1) / 50)
    made.autoencoder.deviation.fill_(40.0)
    return made


def codes(toy: ShapeModel, batch: int = 1) -> Tensor:
    return torch.zeros(batch, toy.fields.channels, 1, 1, 1)


def seen_ellipsoid(centre_mm: np.ndarray, voxel_mm: float, planes: bool = False) -> Cue:
    """A label map of 1 mm voxels of the toy's mean shape at a pose."""
    points = np.moveaxis(np.indices((80, 80, 80)), 0, -1) - centre_mm
    inside = ellipsoid_distance(RADII * voxel_mm, points) < 0
    seen = np.ones_like(inside)
    if planes:
        seen[:] = False
        seen[int(centre_mm[0]) + 3], seen[:, int(centre_mm[1])], seen[:, :, int(centre_mm[2]) - 4] = True, True, True
    return cue_of_labels(inside, np.eye(4), seen)


def test_sampling_is_exact_for_linear_distances_and_grows_outside() -> None:
    axis = torch.arange(8.0) - 3.5
    volume = (2 * axis[:, None, None] - axis[:, None] + 0.5 * axis + 1).expand(8, 8, 8)[None, None]
    q = torch.rand(1, 50, 3) * 7 - 3.5
    torch.testing.assert_close(sample(volume, q, 8), q @ torch.tensor([2.0, -1.0, 0.5]) + 1, atol=1e-4, rtol=0)
    outside = sample(torch.full((1, 1, 8, 8, 8), 4.0), torch.tensor([[[10.5, 0.0, 0.0]]]), 16)
    assert outside.item() == pytest.approx(4 + 10.5 - 7)  # the last voxel of 8 ends at 7 of 16


def test_slopes_of_samples_are_their_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn(2, 1, 8, 8, 8, generator=generator, dtype=torch.float64)
    q = (14 * torch.rand(2, 40, 3, generator=generator, dtype=torch.float64) - 7) * 1.6  # some lie outside
    q.requires_grad_()
    (exact,) = torch.autograd.grad(sample(volume, q, 16).sum(), q)
    torch.testing.assert_close(sample_slope(volume, q, 16), exact)


def test_sampling_has_the_derivatives_of_a_linear_map() -> None:
    q, x = torch.rand(2, 20, 3) * 10 - 5, torch.randn(2, 1, 6, 6, 6)
    direction = torch.randn_like(x)
    value, forward = torch.func.jvp(lambda x: sample(x, q, 8), (x,), (direction,))
    torch.testing.assert_close(forward, sample(direction, q, 8) - sample(0 * x, q, 8), atol=1e-4, rtol=1e-4)
    pullback = torch.func.vjp(lambda x: sample(x, q, 8), x)[1]
    seed = torch.randn_like(value)
    assert float((pullback(seed)[0] * direction).sum()) == pytest.approx(float((forward * seed).sum()), rel=1e-3)


@pytest.mark.parametrize("planes", [False, True])
def test_the_pose_of_a_moved_and_scaled_ellipsoid_is_found(planes: bool) -> None:
    toy, centre, voxel_mm = model(), np.array([41.3, 37.6, 40.2]), 2.2
    cue = seen_ellipsoid(centre, voxel_mm, planes)
    start = torch.tensor([[45.0, 34.0, 37.0, math.log(1.8)]])
    posed = Posed(toy, cue, start)
    for _ in range(10):
        posed(codes(toy))
    np.testing.assert_allclose(posed.pose[0, :3].numpy(), centre, atol=0.6)
    assert posed.pose[0, 3].exp().item() == pytest.approx(voxel_mm, rel=0.03)
    assert float(posed.misses(toy.autoencoder.decode(torch.zeros(1, MODES))).square().mean()) < 0.1


def test_first_poses_hold_what_was_seen_and_the_first_is_its_box() -> None:
    cue = seen_ellipsoid(np.array([40.0, 40.0, 40.0]), 2.0)
    poses = first_poses(cue, SIZE, 6, seed=1)
    assert torch.equal(poses, first_poses(cue, SIZE, 6, seed=1))
    np.testing.assert_allclose(poses[0, :3].numpy(), cue.box_mm.mean(axis=0), atol=1e-4)
    half = poses[:, 3:].exp().numpy() * SIZE / 2
    assert (poses[:, :3].numpy() - half <= cue.box_mm[0] + 1e-3).all()
    assert (poses[:, :3].numpy() + half >= cue.box_mm[1] - 1e-3).all()


def test_a_size_that_was_never_seen_is_not_believed() -> None:
    toy = model()
    cue = seen_ellipsoid(np.array([40.0, 40.0, 40.0]), 2.0)
    poses = torch.tensor([[40.0, 40, 40, math.log(2.0)], [40.0, 40, 40, math.log(2.0) + 10 * 0.3]])
    assert Posed(toy, cue, poses).knows_size.tolist() == [1.0, 0.0]


def test_points_that_do_not_belong_hardly_move_the_pose_of_a_doubtful_cue() -> None:
    toy, centre = model(), np.array([40.0, 40.0, 40.0])
    sound = seen_ellipsoid(centre, 2.0)
    rng = np.random.default_rng(0)
    extra = centre + np.array([0, 0, 30.0]) + rng.uniform(-5, 5, (600, 3))
    moved = []
    for doubtful in (False, True):
        cue = Cue(
            np.concatenate([sound.points_mm, extra]), np.concatenate([sound.lower_mm, np.full(600, -9.0)]),
            np.concatenate([sound.upper_mm, np.full(600, -1.0)]), sound.box_mm, 1.0, doubtful,
        )  # fmt: skip
        posed = Posed(toy, cue, torch.tensor([[40.0, 40, 40, math.log(2.0)]]))
        for _ in range(8):
            posed(codes(toy))
        apart = (posed.pose[0, :3] - torch.tensor(centre)).norm() + 30 * abs(posed.pose[0, 3] - math.log(2))
        moved.append(float(apart))
    assert moved[1] < moved[0] / 2


def test_guided_completion_of_a_gaussian_is_its_posterior_mean() -> None:
    """Codes N(0, 1), the exact denoiser z / (1 + σ²), a frozen pose and exact values at a few points."""
    toy = model(2)
    points = torch.tensor([[2.0, 7.0, 3.0], [5.0, -3.0, 4.0], [-4.0, 5.0, -6.0]])
    true = torch.tensor([[0.7, -0.9]])
    values = sample(toy.autoencoder.decode(true), points[None], SIZE)[0]
    cue = Cue(points.double().numpy(), values.double().numpy(), values.double().numpy(), np.zeros((2, 3)), 1.0)
    posed = Posed(toy, cue, torch.tensor([[0.0, 0.0, 0.0, 0.0]]), fixed=True)
    assert posed.knows_size.item() == 1.0

    def seen(code: Tensor) -> Tensor:
        return sample(toy.autoencoder.decode(code), points[None], SIZE)[0]

    mean = seen(torch.zeros(1, 2))
    matrix = torch.stack([seen(row) - mean for row in torch.eye(2)[:, None]], dim=1) / SIGMA
    target = (values - mean) / SIGMA
    exact = torch.linalg.solve(matrix.T @ matrix + torch.eye(2), matrix.T @ target)
    size = toy.size_of(torch.tensor(0.0))
    exact_size = size / SIZE_SIGMA**2 / (1 + 1 / SIZE_SIGMA**2)

    def denoise(z: Tensor, sigma: float) -> Tensor:
        return z / (1 + sigma**2)

    z = torch.zeros_like(codes(toy))
    found = euler(guided(denoise, toy.fields, posed, relax=1.0), z, schedule(20.0, 0.02, 100))
    torch.testing.assert_close(found[0, :2].flatten(), exact, atol=0.1, rtol=0.1)
    assert found[0, 2].item() == pytest.approx(float(exact_size), abs=0.15)

