"""Overlap and surface metrics of label maps, a table over folders, fidelity of images, and bootstrap intervals."""

import csv
import io
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from genmed.errors import GenMedError
from genmed.files import write_bytes
from genmed.progress import track
from genmed.volume import Volume, read_labels, require_same_grid

SSIM_SIGMA = 1.5  # voxels; with the next two, the constants of Wang et al. 2004
SSIM_RADIUS = 5  # voxels on either side of the window's centre
SSIM_K = (0.01, 0.03)
LABEL_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".png", ".tiff", ".tif")


@dataclass(frozen=True)
class Score:
    """One label of one case. Distances in mm, volumes in ml."""

    case: str
    label: int
    name: str
    dice: float
    hd95_mm: float
    nsd: float
    volume_ml_predicted: float
    volume_ml_true: float


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Dice coefficient 2|P∩T| / (|P| + |T|) of two boolean masks of one shape.

    1.0 when both are empty: correctly finding nothing is right.
    """
    prediction, truth = _masks(prediction, truth)
    size = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 2.0 * np.count_nonzero(prediction & truth) / size if size else 1.0


def hd95(prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """95th percentile Hausdorff distance in mm of two boolean masks, (x, y, z) or (x, y).

    As the package surface-distance 0.1 defines it: surface elements sit on voxel corners and are weighted by
    their area; the larger of the two directed 95th percentiles is taken. Other packages, such as MONAI,
    differ slightly. 0.0 when both masks are empty, infinite when one is.
    """
    return _surface_scores(prediction, truth, spacing_mm, tolerance_mm=1.0)[0]


def nsd(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float = 1.0
) -> float:
    """Normalised surface distance (surface Dice) of two boolean masks, (x, y, z) or (x, y).

    The share of both surfaces, by area, that lies within `tolerance_mm` of the other one, as the package
    surface-distance 0.1 defines it. 1.0 when both masks are empty, 0.0 when one is.
    """
    return _surface_scores(prediction, truth, spacing_mm, tolerance_mm)[1]


def psnr(found: np.ndarray, truth: np.ndarray, range: float) -> float:
    """Peak signal-to-noise ratio 10 log₁₀(range² / mean squared error) in dB of two images of one shape.

    `range` is the intensity range that counts as the peak, such as that of the truth. Infinite for equal images.
    """
    a, b = _images(found, truth, range)
    error = float(np.mean(np.square(a - b)))
    return 10 * math.log10(range**2 / error) if error > 0 else math.inf


def ssim(found: np.ndarray, truth: np.ndarray, range: float) -> float:
    """Structural similarity of two images, (x, y, z) or (x, y), averaged over all windows that fit in.

    After Wang et al. 2004 (IEEE Transactions on Image Processing 13:600) with their constants, in as many dimensions
    as the images have: Gaussian windows of 11 voxels a side, σ = 1.5 voxels, K = (0.01, 0.03). 1 for equal images.
    Raises `GenMedError` for images smaller than a window.
    """
    a, b = _images(found, truth, range)
    side = 2 * SSIM_RADIUS + 1
    if min(a.shape) < side:
        raise GenMedError(f"SSIM needs {side} voxels along every axis, but the images have {a.shape}.")
    from scipy.ndimage import gaussian_filter

    def local_mean(values: np.ndarray) -> np.ndarray:
        smooth = gaussian_filter(values, SSIM_SIGMA, radius=SSIM_RADIUS)
        return np.asarray(smooth[(slice(SSIM_RADIUS, -SSIM_RADIUS),) * values.ndim])

    c1, c2 = ((k * range) ** 2 for k in SSIM_K)
    mean_a, mean_b = local_mean(a), local_mean(b)
    variance_a, variance_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    agreement = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float(np.mean(agreement / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))))


def evaluate(
    predictions_dir: str | Path,
    truth_dir: str | Path,
    out_csv: str | Path | None = None,
    *,
    cases: Iterable[str] | None = None,
    labels: Mapping[int, str] | None = None,
    tolerance_mm: float = 1.0,
) -> list[Score]:
    """Compare label maps ID.nii.gz of two folders; one row per case and label, also written to `out_csv`.

    Without `cases` both folders must hold the same ids, so that a failed case is never left out unseen.
    `labels` (value -> name) defaults to every value but 0 that occurs in either folder.
    Raises `GenMedError` for missing cases and for grids that differ.
    """
    pairs = _pairs(Path(predictions_dir), Path(truth_dir), cases)
    labels = dict(labels) if labels is not None else _occurring_labels(pairs)
    scores: list[Score] = []
    for id, prediction, truth in track(pairs, "Evaluating"):
        scores += _case_scores(id, read_labels(prediction), read_labels(truth), labels, tolerance_mm)
    if out_csv is not None:
        _write_csv(Path(out_csv), scores)
    return scores


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    seed: int = 0,
    n: int = 10_000,
    groups: Sequence[Hashable] | None = None,
    weights: Sequence[float] | np.ndarray | None = None,
) -> tuple[float, float]:
    """95 % percentile interval of the mean, weighted if there are `weights`, from `n` resamples with replacement.

    With `groups` (one per value, e.g. the subject) whole groups are drawn, because values of one subject are
    not independent. Raises `GenMedError` for no or not finite values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise GenMedError("a bootstrap interval needs a list of at least one finite value.")
    if groups is not None and len(groups) != array.size:
        raise GenMedError(f"{len(groups)} groups were given for {array.size} values; give one each.")
    number = {group: k for k, group in enumerate(dict.fromkeys(groups or ()))}
    index = np.array([number[group] for group in groups]) if groups is not None else np.arange(array.size)
    share = np.ones(array.size) if weights is None else np.asarray(weights, dtype=np.float64)
    sums, counts = np.bincount(index, weights=array * share), np.bincount(index, weights=share)
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=n)
    low, high = np.percentile((drawn @ sums) / (drawn @ counts), (2.5, 97.5))
    return float(low), float(high)


def _images(found: np.ndarray, truth: np.ndarray, range: float) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64. Raises `GenMedError` for shapes that differ, values that are not finite and no range."""
    if found.shape != truth.shape:
        raise GenMedError(f"the images have different shapes, {found.shape} and {truth.shape}.")
    if not (np.isfinite(found).all() and np.isfinite(truth).all()):
        raise GenMedError("images with NaN or infinite voxels cannot be compared; compare the finite part.")
    if not 0 < range < math.inf:
        raise GenMedError(f"an intensity range of {range:g} makes no sense; give that of the true image.")
    return np.asarray(found, dtype=np.float64), np.asarray(truth, dtype=np.float64)


def _masks(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if prediction.shape != truth.shape:
        raise GenMedError(f"the masks have different shapes, {prediction.shape} and {truth.shape}.")
    return np.asarray(prediction, dtype=bool), np.asarray(truth, dtype=bool)


def _surface_scores(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float
) -> tuple[float, float]:
    """(HD95 in mm, NSD). A single slice is compared by its contours, not as a thin slab."""
    prediction, truth = _masks(prediction, truth)
    if prediction.ndim == 3 and prediction.shape[2] == 1:
        prediction, truth, spacing_mm = prediction[..., 0], truth[..., 0], spacing_mm[:2]
    if not prediction.any() or not truth.any():
        both_empty = not prediction.any() and not truth.any()
        return (0.0, 1.0) if both_empty else (math.inf, 0.0)
    import surface_distance

    distances = surface_distance.compute_surface_distances(truth, prediction, spacing_mm)
    distance_mm = surface_distance.compute_robust_hausdorff(distances, 95)
    surface_share = surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm)
    return float(distance_mm), float(surface_share)


def _case_scores(
    id: str, prediction: Volume, truth: Volume, labels: Mapping[int, str], tolerance_mm: float
) -> list[Score]:
    require_same_grid(truth, prediction)
    voxel_ml = abs(float(np.linalg.det(truth.affine[:3, :3]))) / 1000
    scores = []
    for value, name in labels.items():
        p, t = prediction.data[0] == value, truth.data[0] == value
        distance_mm, surface_share = _surface_scores(p, t, truth.spacing_mm, tolerance_mm)
        volumes_ml = (np.count_nonzero(p) * voxel_ml, np.count_nonzero(t) * voxel_ml)
        scores.append(Score(id, value, name, dice(p, t), distance_mm, surface_share, *volumes_ml))
    return scores


def _pairs(
    predictions_dir: Path, truth_dir: Path, cases: Iterable[str] | None
) -> list[tuple[str, Path, Path]]:
    predicted, true = _files(predictions_dir), _files(truth_dir)
    ids = sorted(set(cases)) if cases is not None else sorted(set(predicted) | set(true))
    for found, folder in ((predicted, predictions_dir), (true, truth_dir)):
        if missing := [id for id in ids if id not in found]:
            raise GenMedError(
                f"{folder}: lacks {len(missing)} of {len(ids)} cases, such as '{missing[0]}'; "
                "add them, or give the ids to evaluate."
            )
    return [(id, predicted[id], true[id]) for id in ids]


def _files(folder: Path) -> dict[str, Path]:
    """Label files of a folder by id; hidden files and `genmed segment --probabilities` are not labels."""
    if not folder.is_dir():
        raise GenMedError(f"{folder}: is not a folder; give a folder of label maps such as ID.nii.gz.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((e for e in LABEL_ENDINGS if path.name.endswith(e)), None)
        if ending is not None and not path.name.startswith(".") and ".probabilities" not in path.name:
            found[path.name.removesuffix(ending)] = path
    if not found:
        raise GenMedError(f"{folder}: holds no label maps; expected files such as ID.nii.gz.")
    return found


def _occurring_labels(pairs: list[tuple[str, Path, Path]]) -> dict[int, str]:
    """Values but 0 in any file, named as the file headers name them."""
    names: dict[int, str] = {}
    values: set[int] = set()
    for _, *paths in track(pairs, "Listing labels"):
        for volume in map(read_labels, paths):
            values.update(int(value) for value in np.unique(volume.data))
            names.update(volume.label_names)
    return {value: names.get(value, str(value)) for value in sorted(values - {0})}


def _write_csv(path: Path, scores: list[Score]) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, [field.name for field in fields(Score)], lineterminator="\n")
    writer.writeheader()
    for score in scores:
        row = asdict(score)
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_bytes(path, table.getvalue().encode("utf-8"))
