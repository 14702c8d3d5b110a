"""The bundled model on real scans of the tune part, where `GENMED_DATA` names the folder of public sets."""

import os
from pathlib import Path

import numpy as np
import pytest

from genmed.bench.degraded import mean_dice
from genmed.data.dataset import read_dataset
from genmed.data.split import read_split
from genmed.degrade import coarser
from genmed.hub import load
from genmed.volume import read, read_labels

DATA = os.environ.get("GENMED_DATA")
SPLIT = Path(__file__).parents[1] / "genmed" / "bench" / "splits" / "hippocampus.json"

pytestmark = pytest.mark.skipif(not DATA, reason="needs the real hippocampus set below GENMED_DATA")


def test_shipped_model_segments_clean_scans_and_rescues_coarse_ones() -> None:
    dataset = read_dataset(Path(str(DATA)) / "Task04_Hippocampus")
    model = load("hippocampus-mr")
    ids = read_split(SPLIT, dataset.ids).tune
    pairs = [(read(dataset.case(id).images), read_labels(dataset.case(id).label)) for id in (ids[0], ids[8], ids[16])]
    clean = [mean_dice(model, scan, truth, {}) for scan, truth in pairs]
    assert np.mean(clean) > 0.86
    scan, truth = pairs[0]
    steered = mean_dice(model, coarser(scan, 8).scan, truth, {"samples": 2})
    plain = mean_dice(model, coarser(scan, 8).scan, truth, {"mode": "conditional"})
    assert steered > plain + 0.2
