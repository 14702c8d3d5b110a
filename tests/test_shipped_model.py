"""The bundled models: of scans on real ones of the tune part, where `GENMED_DATA` names the folder of public sets."""

from pathlib import Path
from typing import Any

import numpy as np
from real import real_set

from genmed.cue import cue_of_labels
from genmed.data.dataset import read_dataset
from genmed.data.split import read_split
from genmed.degrade import coarser, inverted, lying_header
from genmed.errors import GenMedError
from genmed.hub import Model, load
from genmed.metrics import dice
from genmed.shape_model import load_shapes
from genmed.space import Space
from genmed.tasks.complete import complete, generate
from genmed.tasks.segment import segment
from genmed.text import embed
from genmed.volume import Volume, read, read_labels

SPLIT = Path(__file__).parents[1] / "genmed" / "bench" / "splits" / "hippocampus.json"


def mean_dice(model: Model, scan: Volume, truth: Volume, options: dict[str, Any]) -> float:
    """Mean Dice over the structures on the working grid of the (degraded) scan."""
    found = segment(model, scan, grid="model", **options).labels
    true = Space.fit(truth.grid, model.plan.spacing_mm).labels_to_model(truth.data[0], model.plan.label_values)
    values = list(enumerate(model.plan.label_values))[1:]
    return float(np.mean([dice(found.data[0] == value, true == number) for number, value in values]))


def test_shipped_model_segments_clean_scans_and_rescues_coarse_ones() -> None:
    dataset = read_dataset(real_set("Task04_Hippocampus"))
    model = load("hippocampus-mr")
    ids = read_split(SPLIT, dataset.ids).tune
    pairs = [(read(dataset.case(id).images), read_labels(dataset.case(id).label)) for id in (ids[0], ids[8], ids[16])]
    clean = [mean_dice(model, scan, truth, {}) for scan, truth in pairs]
    assert np.mean(clean) > 0.86
    scan, truth = pairs[0]
    steered = mean_dice(model, coarser(scan, 8).scan, truth, {"samples": 2})
    plain = mean_dice(model, coarser(scan, 8).scan, truth, {"mode": "conditional"})
    assert steered > plain + 0.2


def test_an_inverted_scan_is_noticed_and_segmented_without_a_flag() -> None:
    dataset = read_dataset(real_set("Task04_Hippocampus"))
    case = dataset.case(read_split(SPLIT, dataset.ids).tune[8])
    assert case.label is not None
    model, scan, truth = load("hippocampus-mr"), read(case.images), read_labels(case.label)
    assert segment(model, scan).mode == "conditional"
    worse = inverted(scan).scan
    plain = segment(model, worse, mode="conditional")
    assert plain.doubtful and mean_dice(model, worse, truth, {"mode": "conditional"}) < 0.2
    found = segment(model, worse, samples=1, grid="model")
    assert (found.mode, found.match, found.doubtful) == ("conditional", "falling", False)
    assert found.surprise is not None and plain.surprise is not None and found.surprise < plain.surprise
    assert mean_dice(model, worse, truth, {"match": found.match, "samples": 1}) > 0.8


def test_a_header_that_is_wrong_by_two_and_shuffled_slices_are_refused_or_doubted() -> None:
    dataset = read_dataset(real_set("Task04_Hippocampus"))
    model, scan = load("hippocampus-mr"), read(dataset.case(read_split(SPLIT, dataset.ids).tune[0]).images)

    def told(scan: Volume) -> bool:
        try:
            return segment(model, scan, mode="conditional").doubtful
        except GenMedError as error:
            return "repair the header" in str(error)

    assert not told(scan)
    for axis in (0, 1, 2, None):
        assert told(lying_header(scan, 0.5, axis).scan)
        assert told(lying_header(scan, 2, axis).scan)
    order = np.random.default_rng(0).permutation(scan.grid.shape[1])
    assert told(scan.like(scan.data.take(order, 2)))


def test_shipped_heart_model_segments_stacks_in_either_slice_order() -> None:
    dataset = read_dataset(real_set("acdc"))
    ids = read_split(SPLIT.with_name("acdc.json"), dataset.ids).tune
    model, scores = load("heart-mr"), []
    for id, step in ((ids[0], 1), (ids[5], -1), (ids[10], 1)):
        case = dataset.case(id)
        assert case.label is not None
        scan, truth = (v.like(v.data[..., ::step].copy()) for v in (read(case.images), read_labels(case.label)))
        found = segment(model, scan, mode="conditional").labels.data[0]
        scores.append(np.mean([dice(found == value, truth.data[0] == value) for value in (1, 2, 3)]))
    assert np.mean(scores) > 0.7


def test_shipped_shapes_draw_and_complete_kidneys() -> None:
    model = load_shapes("shapes")
    volumes = {}
    for size in ("small", "large"):
        drawn = generate(model, 8, text=embed([f"{size} left kidney"])[0])
        volumes[size] = np.median([(shape.sdf < 0).sum() * shape.voxel_mm**3 / 1000 for shape in drawn])
    assert 60 < volumes["small"] < volumes["large"] < 500
    truth = generate(model, 1, text=embed(["left kidney"])[0], seed=5)[0]
    inside = truth.sdf < 0
    seen = np.zeros_like(inside)
    seen[32], seen[:, 32], seen[:, :, 32] = True, True, True
    cue = cue_of_labels(inside, truth.grid.affine, seen)
    found = complete(model, cue, text=embed(["left kidney"])[0], samples=4)
    assert dice(found.probability(truth.grid) > 0.5, inside) > 0.85


def test_adrenal_glands_have_no_size_in_mm() -> None:
    """Their training shapes had none."""
    model = load_shapes("shapes")
    found = {name: generate(model, 1, text=embed([name])[0])[0].scaled for name in ("adrenal gland", "left kidney")}
    assert found == {"adrenal gland": False, "left kidney": True}
