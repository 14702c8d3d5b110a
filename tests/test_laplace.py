"""Suppositions: what a cue is of and where, in closed form; and bounds that shapes are likely to keep."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_shapes import EXTENT_MM, RADII, ellipsoid_distance

from genmed.cue import Cue, cue_of_labels, likely
from genmed.laplace import Objective, component, gauss_newton, placed, spread, suppositions
from genmed.pose import first_poses
from genmed.shape_model import ShapeModel, load_shapes
from genmed.text import embed

STEP_MM = 4.0
GROUPS = [*RADII, *RADII]  # of the mixture's Gaussians: left, right
CENTRE_MM = np.array([30.0, -14.0, 50.0])


@pytest.fixture(scope="module")
def model(tiny_shapes_model: Path) -> ShapeModel:
    return load_shapes(tiny_shapes_model)


def scan_of(category: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The usual structure in a scan with room around it, where it is inside, and true distances in mm."""
    radii = np.array(RADII[category]) * EXTENT_MM[category] / 2
    count = (np.ceil(2.6 * radii / STEP_MM) + 10).astype(int)
    affine = np.diag([STEP_MM, STEP_MM, STEP_MM, 1.0])
    affine[:3, 3] = CENTRE_MM - STEP_MM * (count - 1) / 2
    points = np.moveaxis(np.indices(count), 0, -1) * STEP_MM + affine[:3, 3]
    distance = ellipsoid_distance(radii, points - CENTRE_MM)
    return distance < 0, affine, distance


def planes_of_middle(shape: tuple[int, ...], off: float = 0.1) -> np.ndarray:
    seen = np.zeros(shape, bool)
    for axis, count in enumerate(shape):
        seen[(slice(None),) * axis + (int((0.5 + off) * count),)] = True
    return seen


def true_distances(cue: Cue, category: str) -> np.ndarray:
    return ellipsoid_distance(np.array(RADII[category]) * EXTENT_MM[category] / 2, cue.points_mm - CENTRE_MM)


def test_a_component_decodes_what_the_whole_model_does(model: ShapeModel) -> None:
    for number in range(len(model.mixture.mean)):
        one = component(model, number)
        codes = torch.randn(2, one.plan.modes, generator=torch.Generator().manual_seed(number))
        whole = model.mixture.mean[number, : model.plan.modes] + codes @ spread(model, number).T
        torch.testing.assert_close(one.autoencoder.decode(codes), model.autoencoder.decode(whole), rtol=1e-4, atol=1e-4)
        few = component(model, number, 2)
        longer = torch.nn.functional.pad(codes[:, :2], (0, one.plan.modes - 2))
        torch.testing.assert_close(few.autoencoder.decode(codes[:, :2]), one.autoencoder.decode(longer))


@pytest.mark.parametrize("category", RADII)
def test_what_three_planes_are_of_is_found_and_where(model: ShapeModel, category: str) -> None:
    inside, affine, _ = scan_of(category)
    cue = likely(cue_of_labels(inside, affine, planes_of_middle(inside.shape)))
    found = suppositions(model, cue, None)
    assert [s.evidence for s in found] == sorted(s.evidence for s in found)
    assert GROUPS[found[0].number] == category
    voxel_mm = float(found[0].pose[3].exp())
    assert np.linalg.norm(found[0].pose[:3].numpy() - CENTRE_MM) < 2 * voxel_mm
    assert found[0].shape.shape == (model.plan.modes,)


def test_words_leave_what_they_name(model: ShapeModel) -> None:
    inside, affine, _ = scan_of("kidney")
    cue = likely(cue_of_labels(inside, affine, planes_of_middle(inside.shape)))
    spleen = model.text_of(embed(["left spleen"]))[0]
    named = {[*GROUPS, "anything"][s.number] for s in suppositions(model, cue, spleen)}
    assert "spleen" in named and named <= {"spleen", "anything"}


def test_the_usual_shape_is_placed_where_it_goes_on_unseen(model: ShapeModel) -> None:
    """A quarter of a long structure: its middle lies far outside of what was seen."""
    inside, affine, _ = scan_of("femur")
    seen = np.zeros_like(inside)
    hits = np.flatnonzero(inside.any(axis=(0, 1)))
    seen[:, :, : hits[len(hits) // 4]] = True
    cue = likely(cue_of_labels(inside, affine, seen))
    femur = component(model, GROUPS.index("femur"))
    away = [float(np.linalg.norm(pose[:3].numpy() - CENTRE_MM)) for pose in placed(femur, cue, 0)]
    boxes = [float(np.linalg.norm(pose[:3].numpy() - CENTRE_MM)) for pose in first_poses(cue, femur.plan.size, 1)]
    assert min(away) < 60 < 120 < min(boxes)


def test_evidence_counts_the_room_that_a_pose_has(model: ShapeModel) -> None:
    """The cue lies anywhere in the shape's cube: −2 ln of 1 / voxel³ is 6 ln voxel."""
    inside, affine, _ = scan_of("kidney")
    cue = likely(cue_of_labels(inside, affine, planes_of_middle(inside.shape)))
    kidney = component(model, GROUPS.index("kidney"), 2)
    fit = gauss_newton(kidney, cue, first_poses(cue, kidney.plan.size, 1), torch.zeros(1, 2), 6)
    objective = Objective(kidney, cue, 1.0)
    hessian = torch.logdet(objective.system(fit.codes, fit.poses)[0])
    room = 6 * fit.poses[:, 3] - objective.share(fit.poses).log()
    torch.testing.assert_close(fit.evidence, objective.cost(fit.codes, fit.poses) + hessian + room)


@pytest.mark.parametrize("category", RADII)
def test_likely_bounds_are_narrower_and_seldom_missed(category: str) -> None:
    inside, affine, _ = scan_of(category)
    for off in (0.02, 0.1, 0.17):
        cue = cue_of_labels(inside, affine, planes_of_middle(inside.shape, off))
        narrow = likely(cue)
        assert (narrow.lower_mm >= cue.lower_mm).all() and (narrow.upper_mm <= cue.upper_mm).all()
        assert (narrow.lower_mm <= narrow.upper_mm).all()
        assert ((narrow.upper_mm < cue.upper_mm) | (narrow.lower_mm > cue.lower_mm)).mean() > 0.5
        true, room = true_distances(cue, category), STEP_MM / 2
        assert ((true < narrow.lower_mm - room) | (true > narrow.upper_mm + room)).mean() < 0.15


def test_points_on_a_surface_keep_their_bounds() -> None:
    zero = np.zeros(5)
    cue = Cue(np.eye(5, 3), zero, zero, np.array([[0.0, 0, 0], [1, 1, 1]]), 1.0, doubtful=True)
    narrow = likely(cue)
    assert (narrow.lower_mm == 0).all() and (narrow.upper_mm == 0).all()


def test_a_pose_that_misses_no_bound_is_kept_where_nothing_is_known_of_sizes(model: ShapeModel) -> None:
    points = np.random.default_rng(0).normal(size=(20, 3))
    anything = Cue(points, np.full(20, -1e6), np.full(20, 1e6), np.array([[-1.0] * 3, [1.0] * 3]), 1.0)
    kidney = component(model, 0, 2)
    poses = torch.tensor([[0.0, 0.0, 0.0, -10.0]])  # far from every size in training: no opinion
    fit = gauss_newton(kidney, anything, poses, torch.zeros(1, 2), 2)
    torch.testing.assert_close(fit.poses, poses)
    assert torch.isfinite(fit.evidence).all()
