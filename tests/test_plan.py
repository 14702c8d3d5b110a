import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genmed.errors import GenMedError
from genmed.plan import PRESETS, Plan

PLAN = Plan(
    name="hippocampus",
    channels=("MRI",),
    labels=("background", "anterior", "posterior"),
    label_values=(0, 1, 2),
    spacing_mm=(1.0, 1.0, 1.0),
    patch=(40, 56, 40),
    widths=(16, 32, 64, 96),
    batch=2,
    steps=100,
    learning_rate=1e-3,
    thick_slices=False,
    extent_mm=(43.0, 59.0, 47.0),
)


def entries(**changes: object) -> str:
    return json.dumps(json.loads(PLAN.to_json()) | changes)


@given(
    name=st.text(min_size=1).filter(str.strip),
    spacing=st.tuples(*[st.floats(0.01, 50)] * 3),
    levels=st.integers(1, 5),
    steps=st.integers(1, 10**9),
    thick=st.booleans(),
)
def test_json_round_trip_is_exact(
    name: str, spacing: tuple[float, float, float], levels: int, steps: int, thick: bool
) -> None:
    plan = replace(PLAN, name=name, spacing_mm=spacing, steps=steps, thick_slices=thick)
    plan = replace(plan, widths=(8,) * levels, patch=(80, 96, 48))
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_file_is_read_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json(), encoding="utf-8")
    assert Plan.from_json(path) == Plan.from_json(str(path)) == PLAN


def test_keys_with_defaults_may_be_left_out() -> None:
    short = {k: v for k, v in json.loads(PLAN.to_json()).items() if k not in ("seed", "sigma_max")}
    assert Plan.from_json(json.dumps(short)) == PLAN


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", ""),
        ("channels", []),
        ("channels", "MRI"),
        ("channels", ["MRI", "MRI"]),
        ("labels", ["liver", "background", "spleen"]),
        ("labels", ["background", "liver", "liver"]),
        ("label_values", [0, 1]),
        ("label_values", [0, 1, 1]),
        ("label_values", [0, 1, 2.5]),
        ("label_values", [0, 1, True]),
        ("spacing_mm", [1, 1]),
        ("spacing_mm", [1, 1, 0]),
        ("spacing_mm", [1, 1, "1"]),
        ("patch", [40, 56, 41]),
        ("patch", [40.0, 56.0, 40.0]),
        ("widths", []),
        ("batch", 0),
        ("batch", True),
        ("steps", "many"),
        ("learning_rate", float("nan")),
        ("learning_rate", -1),
        ("thick_slices", 1),
        ("extent_mm", [43, 59, float("inf")]),
        ("norm_groups", 5),
        ("norm_groups", -1),
        ("sigma_min", 50.0),
        ("licence", None),
        ("seed", -1),
        ("temperature", 0),
        ("volume_error", [0.1, -0.1]),
        ("volume_error", [0.1]),
        ("format_version", 2),
        ("colour", "red"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_key(key: str, value: object) -> None:
    with pytest.raises(GenMedError, match=f"'{key}'"):
        Plan.from_json(entries(**{key: value}))


@pytest.mark.parametrize("key", ["name", "patch", "thick_slices", "extent_mm"])
def test_a_missing_entry_is_named(key: str) -> None:
    short = {k: v for k, v in json.loads(PLAN.to_json()).items() if k != key}
    with pytest.raises(GenMedError, match=f"'{key}' is missing"):
        Plan.from_json(json.dumps(short))


def test_a_changed_copy_is_validated_too() -> None:
    assert replace(PLAN, batch=4).batch == 4
    with pytest.raises(GenMedError, match="'patch'"):
        replace(PLAN, widths=(16, 32, 64, 96, 128))


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"name": 3'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(GenMedError, match=r"plan\.json"):
        Plan.from_json(path)
    with pytest.raises(GenMedError, match=r"absent\.json"):
        Plan.from_json(tmp_path / "absent.json")


def test_every_message_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{\n\n")
    with pytest.raises(GenMedError) as error:
        Plan.from_json(tmp_path / "plan.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_valid_plans(name: str) -> None:
    size = PRESETS[name]
    plan = replace(PLAN, **size._asdict())
    assert plan.patch_multiple == (8, 8, 8)
