"""Quality of robust results against their cost: network evaluations, samples and sampler.

    python -m genmed.bench.efficiency --model DIR --data DIR --part tune --cases 8 --out DIR

Each row is one schedule of `genmed.tasks.segment.guided_pair`; the defaults there were chosen from this table.
With --defaults the same inputs are segmented as users do it, without any flag but the mask of the slices that were
observed, and what is told is how long that takes, and the peak memory:

    python -m genmed.bench.efficiency --defaults --data DIR --cases 8
"""

import csv
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from genmed.bench.cases import HIPPOCAMPUS, cases_of_part, hippocampus_options, one_line_errors
from genmed.data.dataset import read_dataset
from genmed.data.split import person
from genmed.degrade import Degraded, coarser, inverted, keep_slices, tent
from genmed.files import write_bytes
from genmed.hub import Model, load
from genmed.metrics import bootstrap_interval, dice
from genmed.samplers import schedule
from genmed.space import on_grid
from genmed.tasks.segment import MATCHES, attempts_at, evaluations, guided_pair, segment
from genmed.tasks.view import View
from genmed.volume import Volume, read, read_labels


class Schedule(NamedTuple):
    """Levels of noise, repeats of the middle ones, and samples that are averaged."""

    steps: int
    travels: int
    samples: int


SCHEDULES = (
    Schedule(1, 0, 1), Schedule(2, 0, 1), Schedule(4, 0, 1), Schedule(8, 0, 1), Schedule(16, 0, 1), Schedule(32, 0, 1),
    Schedule(64, 0, 1), Schedule(4, 2, 1), Schedule(8, 2, 1), Schedule(16, 3, 1),
    Schedule(2, 0, 4), Schedule(4, 0, 4), Schedule(8, 0, 4), Schedule(4, 1, 4), Schedule(8, 2, 4),
    Schedule(2, 0, 16), Schedule(4, 0, 16),
)  # fmt: skip
INPUTS: dict[str, tuple[Callable[[Volume], Degraded], str]] = {
    "8 mm voxels": (lambda scan: coarser(scan, 8), "affine"),
    "4 slices": (lambda scan: keep_slices(scan, 4, axis=1), "none"),
    "inverted contrast": (inverted, "affine"),
    "tent contrast": (tent, "curve"),
}


class Row(NamedTuple):
    """One case of one schedule."""

    input: str
    schedule: Schedule
    evaluations: int
    case: str
    dice: float
    seconds: float


class Wait(NamedTuple):
    """Seconds of `segment` for one case, on the clock and of all threads together, and how it explained the scan."""

    input: str
    seconds: float
    cpu_seconds: float
    how: str


def wait(model: Model, data: Path, part: str, cases: int | None, split: Path = HIPPOCAMPUS) -> list[Wait]:
    """All inputs by `segment` with its defaults, result on the scan's own grid; reading and writing left out."""
    dataset, waits = read_dataset(data), []
    for name, (degrade, _) in INPUTS.items():
        for id in cases_of_part(dataset, split, part, cases):
            worse = degrade(read(dataset.case(id).images))
            started = time.process_time()
            found = segment(model, worse.scan, **worse.options)
            cpu_seconds = time.process_time() - started
            waits.append(Wait(name, found.seconds, cpu_seconds, f"{found.mode}, match {found.match}"))
            print(f"{name}: {id}, {found.seconds:.1f} s, CPU {cpu_seconds:.1f} s", flush=True)
    return waits


def wait_table(waits: Sequence[Wait]) -> str:
    """Markdown: a line per input and one for all; below, threads and the peak memory of this process."""
    lines = ["| input | cases | mean (s) | longest (s) | mean CPU (s) | chosen |", "|---|---|---|---|---|---|"]
    for name in (*dict.fromkeys(one.input for one in waits), "all"):
        mine = [one for one in waits if name in (one.input, "all")]
        seconds = [one.seconds for one in mine]
        chosen = "; ".join(f"{how}: {count}" for how, count in Counter(one.how for one in mine).most_common())
        cpu = np.mean([one.cpu_seconds for one in mine])
        lines.append(f"| {name} | {len(mine)} | {np.mean(seconds):.1f} | {max(seconds):.1f} | {cpu:.1f} | {chosen} |")
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    lines += ["", f"Threads: {torch.get_num_threads()}. Peak memory: {peak_gb:.2f} GB, Python itself included."]
    return "\n".join(lines) + "\n"


def measure(model: Model, data: Path, part: str, cases: int | None) -> list[Row]:
    """All schedules on all inputs, restore-then-condition; Dice on the working grid."""
    dataset = read_dataset(data)
    chosen = cases_of_part(dataset, HIPPOCAMPUS, part, cases)
    rows = []
    for name, (degrade, match) in INPUTS.items():
        for of in SCHEDULES:
            for id in chosen:
                case = dataset.case(id)
                assert case.label is not None
                worse, truth = degrade(read(case.images)), read_labels(case.label)
                rows.append(_row(model, name, match, of, id, worse, truth))
            last = rows[-len(chosen) :]
            print(f"{name}: {of}, Dice {np.mean([row.dice for row in last]):.3f}", flush=True)
    return rows


def _row(model: Model, name: str, match: str, of: Schedule, id: str, worse: Degraded, truth: Volume) -> Row:
    plan = model.plan
    view = View.of(plan, worse.scan, worse.observed, worse.slice_thickness_mm)
    mode = attempts_at(view, "restore-then-condition", match)[0][0]
    true = np.searchsorted(plan.label_values, on_grid(truth, view.space.model, order=0)[0])
    started = time.monotonic()
    with torch.no_grad():
        seeds = list(range(of.samples))
        soft = guided_pair(model, view, mode, MATCHES[match], seeds, steps=of.steps, travels=of.travels)[0]
    seconds = time.monotonic() - started
    found = soft.mean(dim=0).argmax(dim=0).numpy()
    score = np.mean([dice(found == c, true == c) for c in range(1, len(plan.labels))])
    calls = evaluations(schedule(plan.sigma_max, plan.sigma_min, of.steps), of.travels)
    return Row(name, of, calls, id, float(score), seconds)


def table(rows: Sequence[Row], people: dict[str, str]) -> str:
    """Markdown: one line per schedule, one column per input."""
    names = list(dict.fromkeys(row.input for row in rows))
    lines = [f"| levels | travels | samples | evaluations | {' | '.join(names)} | s per case |"]
    lines.append("|---" * (len(names) + 5) + "|")
    for of in dict.fromkeys(row.schedule for row in rows):
        mine = [row for row in rows if row.schedule == of]
        cells = []
        for name in names:
            scores = [row.dice for row in mine if row.input == name]
            groups = [people[row.case] for row in mine if row.input == name]
            low, high = bootstrap_interval(scores, groups=groups)
            cells.append(f"{np.mean(scores):.3f} [{low:.3f}, {high:.3f}]")
        seconds = np.mean([row.seconds for row in mine])
        calls = mine[0].evaluations * of.samples
        lines.append(
            f"| {of.steps} | {of.travels} | {of.samples} | {calls} | {' | '.join(cells)} | {seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Dice against network evaluations, one panel per input, one mark per schedule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row.input for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.4), sharex=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for travels, mark in ((0, "o"), (1, "s"), (2, "D"), (3, "^")):
            kinds = [of for of in dict.fromkeys(row.schedule for row in rows) if of.travels == travels]
            points = [[row for row in rows if row.input == name and row.schedule == of] for of in kinds]
            x = [part[0].evaluations * part[0].schedule.samples for part in points]
            y = [np.mean([row.dice for row in part]) for part in points]
            axis.plot(x, y, mark, label=f"{travels} travels", alpha=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(name)
        axis.set_xlabel("network evaluations")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("Dice")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save(rows: Sequence[Row], out: Path) -> None:
    """Print the table; write it with CSV and plot into a folder."""
    text = table(rows, {row.case: person("hippocampus", row.case) for row in rows})
    write_bytes(out / "efficiency.md", text.encode())
    with (out / "efficiency.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["input", "levels", "travels", "samples", "evaluations", "case", "dice", "seconds"])
        for r in rows:
            writer.writerow([r.input, *r.schedule, r.evaluations, r.case, f"{r.dice:.4f}", f"{r.seconds:.2f}"])
    plot(rows, out / "efficiency.png")
    print(text)


def main() -> None:
    """Parse the command line."""
    parser = hippocampus_options("Quality against network evaluations, or the time that a user waits.")
    parser.add_argument("--out", type=Path, help="folder for table, CSV and plot of the schedules")
    parser.add_argument("--defaults", action="store_true", help="time `segment` as it is, instead of schedules")
    a = parser.parse_args()
    if a.defaults == (a.out is not None):
        parser.error("give --out for the schedules, or --defaults, which only prints")
    with one_line_errors():
        model = load(a.model)
        if a.defaults:
            print("\n" + wait_table(wait(model, a.data, a.part, a.cases)))
        else:
            a.out.mkdir(parents=True, exist_ok=True)
            save(measure(model, a.data, a.part, a.cases), a.out)


if __name__ == "__main__":
    main()
