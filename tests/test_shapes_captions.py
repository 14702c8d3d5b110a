from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genmed.data.shapes.captions import FEWEST, HELD_OUT_TEMPLATES, TEMPLATES, Facts, Terciles, captions

KIDNEY = Facts("kidney", "left", "KiTS23", 214.3, 118.2, 1.9, {"tumour": True, "cyst": False})
KNOWN = Terciles((150.0, 200.0), (1.7, 1.95))


def test_captions_say_what_is_known_and_nothing_else() -> None:
    seen, held_out = captions(KIDNEY, KNOWN)
    assert seen == (
        "left kidney",
        "a left kidney with a tumour",
        "large left kidney with a tumour",
        "a moderately elongated left kidney",
        "left kidney with a tumour, 210 ml",
        "large left kidney, 210 ml, moderately elongated",
        "This is a large, moderately elongated left kidney with a tumour; it holds 210 ml and is 120 mm long.",
        "The shape of a left kidney with a tumour, from the KiTS23 data.",
    )
    assert held_out == (
        "Somebody's left kidney with a tumour, from end to end 120 mm",
        "a moderately elongated left kidney of 210 ml with a tumour, rather large",
    )


def test_without_scale_or_training_shapes_the_words_for_them_are_missing() -> None:
    adrenal = Facts("adrenal gland", "", "adrenal", None, None, 1.4, {"mass": False})
    seen, held_out = captions(adrenal, Terciles(None, None))
    assert seen == ("adrenal gland", "an adrenal gland without a mass",
                    "The shape of an adrenal gland without a mass, from the adrenal data.")  # fmt: skip
    assert held_out == ()


def test_all_findings_are_named() -> None:
    both = captions(replace(KIDNEY, findings={"tumour": True, "cyst": True}), KNOWN)[0]
    neither = captions(replace(KIDNEY, findings={"tumour": False, "cyst": False}), KNOWN)[0]
    assert both[1] == "a left kidney with a cyst and a tumour"
    assert neither[1] == "a left kidney without a cyst or a tumour"


def test_no_phrasing_is_both_trained_on_and_held_out() -> None:
    seen, held_out = captions(KIDNEY, KNOWN)
    assert not set(TEMPLATES) & set(HELD_OUT_TEMPLATES) and not set(seen) & set(held_out)


def test_terciles_divide_the_training_shapes_in_thirds() -> None:
    training = [replace(KIDNEY, volume_ml=float(v), elongation=1 + v / 100) for v in range(1, 91)]
    terciles = Terciles.of(training)
    words = [captions(facts, terciles)[0][2].split()[0] for facts in training]
    assert [words.count(word) for word in ("small", "medium-sized", "large")] == [30, 30, 30]
    assert words == sorted(words, key=["small", "medium-sized", "large"].index)
    assert Terciles.of(training[: FEWEST - 1]) == Terciles(None, None)


@given(
    volume_ml=st.floats(1e-3, 1e4),
    extent_mm=st.floats(1, 1000),
    elongation=st.floats(1, 20),
    side=st.sampled_from(["left", "right", "midline", ""]),
    findings=st.dictionaries(st.sampled_from(["tumour", "cyst", "aneurysm"]), st.booleans()),
)
def test_captions_are_whole_whatever_the_facts(
    volume_ml: float, extent_mm: float, elongation: float, side: str, findings: dict[str, bool]
) -> None:
    facts = Facts("aorta", side, "somewhere", volume_ml, extent_mm, elongation, findings)
    seen, held_out = captions(facts, KNOWN)
    assert (seen, held_out) == captions(facts, KNOWN)
    for caption in (*seen, *held_out):
        assert not set("{}") & set(caption) and "  " not in caption and "None" not in caption and "e-" not in caption
        assert "aorta" in caption and ("left" in caption) == (side == "left")
        assert " a a" not in caption and not caption.startswith("a a")


@pytest.mark.parametrize(("volume_ml", "text"), [(0.0567, "0.057 ml"), (4.06, "4.1 ml"), (1316.0, "1300 ml")])
def test_volumes_have_two_digits(volume_ml: float, text: str) -> None:
    assert captions(replace(KIDNEY, volume_ml=volume_ml), KNOWN)[0][5].split(", ")[1] == text
