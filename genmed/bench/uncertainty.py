"""How sure may one be: calibration of probabilities and volume intervals, and what surprise warns of.

    python -m genmed.bench.uncertainty --model hippocampus-mr --data DIR --part tune --cases 8 --samples 8 --out DIR

Clean scans and degraded versions of the same are segmented on the working grid and compared with the truth there.
Every finished case is kept in cases.csv and reliability.csv and is not run again.
"""

import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np

from genmed.bench.cases import HIPPOCAMPUS, cases_of_part, hippocampus_options, one_line_errors
from genmed.bench.kept import key_of, read_rows, write_rows
from genmed.bench.tables import CONFIRMED, NOISE_50, Input, change
from genmed.calibration import (
    Reliability,
    coverage,
    ece,
    ece_interval,
    interval_score,
    near_boundary,
    reliability,
    roc_auc,
    roc_auc_interval,
)
from genmed.data.dataset import Case, read_dataset
from genmed.data.split import person
from genmed.degrade import curve, inverted, lying_header
from genmed.errors import GenMedError
from genmed.files import write_bytes, write_json
from genmed.hub import Model, load
from genmed.plan import Plan
from genmed.progress import track
from genmed.space import Space
from genmed.tasks.segment import FEWEST_SAMPLES, Interval, Segmentation, infer, segment
from genmed.tasks.view import View
from genmed.volume import Volume, read, read_labels, require_same_grid

SAMPLES = 8
BINS = 15
NEAR_MM = 2.0  # from a true or predicted boundary; a voxel, where that is larger
REGIONS = NEAR, EVERYWHERE = ("near", "everywhere")
ALL = "most probable class"
CASES, BINNED, RECIPE = "cases.csv", "reliability.csv", "recipe.json"

REFERENCE, TOLD = "clean", "inverted, told by --match affine"
LIE = "half the spacing along the structure, as a wrong header says"
INPUTS = {
    row.name: row
    for row in (
        *CONFIRMED,  # clean, 8 mm voxels, 4 slices, inverted
        Input("Gaussian noise 0.5", (NOISE_50,)),
        Input("random curve, another for each case", (change(curve, by_case=True),)),
        Input(LIE, (change(lying_header, factor=0.5, axis=1),)),
        Input(TOLD, (change(inverted),)),
    )
}
POOLED = tuple(name for name in INPUTS if name not in (REFERENCE, TOLD))
WARNINGS = {  # what may warn, and the field of `Finding` that holds it
    "plain surprise": "surprise_plain", "surprise": "surprise", "residual": "residual", "doubtful": "doubtful",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What one case in one version showed.

    `true_ml` and `volume_ml` go by structure, `claims` by region and structure (or `ALL`). `surprise_plain` is that of
    the interpolated scan with the label of one evaluation, `surprise` that of the result; NaN if not measured.
    `residual` and `doubtful` are those of the result.
    """

    input: str
    case: str
    true_ml: dict[str, float]
    volume_ml: dict[str, Interval]
    claims: dict[tuple[str, str], Reliability]
    surprise_plain: float
    surprise: float
    residual: float
    doubtful: bool
    mode: str
    match: str
    seconds: float


Findings = dict[tuple[str, str], Finding]  # by input and case


class CaseRow(NamedTuple):
    """One structure of a finding in cases.csv; `doubtful` is 0 or 1."""

    input: str
    case: str
    structure: str
    volume_ml_true: float
    volume_ml_mean: float
    volume_ml_low: float
    volume_ml_high: float
    ece_near: float
    ece_everywhere: float
    surprise_plain: float
    surprise: float
    residual: float
    doubtful: int
    mode: str
    match: str
    seconds: float


class BinRow(NamedTuple):
    """One bin of a finding's `claims` in reliability.csv."""

    input: str
    case: str
    region: str
    structure: str
    bin: int
    confidence: float
    accuracy: float
    count: int  # type: ignore[assignment]  # hides that of tuples


def run(
    model: Model, data: Path, out: Path, *,
    part: str = "tune", cases: int | None = None, samples: int = SAMPLES, split: Path = HIPPOCAMPUS,
) -> str:  # fmt: skip
    """Segment what is not finished, print the table and write it to `out`, with a picture and a row per case.

    Args:
        cases: so many evenly spread cases of the part; default all.
        samples: drawn per case; at least `FEWEST_SAMPLES`, since the intervals come from them.

    Returns:
        The tables in Markdown.
    """
    if samples < FEWEST_SAMPLES or (cases is not None and cases < 1):
        raise GenMedError(f"{samples} samples of {cases} cases; give at least {FEWEST_SAMPLES} samples and 1 case.")
    dataset = read_dataset(data)
    chosen = cases_of_part(dataset, split, part, cases)
    network = {"weights_sha256": model.sha256, "plan": key_of(model.plan.to_json())}
    _same_as_before(out, {**network, "samples": samples, "bins": BINS, "near_mm": NEAR_MM})
    findings = read_findings(out)
    wanted = [(name, id) for name in INPUTS for id in chosen]
    for name, id in track([key for key in wanted if key not in findings], "Segmenting"):
        findings[name, id] = examine(model, dataset.case(id), name, samples)
        write_findings(out, findings)
    people = {id: person(dataset.name, id) for id in chosen}
    chosen_findings = {key: findings[key] for key in wanted}
    text = report(chosen_findings, people, samples)
    write_bytes(out / "table.md", text.encode("utf-8"))
    draw(out, chosen_findings)
    print(text)
    return text


def _same_as_before(out: Path, recipe: Mapping[str, Any]) -> None:
    """Finished cases are only kept for the same weights and settings."""
    path = out / RECIPE
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8"))) != recipe:
        changed = next(key for key in recipe if recipe[key] != before.get(key))
        raise GenMedError(f"{out}: was started with {changed} {before.get(changed)}; use that, or another --out.")
    write_json(path, recipe)


# One case -------------------------------------------------------------------------------------------------


def examine(model: Model, case: Case, name: str, samples: int) -> Finding:
    """Make the case worse, segment it with `samples` samples and compare with the truth."""
    if case.label is None:
        raise GenMedError(f"case '{case.id}': has no label map to compare with; choose a labelled part.")
    worse = INPUTS[name].degrade(read(case.images, fourth_axis="channels"), case.id)
    match = "affine" if name == TOLD else "auto"
    started = time.monotonic()
    found = segment(model, worse.scan, samples=samples, grid="model", match=match, **worse.options)
    seconds = time.monotonic() - started
    view = View.of(model.plan, worse.scan, worse.observed, worse.slice_thickness_mm)
    plain = infer(model, view, "conditional", "none").surprise
    truth = read_labels(case.label)
    if name == LIE:  # labels as the voxels are, volumes in the millilitres that the header claims
        truth = replace(truth, affine=worse.scan.affine)
    return judge(model.plan, found, truth, name, case.id, seconds, plain)


def judge(
    plan: Plan, found: Segmentation, truth: Volume, name: str, id: str, seconds: float, plain: float | None = None
) -> Finding:
    """Compare a segmentation on the working grid with the true label map, brought to that grid."""
    space = Space.fit(truth.grid, plan.spacing_mm, slice_axis_last=plan.thick_slices)
    true = space.labels_to_model(truth.data[0], plan.label_values)
    require_same_grid(found.labels, Volume(true[None], space.model.affine))
    assert found.probabilities is not None
    soft, spacing_mm = found.probabilities.data, space.model.spacing_mm
    near_mm = max(NEAR_MM, *spacing_mm)
    near = near_boundary(true, spacing_mm, near_mm) | near_boundary(soft.argmax(axis=0), spacing_mm, near_mm)
    claims = {
        (region, structure): reliability(soft, true, BINS, label=label, where=where)
        for region, where in ((NEAR, near), (EVERYWHERE, None))
        for label, structure in ((None, ALL), *list(enumerate(plan.labels))[1:])
    }
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    true_ml = {s: float(np.count_nonzero(true == k) * voxel_ml) for k, s in enumerate(plan.labels) if k}
    before, after = (math.nan if value is None else value for value in (plain, found.surprise))
    warnings = before, after, found.residual, found.doubtful
    return Finding(name, id, true_ml, found.volume_ml, claims, *warnings, found.mode, found.match, seconds)


# Kept from run to run -------------------------------------------------------------------------------------


def write_findings(out: Path, findings: Findings) -> None:
    """Both tables, whole; cases.csv comes last, because it is what calls a case finished."""
    bins, cases = [], []
    for f in findings.values():
        for (region, structure), r in f.claims.items():
            for k in np.flatnonzero(r.count):
                share = float(r.confidence[k]), float(r.accuracy[k])
                bins.append(BinRow(f.input, f.case, region, structure, int(k), *share, int(r.count[k])))
        for structure, true_ml in f.true_ml.items():
            near, everywhere = (ece(f.claims[region, structure]) for region in REGIONS)
            cases.append(CaseRow(
                f.input, f.case, structure, true_ml, *f.volume_ml[structure], near, everywhere,
                f.surprise_plain, f.surprise, f.residual, int(f.doubtful), f.mode, f.match, f.seconds,
            ))  # fmt: skip
    write_rows(out / BINNED, BinRow, bins)
    write_rows(out / CASES, CaseRow, cases)


def read_findings(out: Path) -> Findings:
    """What `write_findings` wrote, to the last digit; nothing where there is no such folder yet."""
    found: Findings = {}
    for row in read_rows(out / CASES, CaseRow):
        warnings = row.surprise_plain, row.surprise, row.residual, bool(row.doubtful)
        empty = Finding(row.input, row.case, {}, {}, {}, *warnings, row.mode, row.match, row.seconds)
        finding = found.setdefault((row.input, row.case), empty)
        finding.volume_ml[row.structure] = Interval(row.volume_ml_mean, row.volume_ml_low, row.volume_ml_high)
        finding.true_ml[row.structure] = row.volume_ml_true
    for finding in found.values():
        for region in REGIONS:
            finding.claims.update({(region, structure): _no_claims() for structure in (ALL, *finding.true_ml)})
    for bin in read_rows(out / BINNED, BinRow):
        if (key := (bin.input, bin.case)) in found:
            claims = found[key].claims[bin.region, bin.structure]
            claims.confidence[bin.bin], claims.accuracy[bin.bin] = bin.confidence, bin.accuracy
            claims.count[bin.bin] = bin.count
    return found


def _no_claims() -> Reliability:
    nothing = np.full(BINS, np.nan)
    return Reliability(np.linspace(0, 1, BINS + 1), nothing, nothing.copy(), np.zeros(BINS, dtype=np.int64))


# The tables -----------------------------------------------------------------------------------------------


def report(findings: Findings, people: Mapping[str, str], samples: int) -> str:
    """Tables over all structures and for each, with their caption, in Markdown."""
    structures = list(next(iter(findings.values())).true_ml)
    lines = [
        "| input | calibration error near boundaries | everywhere | coverage of 95 % intervals | width (ml) "
        "| interval score (ml) | s per case |",
        "|---|---|---|---|---|---|---|",
        *(overall_row(name, findings, people) for name in _names(findings)),
        "",
        "| input | structure | calibration error near boundaries | everywhere | coverage of 95 % intervals "
        "| width (ml) | interval score (ml) |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {structure} | {_shared_cells(_of(findings, name), people, structure)} |"
            for name in _names(findings)
            for structure in structures
        ),
        "",
        *warning_table(findings, people),
        "",
        f"{len(people)} cases of {len(set(people.values()))} persons, {samples} samples each. Calibration error: ECE "
        f"with {BINS} bins, of the most probable class (first table) or of the structure's probability (second), over "
        f"voxels within {NEAR_MM:g} mm (or a voxel, where that is larger) of a true or found boundary and over all; in "
        "brackets the 95 % bootstrap interval, whole persons resampled. Coverage: share of true volumes in the "
        "interval [Wilson 95 % interval, every volume taken as independent]. Width and interval score: means; less is "
        "better. Plain surprise: of interpolation with one evaluation; surprise, residual and doubtful: of the result. "
        "Medians, and how many were doubtful; AUC: chance that the value of a scan exceeds that of a clean one, ties "
        "counted half [bootstrap by person].",
    ]
    return "\n".join(lines) + "\n"


def overall_row(name: str, findings: Findings, people: Mapping[str, str]) -> str:
    """One input, all structures together."""
    mine = _of(findings, name)
    return f"| {name} | {_shared_cells(mine, people)} | {np.mean([f.seconds for f in mine]):.1f} |"


def warning_table(findings: Findings, people: Mapping[str, str]) -> list[str]:
    """Every warning by input, and for all inputs of `POOLED` at once: its median, and how well it tells from clean."""
    clean, rows = _of(findings, REFERENCE), {name: _of(findings, name) for name in _names(findings)}
    if pooled := [finding for name in POOLED for finding in rows.get(name, [])]:
        rows["all but clean and told"] = pooled
    titles = " | ".join(f"{title} | AUC" for title in WARNINGS)
    lines = [f"| input | {titles} |", "|---" * (1 + 2 * len(WARNINGS)) + "|"]
    for name, mine in rows.items():
        cells, who = [], [[people[f.case] for f in side] for side in (mine, clean)]
        for attribute in WARNINGS.values():
            worse, normal = ([float(getattr(f, attribute)) for f in side] for side in (mine, clean))
            count = f"{sum(worse):.0f} of {len(worse)}"
            cells.append(count if attribute == "doubtful" else f"{np.median(worse):.1f}")
            cells.append("–" if name == REFERENCE else _auc(worse, normal, *who))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _shared_cells(findings: Sequence[Finding], people: Mapping[str, str], structure: str | None = None) -> str:
    """Calibration errors, coverage, width and score; of one structure, or of all."""
    errors = [_error([f.claims[region, structure or ALL] for f in findings], findings, people) for region in REGIONS]
    pairs = [(f.volume_ml[s], f.true_ml[s]) for f in findings for s in f.true_ml if structure in (None, s)]
    limits, true = [(interval.low, interval.high) for interval, _ in pairs], [ml for _, ml in pairs]
    share, low, high = coverage(limits, true)
    width = f"{np.mean([b - a for a, b in limits]):.3f}"
    score = f"{interval_score(limits, true).mean():.3f}"
    return " | ".join((*errors, f"{share:.0%} [{low:.0%}, {high:.0%}]", width, score))


def _error(claims: Sequence[Reliability], findings: Sequence[Finding], people: Mapping[str, str]) -> str:
    if not (total := reduce(add, claims)).count.any():
        return "–"
    low, high = ece_interval(claims, [people[f.case] for f in findings])
    return f"{ece(total):.3f} [{low:.3f}, {high:.3f}]"


def _auc(worse: Sequence[float], normal: Sequence[float], who: Sequence[str], who_normal: Sequence[str]) -> str:
    if np.isnan([*worse, *normal]).any():
        return "–"
    low, high = roc_auc_interval(worse, normal, who, who_normal)
    return f"{roc_auc(worse, normal):.2f} [{low:.2f}, {high:.2f}]"


def _names(findings: Findings) -> list[str]:
    return list(dict.fromkeys(name for name, _ in findings))


def _of(findings: Findings, name: str) -> list[Finding]:
    return [finding for finding in findings.values() if finding.input == name]


# The picture ----------------------------------------------------------------------------------------------


def draw(out: Path, findings: Findings) -> None:
    """Reliability near boundaries as reliability.svg and reliability.png: a panel per input.

    Bars are the share of voxels in every bin of the most probable class; bins with less than 0.5 % of a curve's
    voxels are left out, because chance rules there.
    """
    from matplotlib.figure import Figure

    names = _names(findings)
    columns = (len(names) + 2) // 2
    figure = Figure(figsize=(2.9 * columns, 6.2), layout="constrained")
    panels = figure.subplots(2, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        mine = _of(findings, name)
        curves = {s: reduce(add, (f.claims[NEAR, s] for f in mine)) for s in (ALL, *mine[0].true_ml)}
        _draw_panel(axes, name, curves)
    for above, axes in zip(panels[len(names) - columns :], panels[len(names) :], strict=False):
        axes.axis("off")
        above.tick_params(labelbottom=True)
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.supxlabel("claimed probability")
    figure.supylabel("share that is true")
    for kind in ("svg", "png"):
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        write_bytes(out / f"reliability.{kind}", picture.getvalue())


def _draw_panel(axes: Any, title: str, curves: Mapping[str, Reliability]) -> None:
    edges, share = curves[ALL].edges, curves[ALL].count / max(1, curves[ALL].count.sum())
    axes.bar(edges[:-1], share, np.diff(edges), align="edge", color="0.88", label="share of voxels")
    axes.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="as claimed")
    for name, found in curves.items():
        shown = found.count > 0.005 * found.count.sum()
        style = {"color": "black", "linewidth": 1.8} if name == ALL else {"linewidth": 1.2}
        axes.plot(found.confidence[shown], found.accuracy[shown], marker=".", label=name, **style)
    axes.set_title(f"{fill(title, 36)}\nerror {ece(curves[ALL]):.3f} near boundaries", fontsize=9)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")


def main() -> None:
    """Parse the command line."""
    parser = hippocampus_options("Is the model as sure as it should be, on clean and degraded scans?")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="samples per case (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of tables and picture; run again to go on")
    a = parser.parse_args()
    with one_line_errors():
        run(load(a.model), a.data, a.out, part=a.part, cases=a.cases, samples=a.samples)


if __name__ == "__main__":
    main()
