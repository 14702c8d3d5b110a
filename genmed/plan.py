"""`Plan`: everything besides the weights that training and inference need, as one JSON file."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from genmed.errors import GenMedError


class Preset(NamedTuple):
    """A network size and the training length that suits it."""

    widths: tuple[int, ...]
    steps: int
    batch: int
    learning_rate: float


Triple = tuple[int, int, int]

PRESETS: dict[str, Preset] = {
    "small": Preset(widths=(16, 32, 64, 96), steps=20_000, batch=2, learning_rate=1e-3),
    "base": Preset(widths=(32, 64, 128, 192), steps=60_000, batch=2, learning_rate=5e-4),
    "large": Preset(widths=(48, 96, 192, 320), steps=150_000, batch=2, learning_rate=3e-4),
}

NORM_GROUPS = 8  # where the coarsest level of a patch is too small for statistics of single channels
AUGMENTATIONS = ("none", "nnunet", "degraded", "randomised", "mixed")  # what `genmed.data.augment` makes of them


def strides(spacing_mm: Sequence[float], levels: int) -> tuple[Triple, ...]:
    """Strides between U-Net levels: an axis is halved once its voxels are less than twice the smallest side.

    Thick slices thus keep their number until the other axes are as coarse (nnU-Net, arXiv 1904.08128).
    """
    sides, result = list(spacing_mm), []
    for _ in range(levels - 1):
        step = [2 if side < 2 * min(sides) else 1 for side in sides]
        sides = [side * s for side, s in zip(sides, step, strict=True)]
        result.append((step[0], step[1], step[2]))
    return tuple(result)


def patch_multiple(strides: Sequence[Triple]) -> Triple:
    """Product of the strides along each axis."""
    x, y, z = (math.prod(step[axis] for step in strides) for axis in range(3))
    return x, y, z


@dataclass(frozen=True)
class Plan:
    """Frozen next to the weights; change a copy with `dataclasses.replace`, which validates again.

    Lengths are in mm, patch sizes in voxels of the working grid. Raises `GenMedError` naming the key.
    """

    name: str
    channels: tuple[str, ...]                 # image channels, in file order
    labels: tuple[str, ...]                   # class names; labels[0] is "background"
    label_values: tuple[int, ...]             # value of each class in label files
    spacing_mm: tuple[float, float, float]    # working grid
    patch: tuple[int, int, int]               # voxels, multiples of 2 ** (len(widths) - 1)
    widths: tuple[int, ...]                   # features per U-Net level, finest first
    batch: int
    steps: int
    learning_rate: float
    thick_slices: bool                        # slice axis last; slice order reversed in half of the training
    extent_mm: tuple[float, float, float]     # the largest field of view seen in training
    norm_groups: int = NORM_GROUPS            # of channels in each norm; 0: each channel by itself
    sigma_min: float = 0.02
    sigma_max: float = 40.0
    licence: str = ""
    source: str = ""
    seed: int = 0
    augmentation: str = "nnunet"              # of training patches, one of `AUGMENTATIONS`
    cases: int = 0                            # training cases of a few-shot draw; 0: the whole training part
    draw: int = 0                             # seed of the few-shot draw
    typical: tuple[float, ...] = ()           # `genmed.surprise.typical` of the tuning cases; empty: not measured
    temperature: float = 1.0                  # of class probabilities: `genmed.calibration.tempered`
    volume_error: tuple[float, ...] = ()      # of every structure: `genmed.calibration.volume_error` of tuning cases
    format_version: int = 1

    def __post_init__(self) -> None:
        for key, (accepts, expected) in _RULES.items():
            if not accepts(getattr(self, key)):
                _fail(key, f"must be {expected}, but is {getattr(self, key)!r}")
        _check_agreement(self)

    @property
    def strides(self) -> tuple[Triple, ...]:
        """By how much each U-Net level after the first halves each axis, as nnU-Net decides it: `strides`."""
        return strides(self.spacing_mm, len(self.widths))

    @property
    def patch_multiple(self) -> Triple:
        """Voxels that each patch side must be a multiple of."""
        return patch_multiple(self.strides)

    def to_json(self) -> str:
        """JSON text, one key a line, readable back by `from_json`."""
        entries = (f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in asdict(self).items())
        return "{\n" + ",\n".join(entries) + "\n}\n"

    @classmethod
    def from_json(cls, source: str | Path) -> "Plan":
        """Read a plan from JSON text (starts with "{") or from a file."""
        if isinstance(source, str) and source.lstrip().startswith("{"):
            return cls._from_text(source)
        path = Path(source)
        try:
            return cls._from_text(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise GenMedError(f"{path}: cannot read the plan ({error}); give a plan.json.") from error
        except GenMedError as error:
            raise GenMedError(f"{path}: {error}") from error

    @classmethod
    def _from_text(cls, text: str) -> "Plan":
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise GenMedError(f"the plan is not valid JSON ({error}); plan again.") from error
        if not isinstance(entries, dict):
            raise GenMedError("the plan must be a JSON object with named keys; plan again.")
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if unknown := sorted(set(entries) - known):
            _fail(unknown[0], "is not a key of a plan; remove it, or update GenMed")
        if missing := sorted(needed - set(entries)):
            _fail(missing[0], "is missing; add it or plan again")
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in entries.items()}
        return cls(**values)


def _fail(key: str, message: str) -> None:
    raise GenMedError(f"plan key '{key}' {message}.")


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_error(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_tuple(of: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    def accepts(value: Any) -> bool:
        if not isinstance(value, tuple) or len(value) != (length or max(len(value), 1)):
            return False
        return all(of(item) for item in value)

    return accepts


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_count(value: Any) -> bool:
    return _is_integer(value, least=1)


def _is_natural(value: Any) -> bool:
    return _is_integer(value, least=0)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_name, "a non-empty text"),
    "channels": (_is_tuple(_is_name), "a non-empty list of channel names"),
    "labels": (_is_tuple(_is_name), "a non-empty list of class names"),
    "label_values": (_is_tuple(_is_natural), "a list of integers, 0 or above"),
    "spacing_mm": (_is_tuple(_is_positive, 3), "three positive numbers (mm)"),
    "patch": (_is_tuple(_is_count, 3), "three positive integers (voxels)"),
    "widths": (_is_tuple(_is_count), "a list of positive integers, one per U-Net level"),
    "batch": (_is_count, "a positive integer"),
    "steps": (_is_count, "a positive integer"),
    "learning_rate": (_is_positive, "a positive number"),
    "thick_slices": (lambda value: isinstance(value, bool), "true or false"),
    "extent_mm": (_is_tuple(_is_positive, 3), "three positive numbers (mm)"),
    "norm_groups": (_is_natural, "an integer, 0 or above"),
    "sigma_min": (_is_positive, "a positive number"),
    "sigma_max": (_is_positive, "a positive number"),
    "licence": (_is_text, "a text"),
    "source": (_is_text, "a text"),
    "seed": (_is_natural, "an integer, 0 or above"),
    "augmentation": (lambda value: value in AUGMENTATIONS, f"one of {', '.join(AUGMENTATIONS)}"),
    "cases": (_is_natural, "an integer, 0 or above"),
    "draw": (_is_natural, "an integer, 0 or above"),
    "typical": (lambda value: value == () or _is_tuple(_is_number)(value), "a list of numbers"),
    "temperature": (_is_positive, "a positive number"),
    "volume_error": (lambda value: value == () or _is_tuple(_is_error)(value), "a list of numbers, 0 or above"),
    "format_version": (lambda value: _is_natural(value) and value == 1, "1 for this GenMed"),
}


def _check_agreement(plan: Plan) -> None:
    if plan.labels[0] != "background":
        _fail("labels", f"must start with 'background', but starts with {plan.labels[0]!r}")
    for key in ("channels", "labels", "label_values"):
        values = getattr(plan, key)
        if len(set(values)) < len(values):
            _fail(key, f"names something twice: {list(values)}")
    if len(plan.label_values) != len(plan.labels):
        _fail("label_values", f"has {len(plan.label_values)} entries for {len(plan.labels)} labels")
    multiple, levels = plan.patch_multiple, len(plan.widths)
    if any(side % m for side, m in zip(plan.patch, multiple, strict=True)):
        _fail("patch", f"{list(plan.patch)} must be multiples of {list(multiple)} for {levels} U-Net levels")
    features = len(plan.labels) + 1 + 9 * len(plan.channels)
    if plan.typical and len(plan.typical) != 2 * features:
        _fail("typical", f"has {len(plan.typical)} numbers for {len(plan.labels)} labels; train again, or leave it out")
    if plan.volume_error and len(plan.volume_error) != len(plan.labels) - 1:
        _fail("volume_error", f"has {len(plan.volume_error)} numbers for {len(plan.labels) - 1} structures")
    if plan.norm_groups and any(width % plan.norm_groups for width in plan.widths):
        _fail("norm_groups", f"({plan.norm_groups}) must divide 'widths' {list(plan.widths)}")
    if plan.sigma_min >= plan.sigma_max:
        _fail("sigma_min", f"({plan.sigma_min}) must be below 'sigma_max' ({plan.sigma_max})")
