"""What `genmed bench segmentation` compares: sets, inputs, methods and tables, as data that reads as the tables do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from genmed.data.convert import HEART_V1
from genmed.degrade import (
    Degraded,
    Scan,
    bias_field,
    coarser,
    crop,
    curve,
    gamma,
    gaussian_noise,
    inverted,
    keep_slices,
    missing_block,
    rician_noise,
    tent,
    thicker,
)
from genmed.volume import Volume

SPLITS = Path(__file__).parent / "splits"
FEW_SHOT_SHARE = 0.1  # of a set's minutes: what every training on a few cases gets


@dataclass(frozen=True)
class TrainingSet:
    """A prepared data set and how every method is trained on it. Spacing in mm, in the plane for thick slices.

    Without a `split`, it is the data set's own, or one is drawn: `genmed.bench.cases.split_of`. `model` is the bundled
    model that stands for the training `run`.
    """

    folder: str
    split: Path | None
    spacing_mm: float
    preset: str
    minutes: float
    model: str = ""
    run: str = "genmed"


@dataclass(frozen=True)
class Change:
    """One function of `genmed.degrade` (or below) with its options; `by_case` gives each case a seed of its own."""

    function: Callable[..., Degraded]
    options: Mapping[str, Any]
    by_case: bool = False

    def __call__(self, scan: Scan, case: str) -> Degraded:
        seed = {"seed": crc32(case.encode())} if self.by_case else {}
        return self.function(scan, **self.options, **seed)

    def __str__(self) -> str:
        options = [f"{name}={value}" for name, value in self.options.items()] + ["seed by case"] * self.by_case
        return f"{self.function.__name__}({', '.join(options)})"


@dataclass(frozen=True)
class Input:
    """A row: how scans are made worse, and what the networks of this row were trained on.

    Rows of one `group` are also averaged in a row of that name. `folder` is a data set that no network was trained
    on: all its cases, or the part report of its own split, in the part report alone. `labels` says what structures of
    the training are called there. `cases` and `draw` are those of `genmed.train.few_shot`.
    """

    name: str
    changes: tuple[Change, ...] = ()
    group: str = ""
    folder: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    cases: int | None = None
    draw: int = 0

    def degrade(self, scan: Volume, case: str) -> Degraded:
        """The changes in turn; what random ones draw is a function of the case's name."""
        worse = Degraded(scan)
        for change in self.changes:
            worse = change(worse, case)
        return worse


@dataclass(frozen=True)
class Method:
    """A column: which training, and for ours which mode of `segment`.

    `run` is the training's folder. Methods that are not `main` were trained on changed contrasts or coarse voxels
    and stand in a table of their own. `init` is the run, SET/RUN, whose weights the training starts from. `sets`:
    those that it is compared on; empty: all.
    """

    title: str
    run: str
    network: str = "genmed"
    augmentation: str = "nnunet"
    mode: str = "auto"
    init: str = ""
    main: bool = True
    sets: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return self.network == "genmed"


@dataclass(frozen=True)
class Table:
    """Inputs of every set that the table has, and the methods that are compared on them."""

    inputs: Mapping[str, tuple[Input, ...]]
    methods: tuple[str, ...]


def change(function: Callable[..., Degraded], by_case: bool = False, **options: Any) -> Change:
    """`Change` with its options as keywords."""
    return Change(function, options, by_case)


def every_second(scan: Scan, axis: int) -> Degraded:
    """Keep every second slice of an axis."""
    shape = (scan.scan if isinstance(scan, Degraded) else scan).grid.shape
    return keep_slices(scan, (shape[axis] + 1) // 2, axis)


def upright(scan: Scan) -> tuple[Degraded, int, float]:
    """The scan, which of its axes comes closest to feet-head, and its spacing in mm there."""
    worse = scan if isinstance(scan, Degraded) else Degraded(scan)
    grid = worse.scan.grid
    axis = int(np.abs(grid.affine[2, :3] / grid.spacing_mm).argmax())
    return worse, axis, grid.spacing_mm[axis]


def axial_slices(scan: Scan, mm: float) -> Degraded:
    """Slices of about `mm` across the body, each an average."""
    worse, axis, _ = upright(scan)
    return thicker(worse, mm, axis)


def slice_every(scan: Scan, mm: float) -> Degraded:
    """Keep a slice across the body about every `mm`: as many of an organ however long the scan is."""
    worse, axis, spacing_mm = upright(scan)
    size = worse.scan.grid.shape[axis]
    return keep_slices(worse, min(size, max(1, round(size * spacing_mm / mm))), axis)


def missing_every(scan: Scan, mm: float, of_mm: float) -> Degraded:
    """Hide `mm` of every `of_mm` along the body, the middle of the scan first; its outermost slices always remain."""
    worse, axis, spacing_mm = upright(scan)
    size = worse.scan.grid.shape[axis]
    from_middle_mm = (np.arange(size) - (size - 1) / 2) * spacing_mm
    kept = np.abs((from_middle_mm + of_mm / 2) % of_mm - of_mm / 2) >= mm / 2
    kept[[0, -1]] = True
    seen = worse.seen & kept.reshape([size if k == axis else 1 for k in range(3)])
    return replace(worse, observed=worse.scan.like(seen[None].astype(np.uint8)))


def header_only(scan: Degraded) -> Degraded:
    """Forget how thick the slices are: nobody is told more than the header says."""
    return replace(scan, slice_thickness_mm=None)


# The sets -------------------------------------------------------------------------------------------------

SETS = {
    "hippocampus": TrainingSet("Task04_Hippocampus", SPLITS / "hippocampus.json", 2.0, "small", 40),
    "hippocampus-1mm": TrainingSet(
        "Task04_Hippocampus", SPLITS / "hippocampus.json", 1.0, "base", 101, model="hippocampus-mr"
    ),
    "acdc": TrainingSet("acdc", SPLITS / "acdc.json", 2.5, "small", 40, model="heart-mr", run="genmed-mixed"),
    "left_atrium": TrainingSet("left_atrium", SPLITS / "left_atrium.json", 2.5, "small", 20),
    # Public sets that whoever has them lays out; the minutes are meant for a GPU, and nobody has tried them.
    "totalsegmentator": TrainingSet("totalsegmentator", None, 3.0, "base", 480),
    "totalsegmentator_v1": TrainingSet("totalsegmentator_v1", None, 3.0, "base", 480),
    "mmwhs_ct": TrainingSet("mmwhs_ct", None, 2.0, "base", 240),
    "kits23": TrainingSet("kits23", None, 3.0, "base", 480),
}
FULL = ("totalsegmentator", "totalsegmentator_v1", "mmwhs_ct", "kits23")
MANY_PEERS = ("hippocampus", "acdc", *FULL)  # the left atrium has one, DynUNet
PREPARED = {  # folder -> the command that makes it; SRC is the download, DATA the folder of all sets
    "Task04_Hippocampus": "fetch hippocampus --out DATA",
    "acdc": "convert acdc SRC DATA/acdc",
    "left_atrium": "convert la2018 SRC DATA/left_atrium",
    "mscmr_lge": "convert mscmrseg SRC DATA/mscmr_lge",
    "totalsegmentator": "convert totalsegmentator SRC DATA/totalsegmentator",
    "totalsegmentator_mr": "convert totalsegmentator SRC DATA/totalsegmentator_mr --modality mr",
    "totalsegmentator_v1": f"convert totalsegmentator SRC DATA/totalsegmentator_v1 --structures {','.join(HEART_V1)}",
    "mmwhs_ct": "convert mmwhs SRC DATA/mmwhs_ct --structures LV,RV,LA,RA,MYO",
    "mmwhs_mr": "convert mmwhs SRC DATA/mmwhs_mr --modality mr --structures LV,RV,LA,RA,MYO",
    "kits23": "convert kits23 SRC DATA/kits23",
}

# The columns ----------------------------------------------------------------------------------------------

METHODS = {
    "genmed": Method("GenMed, automatic", "genmed"),
    "genmed-interpolated": Method("GenMed, interpolation + one evaluation", "genmed", mode="conditional"),
    "genmed-from-left_atrium": Method(
        "GenMed, automatic, started from the left atrium model", "genmed-from-left_atrium", init="left_atrium/genmed",
        sets=("hippocampus",),
    ),
    "dynunet": Method("DynUNet", "dynunet", network="dynunet"),
    "dynunet-none": Method(
        "DynUNet, no augmentation", "dynunet-none", network="dynunet", augmentation="none", sets=MANY_PEERS
    ),
    "diffusion": Method("conditional diffusion", "diffusion", network="diffusion", sets=MANY_PEERS),
    "swinunetr": Method(
        "SwinUNETR", "swinunetr", network="swinunetr",
        sets=("hippocampus", *FULL),
    ),
    "genmed-randomised": Method(
        "GenMed, automatic, contrast-randomised training", "genmed-randomised", augmentation="randomised", main=False,
        sets=MANY_PEERS,
    ),
    "dynunet-randomised": Method(
        "DynUNet, contrast-randomised training", "dynunet-randomised",
        network="dynunet", augmentation="randomised", main=False, sets=MANY_PEERS,
    ),
    "genmed-mixed": Method(
        "GenMed, automatic, usual and random contrasts", "genmed-mixed", augmentation="mixed", main=False,
        sets=MANY_PEERS,
    ),
    "dynunet-mixed": Method(
        "DynUNet, usual and random contrasts", "dynunet-mixed",
        network="dynunet", augmentation="mixed", main=False, sets=MANY_PEERS,
    ),
    "genmed-degraded": Method(
        "GenMed, automatic, trained on degraded patches", "genmed-degraded", augmentation="degraded", main=False,
        sets=MANY_PEERS,
    ),
}  # fmt: skip
OURS, PLAIN = "genmed", "genmed-interpolated"  # whose differences the report tells
PEERS = ("dynunet", "dynunet-none", "diffusion", "swinunetr")
OTHER_TRAININGS = ("genmed-randomised", "dynunet-randomised", "genmed-mixed", "dynunet-mixed")
RIVALS = {  # what each of our trainings is compared with: the best peer of those trained on the same patches
    OURS: PEERS,
    "genmed-randomised": ("dynunet-randomised",),
    "genmed-mixed": ("dynunet-mixed",),
}

# The rows -------------------------------------------------------------------------------------------------

CLEAN = Input("clean")
NOISE_30 = change(gaussian_noise, by_case=True, sd=0.3)
NOISE_50 = change(gaussian_noise, by_case=True, sd=0.5)

HIPPOCAMPUS_DEGRADED = (  # 1 mm voxels; slices are coronal, along the long axis of the structure
    CLEAN,
    Input("2 mm voxels", (change(coarser, mm=2),)),
    Input("4 mm voxels", (change(coarser, mm=4),)),
    Input("8 mm voxels", (change(coarser, mm=8),)),
    Input("8 mm slices", (change(thicker, mm=8, axis=1),)),
    Input("4 mm slices every 8 mm, not told", (change(thicker, mm=8, axis=1, gap=0.5), change(header_only))),
    Input("middle 30 % missing", (change(missing_block, share=0.3, axis=1),)),
    Input("8 slices", (change(keep_slices, count=8, axis=1),)),
    Input("4 slices", (change(keep_slices, count=4, axis=1),)),
    Input("2 slices", (change(keep_slices, count=2, axis=1),)),
    Input("Gaussian noise 0.5", (NOISE_50,)),
    Input("Rician noise 0.5", (change(rician_noise, by_case=True, sd=0.5),)),
    Input("bias field 0.5", (change(bias_field, by_case=True, strength=0.5),)),
    Input("field of view 70 %", (change(crop, share=0.7),)),
    Input("4 mm voxels + noise 0.3", (change(coarser, mm=4), NOISE_30)),
    Input("8 slices + inverted", (change(keep_slices, count=8, axis=1), change(inverted))),
)
ACDC_DEGRADED = (  # 1.5 x 1.5 x 10 mm voxels, the slices along the last axis
    CLEAN,
    Input("5 mm in the plane", (change(coarser, mm=5),)),
    Input("every second slice", (change(every_second, axis=2),)),
    Input("middle 30 % missing", (change(missing_block, share=0.3, axis=2),)),
    Input("Gaussian noise 0.5", (NOISE_50,)),
    Input("5 mm in the plane + noise 0.3", (change(coarser, mm=5), NOISE_30)),
)
LEFT_ATRIUM_DEGRADED = (CLEAN, Input("5 mm voxels", (change(coarser, mm=5),)))  # 1.25 mm voxels
CT_DEGRADED = (  # by length, since scans reach from a heart to a whole body; hearts and kidneys are about 12 cm long
    CLEAN,
    Input("4 mm voxels", (change(coarser, mm=4),)),
    Input("8 mm voxels", (change(coarser, mm=8),)),
    Input("10 mm slices", (change(axial_slices, mm=10),)),
    Input("40 mm of every 120 mm missing", (change(missing_every, mm=40, of_mm=120),)),
    Input("a slice every 15 mm", (change(slice_every, mm=15),)),
    Input("a slice every 30 mm", (change(slice_every, mm=30),)),
    Input("Gaussian noise 0.5", (NOISE_50,)),
)
OTHER_CONTRASTS = (
    CLEAN,
    Input("inverted", (change(inverted),)),
    Input("gamma 3", (change(gamma, exponent=3),)),
    Input("tent", (change(tent),)),
    *(
        Input(f"random curve {seed}", (change(curve, seed=seed),), group="random curves, mean")
        for seed in range(5)
    ),
)  # fmt: skip
HIPPOCAMPUS_INPUTS = {row.name: row for row in (*HIPPOCAMPUS_DEGRADED, *OTHER_CONTRASTS)}
CONFIRMED = tuple(HIPPOCAMPUS_INPUTS[name] for name in ("clean", "8 mm voxels", "4 slices", "inverted"))
LGE = Input("late enhancement scans (mscmr_lge)", folder="mscmr_lge")
CHAMBERS = dict(zip(HEART_V1, ("MYO", "LA", "LV", "RA", "RV"), strict=True))  # TotalSegmentator v1 -> MM-WHS
OTHER_CT = Input("another CT set (mmwhs_ct)", folder="mmwhs_ct", labels=CHAMBERS)
MMWHS_MR = Input("MR scans (mmwhs_mr)", folder="mmwhs_mr")
TOTAL_MR = Input("MR scans (totalsegmentator_mr)", folder="totalsegmentator_mr")
FEW_SHOT = tuple(
    Input(f"{cases} training cases, draw {draw}", (), f"{cases} training cases, mean of draws", cases=cases, draw=draw)
    for cases in (2, 4)
    for draw in (0, 1, 2)
)

# The tables -----------------------------------------------------------------------------------------------

TABLES = {
    "standard": Table(
        dict.fromkeys(("hippocampus", "acdc", "left_atrium", *FULL), (CLEAN,)),
        (OURS, PLAIN, *PEERS, "genmed-mixed", "dynunet-mixed"),
    ),
    "degraded": Table(
        {
            "hippocampus": HIPPOCAMPUS_DEGRADED,
            "acdc": ACDC_DEGRADED,
            "left_atrium": LEFT_ATRIUM_DEGRADED,
            **dict.fromkeys(FULL, CT_DEGRADED),
        },
        (OURS, PLAIN, *PEERS, "genmed-degraded", *OTHER_TRAININGS),
    ),
    "zeroshot": Table(
        {
            "hippocampus": OTHER_CONTRASTS,
            "acdc": (*OTHER_CONTRASTS, LGE),
            "totalsegmentator": (CLEAN, TOTAL_MR),
            "totalsegmentator_v1": (CLEAN, OTHER_CT, replace(MMWHS_MR, labels=CHAMBERS)),
            "mmwhs_ct": (CLEAN, MMWHS_MR),
        },
        (OURS, PLAIN, *PEERS, *OTHER_TRAININGS),
    ),
    "fewshot": Table(
        dict.fromkeys(("hippocampus", *FULL), FEW_SHOT),
        (OURS, "genmed-from-left_atrium", "dynunet", "dynunet-none", "diffusion"),
    ),
    "confirmed": Table(
        {"hippocampus-1mm": (*CONFIRMED, HIPPOCAMPUS_INPUTS["4 mm voxels + noise 0.3"])}, (OURS, PLAIN, "dynunet")
    ),
}
