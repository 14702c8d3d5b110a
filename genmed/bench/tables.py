"""What `genmed bench segmentation` compares: sets, inputs, methods and tables, as data that reads as the tables do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

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
FEW_SHOT_MINUTES = 4.0  # of every training on a few cases


@dataclass(frozen=True)
class TrainingSet:
    """A prepared data set and how every method is trained on it. Spacing in mm, in the plane for thick slices."""

    folder: str
    split: Path
    spacing_mm: float
    preset: str
    minutes: float


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
    on: all its cases, in the part report alone. `cases` and `draw` are those of `genmed.train.few_shot`.
    """

    name: str
    changes: tuple[Change, ...] = ()
    group: str = ""
    folder: str = ""
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
    and stand in a table of their own. `init` is the run, SET/RUN, whose weights the training starts from.
    """

    title: str
    run: str
    network: str = "genmed"
    augmentation: str = "nnunet"
    mode: str = "auto"
    init: str = ""
    main: bool = True
    sets: tuple[str, ...] = ("hippocampus", "hippocampus-1mm", "acdc", "left_atrium")

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


def header_only(scan: Degraded) -> Degraded:
    """Forget how thick the slices are: nobody is told more than the header says."""
    return replace(scan, slice_thickness_mm=None)


# The sets -------------------------------------------------------------------------------------------------

SETS = {
    "hippocampus": TrainingSet("Task04_Hippocampus", SPLITS / "hippocampus.json", 2.0, "small", 40),
    "hippocampus-1mm": TrainingSet("Task04_Hippocampus", SPLITS / "hippocampus.json", 1.0, "base", 101),
    "acdc": TrainingSet("acdc", SPLITS / "acdc.json", 2.5, "small", 40),
    "left_atrium": TrainingSet("left_atrium", SPLITS / "left_atrium.json", 2.5, "small", 20),
}

# The columns ----------------------------------------------------------------------------------------------

METHODS = {
    "genmed": Method("GenMed, automatic", "genmed"),
    "genmed-interpolated": Method("GenMed, interpolation + one evaluation", "genmed", mode="conditional"),
    "genmed-from-left_atrium": Method(
        "GenMed, automatic, started from the left atrium model", "genmed-from-left_atrium", init="left_atrium/genmed"
    ),
    "dynunet": Method("DynUNet", "dynunet", network="dynunet"),
    "dynunet-none": Method("DynUNet, no augmentation", "dynunet-none", network="dynunet", augmentation="none"),
    "diffusion": Method("conditional diffusion", "diffusion", network="diffusion"),
    "swinunetr": Method("SwinUNETR", "swinunetr", network="swinunetr", sets=("hippocampus",)),
    "genmed-randomised": Method(
        "GenMed, automatic, contrast-randomised training", "genmed-randomised", augmentation="randomised", main=False
    ),
    "dynunet-randomised": Method(
        "DynUNet, contrast-randomised training", "dynunet-randomised",
        network="dynunet", augmentation="randomised", main=False,
    ),
    "genmed-degraded": Method(
        "GenMed, automatic, trained on degraded patches", "genmed-degraded", augmentation="degraded", main=False
    ),
}  # fmt: skip
OURS, PLAIN = "genmed", "genmed-interpolated"  # whose differences the report tells
PEERS = ("dynunet", "dynunet-none", "diffusion", "swinunetr")

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
CONFIRMED = tuple(row for row in (*HIPPOCAMPUS_DEGRADED, *OTHER_CONTRASTS[1:]) if row.name in (
    "clean", "8 mm voxels", "4 slices", "inverted"
))  # fmt: skip
LGE = Input("late enhancement scans (mscmr_lge)", folder="mscmr_lge")
FEW_SHOT = tuple(
    Input(f"{cases} training cases, draw {draw}", (), f"{cases} training cases, mean of draws", "", cases, draw)
    for cases in (2, 4)
    for draw in (0, 1, 2)
)

# The tables -----------------------------------------------------------------------------------------------

TABLES = {
    "standard": Table(
        dict.fromkeys(("hippocampus", "acdc", "left_atrium"), (CLEAN,)), (OURS, PLAIN, *PEERS)
    ),
    "degraded": Table(
        {"hippocampus": HIPPOCAMPUS_DEGRADED, "acdc": ACDC_DEGRADED},
        (OURS, PLAIN, *PEERS, "genmed-degraded", "genmed-randomised", "dynunet-randomised"),
    ),
    "zeroshot": Table(
        {"hippocampus": OTHER_CONTRASTS, "acdc": (*OTHER_CONTRASTS, LGE)},
        (OURS, PLAIN, *PEERS, "genmed-randomised", "dynunet-randomised"),
    ),
    "fewshot": Table(
        {"hippocampus": FEW_SHOT},
        (OURS, "genmed-from-left_atrium", "dynunet", "dynunet-none", "diffusion"),
    ),
    "confirmed": Table({"hippocampus-1mm": CONFIRMED}, (OURS, PLAIN, "dynunet")),
}
