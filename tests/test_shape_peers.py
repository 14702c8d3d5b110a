"""Peers that complete shapes: exact answers, and nothing seen of what was not shown."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from test_shape import dice
from tiny_shapes import RADII, ellipsoid, ellipsoid_distance, write_shapes

from genmed.bench import shape_conditioned
from genmed.bench.cues import KINDS, draw_cue
from genmed.bench.shape_conditioned import (
    GUIDANCE,
    UNSEEN,
    Conditioned,
    ConditionedLoss,
    Network,
    conditioned,
    draw_batch,
    drawn_cues,
    in_box,
    in_world,
    picture_of,
    version_of,
)
from genmed.bench.shape_peers import (
    Interpolation,
    PcaSettings,
    Statistical,
    gaussian_model,
    missed_by,
    nearest,
    statistical,
    truncated,
)
from genmed.cue import Cue, cue_of_labels, spline, thinned, with_sides
from genmed.data.shapes import ShapeDataset, read_shapes
from genmed.errors import GenMedError
from genmed.laplace import Objective, gauss_newton
from genmed.nets.autoencoder import principal_components
from genmed.pose import Posed, first_poses
from genmed.shape import Shape, decode, encode
from genmed.shape_model import ShapeModel, ShapePlan, build_shapes_model
from genmed.tasks.complete import Completion
from genmed.train_shapes import versions
from genmed.volume import Grid

SIDE = 32


def ellipsoids(count: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Distances of kidneys of the tiny set, and the logarithms of their voxels."""
    rng = np.random.default_rng(seed)
    made = [ellipsoid(np.array(RADII["kidney"]) * np.exp(rng.normal(0, 0.15, 3)) * 55, SIDE) for _ in range(count)]
    return torch.from_numpy(np.stack([decode(sdf) for sdf, _ in made]))[:, None], np.log([mm for _, mm in made])


@pytest.fixture(scope="module")
def gaussian() -> ShapeModel:
    x, log_mm = ellipsoids(14)
    return gaussian_model(x, log_mm, torch.ones(len(x)), SIDE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShapeDataset:
    return read_shapes(write_shapes(tmp_path_factory.mktemp("shapes") / "set"))


def overlap(found: tuple[Shape, ...], truth: Shape) -> float:
    inside = Completion(found, 0.0, None, 0.0, 0).distance_mm(truth.grid) < 0
    return dice(inside, truth.sdf < 0)


def whole_cue(shape: Shape, seen: np.ndarray | None = None) -> Cue:
    return cue_of_labels(shape.sdf < 0, shape.grid.affine, seen)


def exact_cue(shape: Shape) -> Cue:
    """The signed distance itself, wherever it is not truncated."""
    near = np.argwhere(np.abs(shape.distance) < 3)
    d = shape.distance[tuple(near.T)] * shape.voxel_mm
    return replace(whole_cue(shape), points_mm=near * shape.voxel_mm + shape.origin_mm, lower_mm=d, upper_mm=d)


def kidney(centre: tuple[float, float, float] = (30.0, -12.0, 5.0)) -> Shape:
    sdf, voxel_mm = ellipsoid(np.array(RADII["kidney"]) * np.array([1.1, 0.9, 1.0]) * 55, SIDE)
    return Shape(sdf, voxel_mm, centre)


def lopsided(shape: Shape) -> Shape:
    """The shape without most of its half of high x."""
    x = np.indices(shape.sdf.shape)[0] - (len(shape.sdf) / 2 + 0.5)
    return replace(shape, sdf=encode(np.maximum(shape.distance, x)))


# Statistical models ---------------------------------------------------------------------------------------


def test_a_shape_of_the_pca_space_is_given_back_from_a_dense_cue(gaussian: ShapeModel) -> None:
    codes = torch.randn(3, gaussian.plan.modes, generator=torch.Generator().manual_seed(1))
    for volume in gaussian.autoencoder.decode(codes):
        truth = Shape(encode(volume[0].numpy()), 3.7, (-40.0, 10.0, 25.0))
        found = Statistical({("", ""): gaussian}, PcaSettings(prior=0.01)).complete(exact_cue(truth), None)
        assert overlap(found, truth) > 0.985
        rough = Statistical({("", ""): gaussian}, PcaSettings()).complete(whole_cue(truth), None)
        assert overlap(rough, truth) > 0.9  # voxels know the surface to half of one


def test_a_step_of_gauss_newton_never_makes_the_fit_worse(gaussian: ShapeModel) -> None:
    cue = thinned(whole_cue(kidney()), 300, 0)
    poses = first_poses(cue, SIDE, 3)
    zero = torch.zeros(3, gaussian.plan.modes)
    costs = [gauss_newton(gaussian, cue, poses, zero, steps).cost for steps in (0, 2, 6)]
    assert (costs[1] <= costs[0]).all() and (costs[2] <= costs[1]).all() and (costs[2] < costs[0]).any()


def test_steps_of_the_pose_alone_are_those_of_the_whole_system(gaussian: ShapeModel) -> None:
    for cue in (thinned(whole_cue(kidney()), 300, 0), draw_cue(kidney(), "redundant", 0)):
        objective = Objective(gaussian, cue, 1.0)
        poses, k = first_poses(cue, SIDE, 3), gaussian.plan.modes
        codes = torch.randn(3, k, generator=torch.Generator().manual_seed(0))
        hessian, slope = objective.system(codes, poses)
        small, by_pose = objective.system(codes, poses, posing=True)
        assert small.shape == (3, 4, 4) and hessian.shape == (3, k + 4, k + 4)
        torch.testing.assert_close(small, hessian[:, k:, k:], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(by_pose, slope[:, k:], rtol=1e-4, atol=1e-3)


def test_the_size_that_a_category_expects_counts_for_it(gaussian: ShapeModel) -> None:
    """−2 ln of a Gaussian density has ln of its variance: the tighter one is likelier in its middle."""
    truth = kidney()
    cue = thinned(whole_cue(truth), 800, 0)
    pose = torch.tensor([[*np.array(truth.origin_mm) + truth.voxel_mm * (SIDE - 1) / 2, np.log(truth.voxel_mm)]])
    fits = []
    for deviation in (0.1, 0.4):
        plan = replace(gaussian.plan, size_mean=float(pose[0, 3]), size_deviation=deviation)
        codes = torch.zeros(1, gaussian.plan.modes)
        fits.append(gauss_newton(replace(gaussian, plan=plan), cue, pose.float(), codes, 6))
    hessians = [torch.logdet(Objective(fit.model, cue, 1.0).system(fit.codes, fit.poses)[0]) for fit in fits]
    parts = [float(fit.cost + hessian) for fit, hessian in zip(fits, hessians, strict=True)]
    found = float(fits[0].evidence - fits[1].evidence) - (parts[0] - parts[1])
    assert found == pytest.approx(2 * np.log(0.1 / 0.4), abs=1e-2)
    assert float(fits[0].evidence) < float(fits[1].evidence)


def test_a_size_without_an_opinion_has_no_normaliser(gaussian: ShapeModel) -> None:
    cue = thinned(whole_cue(kidney()), 300, 0)
    far = replace(gaussian.plan, size_mean=gaussian.plan.size_mean + 100)
    fits = [gauss_newton(replace(gaussian, plan=replace(far, size_deviation=d)), cue, first_poses(cue, SIDE, 1),
                         torch.zeros(1, gaussian.plan.modes), 2) for d in (0.1, 0.4)]  # fmt: skip
    assert float(fits[0].evidence) == pytest.approx(float(fits[1].evidence)) and fits[0].evidence.isfinite().all()


def test_fewer_modes_are_the_first_ones(gaussian: ShapeModel) -> None:
    few = truncated(gaussian, 2)
    codes = torch.tensor([[0.5, -1.0]])
    longer = torch.nn.functional.pad(codes, (0, gaussian.plan.modes - 2))
    torch.testing.assert_close(few.autoencoder.decode(codes), gaussian.autoencoder.decode(longer))
    assert truncated(gaussian, 500) is gaussian


def test_the_right_category_is_found_among_all(data: ShapeDataset) -> None:
    models = statistical(data, sided=False)
    assert set(models.models) == {("kidney", ""), ("femur", ""), ("spleen", ""), ("", "")}
    for i in data.part("tune"):
        truth = data.shape(i)
        found = models.complete(whole_cue(truth), None)
        assert overlap(found, truth) > 0.85, data.ids[i]


def test_points_of_a_surface_get_bounds_on_either_side(gaussian: ShapeModel) -> None:
    truth = kidney()
    cue = draw_cue(truth, "noisy points", 3)
    sided = with_sides(cue)
    new = slice(len(cue.points_mm), None)
    index = np.rint((sided.points_mm[new] - truth.origin_mm) / truth.voxel_mm).astype(int).clip(0, SIDE - 1)
    sign = np.where(truth.sdf[tuple(index.T)] < 0, -1, 1)
    exact = sign * cKDTree(truth.to_mesh().vertices).query(sided.points_mm[new])[0]
    inside = sided.upper_mm[new] <= 0
    assert inside.any() and (~inside).any() and (inside == (exact < 0)).mean() > 0.95
    assert ((sided.lower_mm[new] <= exact) & (exact <= sided.upper_mm[new])).mean() > 0.85
    found = Statistical({("", ""): gaussian}, PcaSettings(prior=3.0)).complete(cue, None)
    assert overlap(found, truth) > 0.85
    dense = whole_cue(truth)
    assert with_sides(dense) is dense


# Interpolation and the nearest shape ----------------------------------------------------------------------


def test_interpolation_gives_back_an_ellipsoid_from_dense_planes() -> None:
    radii, index = np.array([10.0, 12.0, 15.0]), np.moveaxis(np.indices((40, 40, 40)), 0, -1)
    inside = ellipsoid_distance(radii, index - [19.3, 20.1, 19.8]) < 0
    seen = np.zeros_like(inside)
    seen[:, :, ::3] = True
    found = Interpolation().complete(cue_of_labels(inside, np.eye(4), seen), None)
    grid = Grid((40, 40, 40), np.eye(4))
    assert dice(Completion(found, 0.0, None, 0.0, 0).distance_mm(grid) < 0, inside) > 0.95


def test_interpolation_meets_what_was_seen() -> None:
    cue = whole_cue(kidney(), np.indices((SIDE,) * 3)[2] % 4 == 0)
    values = spline(cue)(cue.points_mm)
    sure = np.maximum(np.abs(cue.lower_mm), np.abs(cue.upper_mm)) > cue.voxel_mm
    assert ((values < 0) == (cue.upper_mm <= 0))[sure].mean() > 0.99


def test_a_training_shape_is_its_own_nearest(data: ShapeDataset) -> None:
    peer = nearest(data)
    for i in data.part("train")[::7]:
        moved = Shape(data.stored(i), data.rows[i].voxel_mm, (400.0, -30.0, 7.0))
        (found,) = peer.complete(whole_cue(moved), None)
        assert overlap((found,), moved) > 0.9
        told = peer.complete(whole_cue(moved), (data.rows[i].category, "left"))
        np.testing.assert_array_equal(told[0].sdf, found.sdf)


def test_the_mirror_image_of_a_training_shape_is_found(data: ShapeDataset, tmp_path: Path) -> None:
    """Of left shapes that are lopsided, the right ones are found, and the shapes themselves as they are."""
    odd = write_shapes(tmp_path / "set")
    path = odd / "shards" / "0000.npy"
    np.save(path, np.stack([lopsided(data.shape(i)).sdf for i in range(len(data))]))
    peer = nearest(read_shapes(odd))
    for i in peer.data.part("train")[::9]:
        for sdf in (peer.data.stored(i), peer.data.stored(i)[::-1]):
            truth = Shape(sdf.copy(), peer.data.rows[i].voxel_mm, (40.0, -30.0, 7.0))
            (found,) = peer.complete(whole_cue(truth), None)
            sides = [np.argwhere(shape.sdf < 0)[:, 0].mean() < 7.5 for shape in (found, truth)]
            assert overlap((found,), truth) > 0.85 and sides[0] == sides[1]


def test_shapes_without_a_side_have_no_mirror_image(data: ShapeDataset) -> None:
    sides = tuple(replace(row, side="left" if row.category == "kidney" else "") for row in data.rows)
    peer = nearest(replace(data, rows=sides))
    turned = [peer.data.rows[i].category for i, mirrored in zip(peer.numbers, peer.mirrored, strict=True) if mirrored]
    assert len(turned) == 10 and set(turned) == {"kidney"} and len(peer.numbers) == 40


def test_a_large_pose_does_not_make_a_miss_smaller() -> None:
    cue = whole_cue(kidney())
    x = torch.from_numpy(kidney().distance)[None, None].expand(2, -1, -1, -1, -1)
    centre = first_poses(cue, SIDE, 1)[0]
    poses = torch.stack([centre, centre + torch.tensor([0.0, 0.0, 0.0, 1.0])])
    far = replace(cue, points_mm=cue.points_mm * 0 + 1e4, lower_mm=cue.lower_mm * 0, upper_mm=cue.upper_mm * 0)
    posed = Posed(gaussian_model(*ellipsoids(3), torch.ones(3), SIDE), far, poses)
    small, large = missed_by(posed, x, poses)
    assert float(large / small) == pytest.approx(1.0, rel=0.05)  # in mm, the point is as far from either


# The conditioned diffusion --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(data: ShapeDataset) -> ShapeModel:
    """An untrained model of ours: the peer takes its autoencoder and its size."""
    x = torch.stack([torch.from_numpy(data.sdf(i)) for i in data.part("train")])[:, None]
    autoencoder = principal_components(x.flatten(1).clone(), torch.ones(len(x)), 12)
    plan = ShapePlan("tiny", {"kidney": ("left",)}, 16, 16, len(autoencoder.modes), 4, 64, 2, 2.0, 0.7, batch=48)
    model = build_shapes_model(plan)
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    return model


@pytest.fixture(scope="module", autouse=True)
def coarse_pictures() -> Iterator[None]:
    """Pictures of cues as coarse as these shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape_conditioned, "SIDE", 16)
        yield


@pytest.fixture(scope="module")
def peer(data: ShapeDataset, ours: ShapeModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Conditioned, Path]:
    folder = tmp_path_factory.mktemp("runs") / "conditioned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape_conditioned, "TRAINING_STEPS", 250)
        return conditioned(data, ours, folder, 10.0, lambda peer: -peer.guidance, version=2, count=240), folder


def test_a_trained_peer_completes_and_is_not_trained_again(
    peer: tuple[Conditioned, Path], data: ShapeDataset, ours: ShapeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, folder = peer
    assert trained.steps == 250 and trained.guidance == 1.0
    truth = data.shape(data.part("tune")[0])
    cue = draw_cue(truth, "box missing", 0)
    found = trained.complete(cue, 2)
    untrained = Network(torch.ones(ours.plan.modes), ours.plan.width, ours.plan.blocks).eval()
    blank = Conditioned(ours, untrained, 1.0, 0.0, 0, "")
    assert overlap(found, truth) > max(0.5, overlap(blank.complete(cue, 2), truth))
    assert overlap(trained.complete(cue, 2, gp=True), truth) > overlap(found, truth)
    monkeypatch.setattr(shape_conditioned, "fit", None)
    again = conditioned(data, ours, folder, 10.0, lambda peer: 1 / 0, version=2, count=240)
    assert again.sha256 == trained.sha256
    np.testing.assert_array_equal(again.complete(cue, 2)[1].sdf, found[1].sdf)


def test_a_training_that_ended_before_its_guidance_was_chosen_is_not_repeated(
    data: ShapeDataset, ours: ShapeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shape_conditioned, "TRAINING_STEPS", 3)
    asked: list[float] = []

    def killed(peer: Conditioned) -> float:
        asked.append(peer.guidance)
        if len(asked) == 3:  # the trained weights first, then each guidance
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        conditioned(data, ours, tmp_path, 10.0, killed, version=2, count=12)
    assert asked == [GUIDANCE[0], *GUIDANCE[:2]]
    weights = (tmp_path / "weights.safetensors").read_bytes()
    monkeypatch.setattr(shape_conditioned, "draw_batch", None)
    assert conditioned(data, ours, tmp_path, 10.0, lambda peer: peer.guidance, version=2, count=12).guidance == 3.0
    assert (tmp_path / "weights.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sha256": "another"}, "other shapes or another model"),
        ({"minutes": 40.0}, "trained for 10 minutes, not 40"),
        ({"version": 3}, "another version"),
        ({"count": 12}, "another version"),
    ],
)
def test_a_peer_of_something_else_is_refused(
    peer: tuple[Conditioned, Path], data: ShapeDataset, ours: ShapeModel, changed: dict, words: str
) -> None:
    asked = {"sha256": ours.sha256, "minutes": 10.0, "version": 2, "count": 240} | changed
    model = replace(ours, sha256=asked["sha256"])
    with pytest.raises(GenMedError, match=words) as caught:
        conditioned(data, model, peer[1], asked["minutes"], lambda peer: 0.0, version=asked["version"],
                    count=asked["count"])  # fmt: skip
    assert "\n" not in str(caught.value) and "--runs" in str(caught.value)


def test_a_peer_from_before_versions_is_refused(data: ShapeDataset, ours: ShapeModel, tmp_path: Path) -> None:
    of = {"index": shape_conditioned.sha256_of(data.folder / "index.parquet"), "model": ours.sha256}
    (tmp_path / "training.json").write_text(json.dumps({"of": of, "minutes": 9.0, "steps": 5, "guidance": 1.0}))
    with pytest.raises(GenMedError, match="another version"):
        conditioned(data, ours, tmp_path, 10.0, lambda peer: 0.0, version=2)


def test_the_best_weights_are_kept_and_looking_for_them_costs_no_training(
    data: ShapeDataset, ours: ShapeModel, tmp_path: Path
) -> None:
    now, weights = [0.0], []

    def clock() -> float:
        now[0] += 0.01
        return now[0]

    def score(peer: Conditioned) -> float:
        now[0] += 7.0
        weights.append(peer.network.state_dict())
        return -(float(len(weights) - 2) ** 2)  # the second look is the best

    found = conditioned(data, ours, tmp_path, 1.0, score, version=2, count=12, clock=clock)
    curve = [json.loads(line)["dice"] for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert curve[:4] == [-1.0, 0.0, -1.0, -4.0]
    assert found.steps > 20 and found.minutes == pytest.approx(1.0, abs=0.05)
    for name, tensor in found.network.state_dict().items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=0)
    assert any(not torch.equal(weights[1][name], weights[3][name]) for name in weights[1])


@pytest.mark.parametrize("kind", ["one plane", "redundant"])
def test_with_a_gaussian_process_the_draws_that_miss_least_are_kept(
    peer: tuple[Conditioned, Path], data: ShapeDataset, kind: str
) -> None:
    cue = draw_cue(data.shape(data.part("tune")[0]), kind, 0)
    drawn, kept = peer[0].complete(cue, 2 * shape_conditioned.DRAWN), peer[0].complete(cue, 2, gp=True)
    costs = []
    for shape in drawn:
        centre = np.array(shape.origin_mm) + shape.voxel_mm * 7.5
        pose = torch.from_numpy(np.append(centre, np.log(shape.voxel_mm))).float()[None]
        volume = torch.from_numpy(shape.distance)[None, None]
        missed = (Posed(peer[0].model, cue, pose).misses(volume) * shape.voxel_mm) ** 2
        unit_mm = np.mean([other.voxel_mm for other in drawn])
        missed = missed / unit_mm**2
        costs.append(float((missed.log1p() if cue.doubtful else missed).sum()))
    best = np.argsort(costs)[:2]
    assert [shape.voxel_mm for shape in kept] == pytest.approx([drawn[k].voxel_mm for k in best])
    assert len(peer[0].complete(cue, 2)) == len(kept) == 2 and min(best) + max(best) != 1


def test_noisy_points_get_sides_before_they_are_honoured(
    peer: tuple[Conditioned, Path], data: ShapeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    cue = draw_cue(data.shape(data.part("tune")[0]), "noisy points", 0)
    cues: list[Cue] = []
    monkeypatch.setattr(
        shape_conditioned, "Posed", lambda model, cue, poses: cues.append(cue) or Posed(model, cue, poses)
    )
    peer[0].complete(cue, 1, gp=True, seed=3)
    assert len(cues) == 1
    np.testing.assert_array_equal(cues[0].points_mm, with_sides(cue, 3).points_mm)
    assert len(cues[0].points_mm) > len(cue.points_mm)


def test_copies_are_those_of_our_training() -> None:
    x, _ = ellipsoids(3)
    for number in (0, 1, 11):
        for i, every in enumerate(versions(x, number, 5)):
            assert torch.equal(version_of(x[i], i, number, 5), every)


def test_a_mirrored_cue_is_the_cue_of_the_mirrored_shape(data: ShapeDataset) -> None:
    shape = lopsided(data.shape(0))
    seen = np.indices(shape.sdf.shape)[1] < 9
    other = replace(shape, sdf=shape.sdf[::-1].copy())
    one, two = whole_cue(shape, seen), whole_cue(other, seen)
    np.testing.assert_array_equal(picture_of(two), picture_of(one)[::-1])
    np.testing.assert_allclose(in_box(two, other), in_box(one, shape) * [-1, 1, 1, 1], atol=1e-9)
    codes = torch.arange(6.0).view(3, 2)
    cues = {
        "codes": codes, "mirrored": torch.cat([-codes[:2], torch.full((1, 2), torch.nan)]),
        "pose": torch.from_numpy(in_box(one, shape)).float().expand(3, 4),
        "picture": torch.from_numpy(picture_of(one)).expand(3, -1, -1, -1), "facts": torch.zeros(3, 2),
    }  # fmt: skip
    batch = draw_batch(cues, 600, 0, 0)
    turned = (batch.codes < 0).any(dim=1)
    assert 0.25 < turned.float().mean() < 0.42 and not batch.codes.isnan().any()  # two of three shapes, half of them
    torch.testing.assert_close(batch.pose[turned][0], torch.from_numpy(in_box(two, other)).float())
    np.testing.assert_array_equal(batch.picture[turned][0], picture_of(two))
    np.testing.assert_array_equal(batch.picture[~turned][0], picture_of(one))


def test_only_left_and_right_are_mirrored(data: ShapeDataset, ours: ShapeModel, tmp_path: Path) -> None:
    sides = tuple(replace(row, side="" if row.category == "femur" else row.side) for row in data.rows)
    cues = drawn_cues(replace(data, rows=sides), ours, tmp_path / "cues.safetensors", 24)
    alike = cues["mirrored"].isnan().all(dim=1)
    assert 0 < alike.sum() < len(alike) and not cues["mirrored"][~alike].isnan().any()


def test_a_box_and_back(data: ShapeDataset) -> None:
    shape = data.shape(3)
    for kind in KINDS:
        cue = draw_cue(shape, kind, 1)
        pose = in_world(torch.from_numpy(in_box(cue, shape))[None].float(), cue, data.size)[0]
        centre = np.array(shape.origin_mm) + shape.voxel_mm * (data.size - 1) / 2
        np.testing.assert_allclose(pose[:3], centre, atol=0.02)
        assert pose[3].exp().item() == pytest.approx(shape.voxel_mm, rel=1e-4)


def test_a_picture_shows_sides_and_what_was_not_seen(data: ShapeDataset) -> None:
    shape = data.shape(0)
    whole, part = (picture_of(whole_cue(shape, seen)) for seen in (None, np.indices((16,) * 3)[0] < 8))
    assert (whole != UNSEEN).sum() > 1.5 * (part != UNSEEN).sum()
    values = whole[whole != UNSEEN]
    assert values.min() < -16 and values.max() == 64
    assert abs(int(whole[8, 8, 8])) <= 64 and whole[8, 8, 8] < 0


def test_an_untrained_peer_is_the_wiener_filter_of_every_code() -> None:
    deviations = torch.tensor([10.0, 1.0, 0.1])
    network, z, sigma = Network(deviations, 32, 1), torch.randn(2, 7), torch.tensor([0.5, 3.0])
    blank = network.encoded(torch.full((2, 16, 16, 16), UNSEEN), torch.zeros(2, 2), torch.zeros(2))
    square = torch.cat([deviations, torch.ones(4)]) ** 2
    torch.testing.assert_close(network(z, sigma, blank), square / (square + sigma[:, None] ** 2) * z)


def test_the_cue_is_dropped_as_often_as_said(data: ShapeDataset, ours: ShapeModel, tmp_path: Path) -> None:
    cues = drawn_cues(data, ours, tmp_path / "cues.safetensors", 24)
    network = Network(torch.ones(ours.plan.modes), 32, 1)
    seen: list[torch.Tensor] = []
    network.encoded = lambda picture, facts, shown: seen.append(shown) or torch.zeros(len(shown), 259)  # type: ignore
    for step in range(20):
        ConditionedLoss(network, 40.0)(draw_batch(cues, 100, step, 0))
    assert 0.07 < 1 - float(torch.cat(seen).mean()) < 0.13
    first, again = (draw_batch(cues, 9, 4, 0) for _ in range(2))
    assert torch.equal(first.picture, again.picture) and first.seed == again.seed


# All of them ----------------------------------------------------------------------------------------------


def test_what_was_not_seen_changes_no_answer(
    data: ShapeDataset, peer: tuple[Conditioned, Path], gaussian: ShapeModel
) -> None:
    shape = data.shape(data.part("tune")[0])
    inside, seen = shape.sdf < 0, np.zeros((16,) * 3, bool)
    seen[7], seen[:, 8], seen[:, :, 6] = True, True, True
    garbage = np.where(seen, inside, np.random.default_rng(0).random((16,) * 3) < 0.5)
    first, other = (cue_of_labels(each, shape.grid.affine, seen) for each in (inside, garbage))
    assert (garbage != inside).any()
    near, models, network = nearest(data), statistical(data, sided=True), peer[0]
    for complete in (
        lambda cue: Interpolation().complete(cue, None),
        lambda cue: near.complete(cue, None),
        lambda cue: models.complete(cue, ("kidney", "left")),
        lambda cue: models.complete(cue, None),
        lambda cue: network.complete(cue, 2, gp=True),
    ):
        for a, b in zip(complete(first), complete(other), strict=True):
            np.testing.assert_array_equal(a.sdf, b.sdf)
            assert a.origin_mm == b.origin_mm and a.voxel_mm == b.voxel_mm
