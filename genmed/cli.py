"""The `genmed` command: parses, calls the Python API, prints. Heavy imports happen inside the commands."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from genmed.errors import GenMedError

if TYPE_CHECKING:
    from genmed.metrics import Score
    from genmed.tasks.run import Box, Outcome

RESUME = {
    "segment": "run the same command again to go on: finished cases are skipped",
    "chain": "run the same command again to go on: finished cases are skipped",
    "restore": "run the same command again to go on: finished cases are skipped",
    "translate": "run the same command again to go on: finished cases are skipped",
    "train": "run the same command with --resume to go on from the last checkpoint",
    "bench": "run the same command again to go on from the last checkpoint",
    "data": "run the same command again: it goes on where the download stopped, and skips finished cases and shapes",
}
INTERRUPTED = 130
SHOWN = (  # of a finished case
    "mode", "match", "widened", "residual", "surprise", "observed_share", "doubtful", "doubts",
    "slice_thickness_mm", "seconds", "completed", "notes",
)  # fmt: skip


class _Commands(TyperGroup):
    """Errors in one line on stderr: exit code 2 for bad input, 130 for Ctrl-C, 1 for a bug."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["debug"] = "--debug" in args  # it may stand anywhere
        try:
            return super().parse_args(ctx, [arg for arg in args if arg != "--debug"])
        except Exception as error:
            if not _is_usage(error):
                raise
            _complain_of_usage(error, ctx.meta["debug"])
        raise typer.Exit(2)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            hint = RESUME.get(ctx.invoked_subcommand or "", "nothing half-written was left behind")
            _complain(f"interrupted; {hint}", ctx.meta["debug"])
            raise typer.Exit(INTERRUPTED) from None
        except GenMedError as error:
            _complain(str(error), ctx.meta["debug"])
        except MemoryError:
            _complain(
                "out of memory; give a smaller region with --roi, or use a larger machine", ctx.meta["debug"]
            )
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            _complain(_os_message(error), ctx.meta["debug"])
        except Exception as error:
            if _is_usage(error):
                _complain_of_usage(error, ctx.meta["debug"])
            elif hasattr(error, "exit_code") or isinstance(error, typer.Abort):  # typer's own
                raise
            else:
                report = "please report it, with the traceback that --debug shows"
                _complain(f"unexpected {type(error).__name__}: {error}; {report}", ctx.meta["debug"])
                raise typer.Exit(1) from None
        raise typer.Exit(2)


def _is_usage(error: Any) -> bool:
    """A wrong command line. Typer raises its own class for one without arguments, which is answered by the help."""
    return hasattr(error, "format_message") and type(error).__name__ != "NoArgsIsHelpError"


def _complain_of_usage(error: Any, debug: bool) -> None:
    where = getattr(error.ctx, "command_path", "genmed")
    _complain(f"{error.format_message().rstrip('.')}; see {where} --help", debug)


def _complain(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    typer.echo(f"genmed: {' '.join(message.split())}", err=True)


def _os_message(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    advice = (
        "free some space, then run it again"
        if error.errno == errno.ENOSPC
        else "check the path and its rights"
    )
    return f"{where}{error.strerror or error}; {advice}"


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(no_args_is_help=True, help="List, inspect, pull and push trained models.")
bench_app = typer.Typer(no_args_is_help=True, help="Redo the published tables, one command each.")
data_app = typer.Typer(no_args_is_help=True, help="Get, convert and build data sets.")
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")

PRESETS = "Network size: small, base or large."
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
DataDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="Data set folder with a dataset.json (MSD or nnU-Net).")
]
Source = Annotated[Path, typer.Argument(metavar="INPUT", help="Scan, DICOM folder or folder of cases.")]
ModelName = Annotated[str, typer.Option("--model", help="Model name (genmed models list) or folder.")]
SyntheticMatch = Annotated[
    str, typer.Option(help="How intensities may differ from the model's, as in `genmed segment`.")
]
SyntheticOut = Annotated[Path, typer.Option("--out", help="A .synthetic.nii.gz file, or a folder.")]
Samples = Annotated[int | None, typer.Option(help="Samples to average; default 4.")]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
Roi = Annotated[
    str | None, typer.Option(metavar="X0,X1,Y0,Y1,Z0,Z1", help="Work only in this world box, mm, RAS+.")
]
Observed = Annotated[
    Path | None,
    typer.Option(metavar="MASK", help="Mask of voxels that may be used, or folder of <case>.nii.gz."),
]
SliceThickness = Annotated[
    float | None, typer.Option(metavar="MM", help="True slice thickness, if not the slice spacing.")
]
Series = Annotated[str | None, typer.Option(help="DICOM series: description, number or UID.")]
Truth = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Full shape: a ghost on the page, and the measure of its figures."),
]
Uncertainty = Annotated[
    bool,
    typer.Option("--uncertainty", help="Also write <case>.uncertainty.nii.gz: standard deviation over samples."),
]


def main() -> None:
    """Entry point of the `genmed` command."""
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # threads that wait long at full speed are slow on a busy machine
    app(prog_name="genmed")


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(version("genmed"))
        raise typer.Exit


@app.callback()
def genmed(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Segment, restore and complete what was measured, however degraded, with diffusion models of joint distributions.

    `segment`, `restore` and `translate` use a model of scans and their labels; `complete` and `generate` one of
    shapes; `chain` both. `view` shows shapes in 3D.
    """


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page and its files.")] = Path("genmed-demo"),
) -> None:
    """Segment the hippocampi of a template brain, clean and degraded, and write a page about it."""
    from genmed.demo import run

    typer.echo(str(run(out)))


@app.command()
def info(
    path: Annotated[
        str, typer.Argument(metavar="FILE", help="Scan, label map, DICOM folder, plan.json or model.")
    ],
    as_json: Json = False,
) -> None:
    """Tell what is in a scan (geometry, values), a plan or a model folder."""
    from genmed import about, hub

    is_model = path in hub.known() or (Path(path) / hub.SUMS).is_file()
    facts = hub.info(path) if is_model else about.describe(Path(path))
    typer.echo(_json(facts) if as_json else about.as_text(facts))


@app.command()
def check(folder: DataDir) -> None:
    """List everything that is wrong with a data set. Exit code 1 if something must be repaired."""
    from genmed.data.check import check as find_problems
    from genmed.data.check import format_problems

    problems = find_problems(folder)
    typer.echo(format_problems(problems))
    if any(problem.severity == "error" for problem in problems):
        raise typer.Exit(1)


@app.command()
def prepare(
    folder: DataDir,
    out: Annotated[
        Path | None, typer.Option(help="Folder for fingerprint.json and plan.json; default ./DIR-plan.")
    ] = None,
    preset: Annotated[str, typer.Option(help=PRESETS)] = "base",
    split: Annotated[Path | None, typer.Option(help="Split file: measure its training cases only.")] = None,
) -> None:
    """Print the fingerprint of a data set and the plan that follows from it, and store both."""
    from genmed.data.fingerprint import prepare as measure
    from genmed.data.split import read_split

    out = out or Path(f"{folder.resolve().name}-plan")
    cases = read_split(split).train if split else None
    typer.echo(measure(folder, out, preset=preset, cases=cases))
    typer.echo(str(out / "plan.json"))


@app.command()
def train(
    folder: DataDir,
    out: Annotated[Path, typer.Option(metavar="MODEL_DIR", help="Folder of the model and its checkpoints.")],
    split: Annotated[
        Path | None, typer.Option(help="Split file; default: made from the data set, by person.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after this long, with the model saved.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in MODEL_DIR.")
    ] = False,
    preset: Annotated[str, typer.Option(help=PRESETS)] = "base",
    spacing: Annotated[
        float | None, typer.Option(metavar="MM", help="Working spacing (thick slices: in the plane); default: median.")
    ] = None,
    init: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Start from this model's weights.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of training steps; default: the preset's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    augmentation: Annotated[
        str,
        typer.Option(
            help="none, nnunet, degraded (coarse input), randomised (other contrasts, too) or mixed (half of each)."
        ),
    ] = "nnunet",
    cases: Annotated[
        int | None, typer.Option(metavar="N", help="Few-shot: train on N cases of the training part.")
    ] = None,
    draw: Annotated[int, typer.Option(metavar="K", help="Seed of the choice of these N cases.")] = 0,
) -> None:
    """Train one joint model of images and labels on a data set, or of shapes on a folder of `data build-shapes`."""
    from genmed.train import leave_group
    from genmed.train import train as run

    if (folder / "index.parquet").is_file():
        from genmed.train_shapes import STEPS as SHAPE_STEPS
        from genmed.train_shapes import train_shapes

        others = {
            "--split": split is not None, "--spacing": spacing is not None, "--init": init is not None,
            "--cases": cases is not None, "--preset": preset != "base", "--augmentation": augmentation != "nnunet",
            "--draw": draw != 0,
        }  # fmt: skip
        if given := [name for name, is_given in others.items() if is_given]:
            raise GenMedError(f"{given[0]}: not for shapes ({folder}); leave it out.")
        train_shapes(folder, out, max_minutes=max_minutes, resume=resume, steps=steps or SHAPE_STEPS, seed=seed)
        leave_group()
        return
    run(
        folder,
        out,
        split=split,
        max_minutes=max_minutes,
        resume=resume,
        preset=preset,
        spacing=spacing,
        init=init,
        steps=steps,
        seed=seed,
        augmentation=augmentation,
        cases=cases,
        draw=draw,
    )
    leave_group()


@app.command()
def segment(
    source: Source,
    model: ModelName,
    out: Annotated[Path, typer.Option(help="A .nii.gz file, or a folder.")],
    mode: Annotated[
        str, typer.Option(help="auto, conditional, joint, joint-base or restore-then-condition.")
    ] = "auto",
    match: Annotated[
        str,
        typer.Option(
            help="Intensities may differ: auto, none, rising, falling, affine, curve, poly, labels, bias, "
            "lncc, mind, mi."
        ),
    ] = "auto",
    samples: Annotated[
        int | None,
        typer.Option(help="Samples to average, for intervals; default: one evaluation (conditional), 4 (guided)."),
    ] = None,
    seed: Seed = 0,
    grid: Annotated[
        str, typer.Option(help="Grid of the label map: input (the scan's own) or model.")
    ] = "input",
    roi: Roi = None,
    observed: Observed = None,
    slice_thickness: SliceThickness = None,
    series: Series = None,
    probabilities: Annotated[
        bool,
        typer.Option("--probabilities", help="Also write <case>.probabilities.nii.gz, one channel a class."),
    ] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Also write <case>.preview.png.")] = False,
    as_json: Json = False,
) -> None:
    """Segment a scan, or a folder of scans, on each scan's own grid.

    Also writes volumes and intensities (statistics.json) and how it was done (manifest.json). In a folder,
    finished cases are skipped, a broken case does not stop the others, and the exit code is then 1.
    """
    from genmed.hub import load
    from genmed.tasks.run import Options, segment_files

    options = Options(
        mode=mode,
        match=match,
        samples=samples,
        seed=seed,
        grid=grid,
        roi_mm=_box(roi),
        observed=observed,
        slice_thickness_mm=slice_thickness,
        series=series,
        probabilities=probabilities,
        preview=preview,
    )
    outcome = segment_files(load(model), source, out, options, command=_command_line())
    typer.echo(_json(_results(outcome)) if as_json else _segmented_text(outcome))
    _report_failures(outcome)


@app.command("chain")
def chain_scans(
    source: Source,
    segmenter: Annotated[str, typer.Option("--segment", metavar="MODEL", help="Model of images: name or folder.")],
    completer: Annotated[str, typer.Option("--complete", metavar="MODEL", help="Model of shapes: name or folder.")],
    out: Annotated[Path, typer.Option(help="A .nii.gz file, or a folder.")],
    label: Annotated[
        str | None,
        typer.Option(metavar="A,B+C", help="Labels to complete, + joins those of one structure; default: all known."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="What the one structure of --label is, in words.")] = None,
    shapes: Annotated[int, typer.Option(help="Completed shapes to average.")] = 4,
    mode: Annotated[str, typer.Option(help="Of the segmentation, as in `genmed segment`.")] = "auto",
    match: Annotated[str, typer.Option(help="Of the segmentation, as in `genmed segment`.")] = "auto",
    samples: Annotated[int | None, typer.Option(help="Segmentations to average.")] = None,
    seed: Seed = 0,
    grid: Annotated[
        str, typer.Option(help="Grid of the label map: input (the scan's own) or model, thick slices divided.")
    ] = "input",
    roi: Roi = None,
    observed: Observed = None,
    slice_thickness: SliceThickness = None,
    series: Series = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write <case>.probabilities.nii.gz, one channel a class.")
    ] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Also write <case>.preview.png.")] = False,
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of one scan also a page in 3D, .html: the segmentation and its completion."),
    ] = None,
    truth: Truth = None,
    as_json: Json = False,
) -> None:
    """Segment a degraded scan, or a folder of scans, and complete what the segmentation is unsure of.

    Voxels of which the segmentation is sure stay; a model of shapes completes the rest. Structures that it does not
    know stay as segmented, with a line that says so. Files and folders are handled as by `genmed segment`.
    """
    from genmed.hub import load
    from genmed.shape_model import load_shapes
    from genmed.tasks.chain import ChainOptions, chain_files

    options = ChainOptions(
        mode=mode, match=match, samples=samples, seed=seed, grid=grid, roi_mm=_box(roi), observed=observed,
        slice_thickness_mm=slice_thickness, series=series, probabilities=probabilities, preview=preview,
        label=label, text=text, shapes=shapes,
    )  # fmt: skip
    outcome = chain_files(
        load(segmenter), load_shapes(completer), source, out, options,
        page=page, truth=truth, command=_command_line(),
    )  # fmt: skip
    typer.echo(_json(_results(outcome)) if as_json else _segmented_text(outcome))
    _report_failures(outcome)


@app.command()
def restore(
    source: Source,
    model: ModelName,
    out: SyntheticOut,
    match: SyntheticMatch = "auto",
    samples: Samples = None,
    seed: Seed = 0,
    roi: Roi = None,
    observed: Observed = None,
    slice_thickness: SliceThickness = None,
    series: Series = None,
    uncertainty: Uncertainty = False,
    as_json: Json = False,
) -> None:
    """Restore a coarse or incomplete scan, or a folder of scans, at the model's resolution.

    Writes <case>.synthetic.nii.gz in the scan's own contrast and units, and how it was done (manifest.json). Folders
    are handled as by `genmed segment`.
    """
    from genmed.hub import load
    from genmed.tasks.run import RestoreOptions, restore_files

    options = RestoreOptions(match, samples, seed, _box(roi), observed, slice_thickness, series, uncertainty)
    _report_synthetic(restore_files(load(model), source, out, options, command=_command_line()), as_json)


@app.command()
def translate(
    source: Source,
    model: ModelName,
    out: SyntheticOut,
    match: SyntheticMatch = "auto",
    samples: Samples = None,
    seed: Seed = 0,
    roi: Roi = None,
    observed: Observed = None,
    slice_thickness: SliceThickness = None,
    series: Series = None,
    uncertainty: Uncertainty = False,
    as_json: Json = False,
) -> None:
    """Translate a scan of another modality, or a folder of them, into the contrast of the model.

    Writes <case>.synthetic.nii.gz and how it was done (manifest.json). Folders are handled as by `genmed segment`.
    """
    from genmed.hub import load
    from genmed.tasks.run import RestoreOptions, translate_files

    options = RestoreOptions(match, samples, seed, _box(roi), observed, slice_thickness, series, uncertainty)
    _report_synthetic(translate_files(load(model), source, out, options, command=_command_line()), as_json)


def _report_synthetic(outcome: Outcome, as_json: bool) -> None:
    typer.echo(_json(_results(outcome)) if as_json else _synthetic_text(outcome))
    _report_failures(outcome)


def _report_failures(outcome: Outcome) -> None:
    """Notes on stderr, doubtful cases with the reason, and those that failed; exit code 1 if any did."""
    cases = _results(outcome)["cases"]
    for note in dict.fromkeys(note for facts in cases.values() for note in facts.get("notes", ())):
        typer.echo(f"genmed: {note}", err=True)
    for case, facts in cases.items():
        for doubt in facts.get("doubts", ()):
            typer.echo(f"genmed: {case} is doubtful: {doubt}", err=True)
    if outcome.failed:
        total = len(outcome.outputs)
        typer.echo(f"genmed: {len(outcome.failed)} of {total} cases failed:", err=True)
        for case, reason in outcome.failed.items():
            typer.echo(f"  {case}: {reason}", err=True)
        raise typer.Exit(1)


@app.command("complete")
def complete_shape(
    part: Annotated[Path, typer.Argument(metavar="PART", help="Binary label map, surface, or points on one, in mm.")],
    model: ModelName,
    out: Annotated[Path, typer.Option(help="A .nii.gz, .stl, .ply or .glb file.")],
    planes: Annotated[
        str | None,
        typer.Option(metavar="A=N,...", help="Seen planes, axial=40,coronal=52: indices; of surfaces: mm."),
    ] = None,
    observed: Annotated[Path | None, typer.Option(metavar="MASK", help="Mask of the voxels that were seen.")] = None,
    text: Annotated[str | None, typer.Option(help="What it is, in words.")] = None,
    doubtful: Annotated[
        bool,
        typer.Option("--doubtful", help="Some of what is seen may not belong to the structure, or is noisy."),
    ] = False,
    distances: Annotated[
        bool, typer.Option("--distances", help="PART holds signed distances in mm, negative inside, no labels.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Shapes to average.")] = 12,
    seed: Seed = 0,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write OUT.probabilities.nii.gz, OUT without its ending.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also a page in 3D, .html: what was seen beside its completion.")
    ] = None,
    truth: Truth = None,
    as_json: Json = False,
) -> None:
    """Complete a structure from planes or a part of it.

    With --planes or --observed, everything else of PART is unseen, whatever it holds. Without both, all of it is seen;
    of a surface, up to a fifth may be missing. A label map lies on PART's grid.
    """
    from genmed.shape_model import load_shapes
    from genmed.tasks.shapes import complete_file

    facts = complete_file(
        load_shapes(model), part, out, planes=planes, observed=observed, text=text, doubtful=doubtful,
        distances=distances, samples=samples, seed=seed, probabilities=probabilities, page=page, truth=truth,
        command=_command_line(),
    )  # fmt: skip
    _warn(facts, "the model knows no size in mm of this structure: the result is as large as PART says")
    short = f"residual {facts['residual_mm']:.2f} mm, {facts['seconds']:.1f} s -> {facts['out']}"
    typer.echo(_json(facts) if as_json else short)


@app.command("generate")
def generate_shapes(
    model: ModelName,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the surfaces.")],
    text: Annotated[str | None, typer.Option(help="What to draw, in words; default: anything.")] = None,
    volume: Annotated[
        float | None, typer.Option(metavar="ML", help="Volume of every shape; default: as the text says, or any.")
    ] = None,
    count: Annotated[int, typer.Option("-n", help="Number of shapes.")] = 8,
    seed: Seed = 0,
    file_format: Annotated[str, typer.Option("--format", help="Of the surfaces: stl, ply or glb.")] = "stl",
    as_json: Json = False,
) -> None:
    """Draw shapes from words, as surfaces in mm around the origin, with generated.json."""
    from genmed.shape_model import load_shapes
    from genmed.tasks.shapes import generate_files

    facts = generate_files(
        load_shapes(model), out, count, text=text, volume_ml=volume, seed=seed, format=file_format,
        command=_command_line(),
    )  # fmt: skip
    _warn(facts, "some shapes have no known size: their structure had no scale in mm in training; units are arbitrary")
    lines = [
        f"{row['file']}: no known size"
        if row["volume_ml"] is None
        else f"{row['file']}: {row['volume_ml']:.4g} ml, {row['extent_mm']:.4g} mm"
        for row in facts["shapes"]
    ]
    typer.echo(_json(facts) if as_json else "\n".join(lines))


def _warn(facts: dict[str, Any], without_scale: str) -> None:
    for line in (facts["warning"], "" if facts["scale_known"] else without_scale):
        if line:
            typer.echo(f"genmed: {line}", err=True)


@app.command()
def view(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Meshes (STL, PLY, OBJ, VTP, GLB; in mm) and label maps, 1 to 12."),
    ],
    out: Annotated[Path, typer.Option(help="The page, an .html file.")],
    truth: Truth = None,
) -> None:
    """Write one HTML page that shows shapes side by side in 3D, turned together.

    The page needs no network and no other file. With a truth, it tells Dice, Chamfer and UHD of every shape.
    """
    from genmed.tasks.compare import compare_files

    typer.echo(str(compare_files(files, out, truth)))


@app.command("eval")
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of label maps ID.nii.gz.")],
    truth: Annotated[Path, typer.Argument(help="Folder of true label maps ID.nii.gz.")],
    out: Annotated[Path, typer.Option(help="Table with one row per case and label.")] = Path("metrics.csv"),
    split: Annotated[
        Path | None, typer.Option(help="Split file: evaluate the cases of one part only.")
    ] = None,
    part: Annotated[str, typer.Option(help="Part of the split: train, tune or report.")] = "report",
    as_json: Json = False,
) -> None:
    """Dice, HD95 and NSD of label maps against the truth."""
    from genmed import metrics
    from genmed.data.split import PARTS, read_split

    if part not in PARTS:
        raise GenMedError(f"--part {part}: unknown; choose one of {', '.join(PARTS)}.")
    cases = getattr(read_split(split), part) if split else None
    rows = _averages(metrics.evaluate(predictions, truth, out, cases=cases))
    if as_json:
        typer.echo(_json(rows))
        return
    lines = [("label", "cases", "Dice (95 % interval)", "HD95 mm", "NSD 1 mm")]
    for name, row in rows.items():
        low, high = row["dice_interval"]
        hd95 = "missed" if row["hd95_mm"] is None else f"{row['hd95_mm']:.2f}"
        lines.append(
            (name, str(row["cases"]), f"{row['dice']:.3f} ({low:.3f}–{high:.3f})", hd95, f"{row['nsd']:.3f}")
        )
    typer.echo(_columns(lines))
    typer.echo(str(out))


def _averages(scores: list[Score]) -> dict[str, dict[str, Any]]:
    """Means over cases per label. HD95 is null when a label was missed in some case: it is infinite there."""
    import numpy as np

    from genmed.metrics import bootstrap_interval

    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(score.name for score in scores):
        chosen = [score for score in scores if score.name == name]
        dice, hd95 = [score.dice for score in chosen], np.mean([score.hd95_mm for score in chosen])
        rows[name] = {
            "cases": len(chosen),
            "dice": float(np.mean(dice)),
            "dice_interval": bootstrap_interval(dice),
            "hd95_mm": float(hd95) if np.isfinite(hd95) else None,
            "nsd": float(np.mean([score.nsd for score in chosen])),
        }
    return rows


@bench_app.command()
def hippocampus(
    data: Annotated[Path, typer.Option(help="The MSD hippocampus set (genmed data fetch hippocampus).")],
    out: Annotated[Path, typer.Option(help="Folder for tables, predictions and trained models.")],
    minutes: Annotated[float, typer.Option(help="Training time of each of the two models.")],
    model: Annotated[
        str | None, typer.Option(help="A trained model to compare, instead of training one.")
    ] = None,
    peer: Annotated[
        Path | None, typer.Option(help="Folder of a trained peer, instead of training one.")
    ] = None,
    preset: Annotated[str, typer.Option(help=PRESETS)] = "base",
    steps: Annotated[int | None, typer.Option(help="Training steps of a stage at most.")] = None,
) -> None:
    """Train and evaluate GenMed and MONAI's DynUNet alike, and print one table of both.

    Started again after an interruption, it goes on where it was.
    """
    from genmed.bench.hippocampus import run

    run(data, out, minutes=minutes, model=model, peer=peer, preset=preset, steps=steps)


@bench_app.command("segmentation")
def bench_segmentation(
    table: Annotated[str, typer.Option(help="standard, degraded, fewshot, zeroshot or confirmed.")],
    runs: Annotated[Path, typer.Option(help="Folder of the trainings, RUNS/SET/RUN.")],
    out: Annotated[Path, typer.Option(help="Folder for table, cases and picture; one for each table.")],
    data: Annotated[
        Path | None, typer.Option(envvar="GENMED_DATA", help="Folder that holds the prepared sets by name.")
    ] = None,
    set_name: Annotated[
        str | None,
        typer.Option("--set", help="A set of the table, such as acdc or kits23; default: the table's first."),
    ] = None,
    part: Annotated[str, typer.Option(help="Part of the split: tune or report.")] = "report",
    cases: Annotated[int | None, typer.Option(metavar="N", help="So many evenly spread cases; default all.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Training time of each method that is missing; default: the table's.")
    ] = None,
    methods: Annotated[str | None, typer.Option(metavar="A,B", help="Only these methods; default: all.")] = None,
    no_train: Annotated[bool, typer.Option("--no-train", help="Do not train what is missing: stop there.")] = False,
) -> None:
    """Compare GenMed with its peers on clean, degraded, few or unfamiliar scans, and print the table.

    Missing methods are trained first. Started again after an interruption, it goes on where it was.
    """
    from genmed.bench.segmentation import run

    chosen = [name.strip() for name in methods.split(",") if name.strip()] if methods is not None else None
    run(
        data, runs, out, table=table, set_name=set_name, part=part, cases=cases, minutes=minutes,
        methods=chosen, may_train=not no_train,
    )  # fmt: skip


@bench_app.command("shapes")
def bench_shapes(
    shapes: Annotated[Path, typer.Option(help="A folder of `genmed data build-shapes`.")],
    model: Annotated[str, typer.Option(help="A model of shapes that was trained on it: name or folder.")],
    out: Annotated[Path, typer.Option(help="Folder for table, rows and picture; one for each table.")],
    runs: Annotated[
        Path | None, typer.Option(help="Folder of the peers that complete: what they were trained to or chosen for.")
    ] = None,
    table: Annotated[str, typer.Option(help="completion or generation.")] = "completion",
    part: Annotated[str, typer.Option(help="Part of the shapes: tune or report.")] = "report",
    kinds: Annotated[
        str | None, typer.Option(metavar="A,B", help='Only these cues, such as "one plane"; default: all.')
    ] = None,
    methods: Annotated[str | None, typer.Option(metavar="A,B", help="Only these methods; default: all.")] = None,
    cases: Annotated[
        int | None, typer.Option(metavar="N", help="So many shapes; default: 100, for generation 200.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Training time of the conditioned peer; default: the model's.")
    ] = None,
    tumours: Annotated[bool, typer.Option("--tumours", help="Complete only shapes with a tumour.")] = False,
) -> None:
    """Compare completion or generation of shapes with other methods, and print the table.

    Missing peers are trained first. Started again after an interruption, it goes on where it was.
    """
    from genmed.bench import generation
    from genmed.bench import shapes as completion

    chosen = [[name.strip() for name in text.split(",")] if text is not None else None for text in (kinds, methods)]
    if table == "generation":
        others = {
            "--kinds": kinds is not None, "--runs": runs is not None, "--minutes": minutes is not None,
            "--tumours": tumours,
        }  # fmt: skip
        if given := [name for name, is_given in others.items() if is_given]:
            raise GenMedError(f"{given[0]}: not for --table generation; leave it out.")
        generation.run(
            shapes, model, out, part=part, methods=chosen[1],
            count=generation.COUNT if cases is None else cases,
        )  # fmt: skip
        return
    if table != "completion":
        raise GenMedError(f"--table {table}: choose completion or generation.")
    if runs is None:
        raise GenMedError("--runs: completion has peers; name the folder that they are kept in.")
    completion.run(
        shapes, model, runs, out, part=part, kinds=chosen[0], methods=chosen[1],
        count=completion.COUNT if cases is None else cases, minutes=minutes, tumours=tumours,
    )  # fmt: skip


@models_app.command("list")
def list_models(as_json: Json = False) -> None:
    """Bundled and pulled models, with the licence of their weights beside that of the code."""
    from genmed.hub import list_models as rows

    found = rows()
    if as_json:
        typer.echo(_json([asdict(row) for row in found]))
        return
    lines = [("model", "labels", "weights licence", "code licence", "MB", "Dice", "from")]
    for row in found:
        dice = "–" if row.dice is None else f"{row.dice:.3f}"
        labels = row.problem or (", ".join(row.labels) if len(row.labels) < 9 else f"{len(row.labels)} structures")
        lines.append(
            (
                row.name,
                labels,
                row.weights_licence,
                row.code_licence,
                f"{row.megabytes:.1f}",
                dice,
                row.origin,
            )
        )
    typer.echo(_columns(lines))


@models_app.command("info")
def model_info(
    model: Annotated[str, typer.Argument(help="Model name or folder.")],
    as_json: Json = False,
) -> None:
    """A model's card, scores, plan and weights hash."""
    from genmed import about, hub

    facts = hub.info(model)
    typer.echo(_json(facts) if as_json else about.as_text(facts))


@models_app.command("pull")
def pull_model(
    source: Annotated[
        str, typer.Argument(help="Model folder, folder of models, archive, or an archive's address.")
    ],
    name: Annotated[str, typer.Argument(help="What to call the model here.")],
    sha256: Annotated[str | None, typer.Option(help="SHA-256 of the archive; needed for an address.")] = None,
) -> None:
    """Copy a verified model to this user's models, so that --model NAME finds it."""
    from genmed.hub import pull

    typer.echo(str(pull(source, name, sha256)))


@models_app.command("push-dir")
def push_model(
    model: Annotated[str, typer.Argument(help="Model name or folder.")],
    folder: Annotated[Path, typer.Argument(help="Folder that gets a subfolder with the model.")],
) -> None:
    """Copy a verified model into a folder, where `genmed models pull` finds it."""
    from genmed.hub import push_dir

    typer.echo(str(push_dir(model, folder)))


@data_app.command("fetch")
def fetch_data(
    name: Annotated[str, typer.Argument(help="hippocampus or ct-mr-pair.")],
    out: Annotated[Path, typer.Option(help="Folder that gets the data set's folder.")],
) -> None:
    """Download a public data set, verified by its hash; an interrupted download goes on where it stopped."""
    from genmed.data.fetch import fetch

    typer.echo(str(fetch(name, out)))


@data_app.command("convert")
def convert_data(
    name: Annotated[
        str, typer.Argument(help="totalsegmentator, mmwhs, kits23, acdc, mscmrseg or la2018.")
    ],
    src: Annotated[Path, typer.Argument(help="Folder of the data set, as its authors publish it.")],
    out: Annotated[Path, typer.Argument(help="Folder for the nnU-Net data set.")],
    modality: Annotated[
        str | None,
        typer.Option(help="ct (default) or mr for totalsegmentator and mmwhs; lge (default), c0 or t2 for mscmrseg."),
    ] = None,
    structures: Annotated[
        str, typer.Option(metavar="A,B,C", help="Only these labels, in this order; default: all, or the heart.")
    ] = "",
) -> None:
    """Convert a public data set to a folder that check, prepare and train read.

    Converted cases are skipped when run again. A case with missing or contradicting files does not stop the
    others, and the exit code is then 1.
    """
    from genmed.data.convert import convert

    chosen = [part.strip() for part in structures.split(",") if part.strip()]
    outcome = convert(name, src, out, modality, chosen)
    typer.echo(f"{len(outcome.converted)} cases converted, {len(outcome.skipped)} were converted before")
    typer.echo(str(outcome.folder))
    if outcome.failed:
        total = sum(map(len, (outcome.converted, outcome.skipped, outcome.failed)))
        typer.echo(f"genmed: {len(outcome.failed)} of {total} cases failed:", err=True)
        for case, reason in outcome.failed.items():
            typer.echo(f"  {case}: {reason}", err=True)
        raise typer.Exit(1)


@data_app.command("build-shapes")
def build_shapes(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="Folders of surfaces or label maps, MedShapeNet downloads included."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the data set of shapes.")],
    size: Annotated[int, typer.Option(help="Voxels along a side: 32, 64 or 128.")] = 64,
    workers: Annotated[int, typer.Option(metavar="N", help="Processes on this machine.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Use a Ray cluster (RAY_ADDRESS) instead.")] = False,
    unseen: Annotated[
        list[str] | None, typer.Option(metavar="CATEGORY", help="Keep a category wholly out of training; repeatable.")
    ] = None,
    unit: Annotated[str, typer.Option(help="Unit of surface files: mm, cm or m.")] = "mm",
    seed: Annotated[int, typer.Option(help="Seed of the division into train, tune and report.")] = 0,
) -> None:
    """Build a data set of shapes with captions from surfaces and label maps.

    Writes signed distances, an index with captions and measures, a card, thumbnails, and reasons.csv, which says what
    was left out. The same command goes on where it stopped; bad files do not stop it.
    """
    from genmed.data.shapes.build import build_shapes as run

    outcome = run(sources, out, size, workers, ray, unseen or (), unit, seed)
    before = ", built before" if outcome.finished_before else ""
    reasons = outcome.folder / "reasons.csv"
    typer.echo(f"{outcome.shapes} shapes{before}; {outcome.left_out} left out, {reasons} says why")
    typer.echo(str(outcome.folder))


# Arguments and output -------------------------------------------------------------------------------------


def _box(text: str | None) -> Box | None:
    """X0,X1,Y0,Y1,Z0,Z1 as three ranges."""
    if text is None:
        return None
    try:
        x0, x1, y0, y1, z0, z1 = (float(part) for part in text.split(","))
    except ValueError:
        raise GenMedError(f"--roi {text!r}: give six numbers of mm, X0,X1,Y0,Y1,Z0,Z1.") from None
    return (x0, x1), (y0, y1), (z0, z1)


def _command_line() -> str:
    return shlex.join(["genmed", *sys.argv[1:]])


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as text with aligned columns."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _results(outcome: Outcome) -> dict[str, Any]:
    cases = outcome.manifest["cases"]
    return {
        "cases": {
            case: {
                "out": str(path),
                "skipped": case in outcome.skipped,
                **({"structures": outcome.statistics[case]} if case in outcome.statistics else {}),
                **{key: cases[case][key] for key in SHOWN if key in cases[case]},
            }
            for case, path in outcome.outputs.items()
            if case not in outcome.failed
        },
        "failed": outcome.failed,
    }


def _synthetic_text(outcome: Outcome) -> str:
    lines = []
    for case, facts in _results(outcome)["cases"].items():
        residual = "" if facts["residual"] is None else f", residual {facts['residual']:.2f}"
        how = f"match {facts['match']}{residual}, {facts['seconds']:.1f} s"
        how = ("finished before" if facts["skipped"] else how) + _look(facts)
        lines.append(f"{case}: {how} -> {facts['out']}")
    return "\n".join(lines)


def _look(facts: dict[str, Any]) -> str:
    return "; DOUBTFUL, look at it" if facts.get("doubtful") else ""


def _volume(row: dict[str, Any]) -> str:
    """Expected volume with its interval where there are samples: a label map of coarse voxels counts badly."""
    if "ml_expected" not in row:
        return f"{row['ml']:.2f} ml"
    low, high = row["ml_interval"]
    return f"{row['ml_expected']:.2f} ml ({low:.2f} to {high:.2f})"


def _segmented_text(outcome: Outcome) -> str:
    lines = []
    for case, facts in _results(outcome)["cases"].items():
        volumes = ", ".join(f"{name} {_volume(row)}" for name, row in facts["structures"].items())
        residual = "" if facts["residual"] is None else f", residual {facts['residual']:.2f}"
        how = (
            "finished before"
            if facts["skipped"]
            else f"{facts['mode']}, match {facts['match']}{residual}, {facts['seconds']:.1f} s"
        )
        lines.append(f"{case}: {volumes} ({how}{_look(facts)}) -> {facts['out']}")
    return "\n".join(lines)
