"""Sentence embeddings offline, and which structure a text names."""

import socket
from dataclasses import replace

import pytest
import torch

from genmed import text
from genmed.data.shapes.captions import Facts, Terciles, captions
from genmed.errors import GenMedError
from genmed.text import Named, embed, stated_ml, understand

KNOWN = {
    "kidney": ("left", "right"), "femur": ("right",), "ventricle": (), "fourth ventricle": (), "left atrium": (),
    "brain stem": (), "adrenal gland": ("left", "right"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("left kidney with a tumour", Named("kidney", "left")),
        ("A small RIGHT kidney.", Named("kidney", "right")),
        ("two kidneys", Named("kidney", "")),
        ("renal shape", Named("kidney", "")),
        ("right femur", Named("femur", "right")),
        ("left kidney of 150 cm³", Named("kidney", "left")),
        ("the fourth ventricle", Named("fourth ventricle", "")),
        ("a ventricle", Named("ventricle", "")),
        ("left kidney without a tumour or a cyst, 150 ml", Named("kidney", "left")),
        ("The shape of a left atrium of the human heart", Named("left atrium", "")),
        ("left heart atrium", Named("left atrium", "")),
        ("left atrial shape", Named("left atrium", "")),
        ("the shape of a brain stem with no lesions", Named("brain stem", "")),
        ("This is a small right kidney, not a large one", Named("kidney", "right")),
        ("suprarenal gland", Named("adrenal gland", "")),
    ],
)
def test_a_text_names_one_known_structure(words: str, named: Named) -> None:
    assert understand(words, KNOWN) == named


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("spleen", "names no structure that this model knows (kidney, femur, ventricle"),
        ("linke Niere", "names no structure"),
        ("左肾", "names no structure"),
        ("", "names no structure"),
        ("right atrium", "names no structure"),
        ("kidney and femur", "names several structures (kidney, femur)"),
        ("renal artery", "also says 'artery'"),
        ("femoral arteries", "also says 'arteries'"),
        ("suprarenal aorta", "also says 'aorta'"),
        ("liver and spleen beside the kidney", "also says 'liver'"),
        ("kidney and heart", "also says 'heart'"),
        ("right atrium to the left", "has another side than the left atrium"),
        ("left femur", "says 'left', but this model knows no left femur"),
        ("left and right femur", "no left femur"),
        ("left brain stem", "says 'left', but this model knows no left brain stem"),
        ("right fourth ventricle", "knows no right fourth ventricle"),
        ("linke kidney", "has words of another language ('linke'), so that kidney may not be meant"),
        ("left kidney mit Tumor", "another language ('mit')"),
        ("brainstem à droite", "another language ('à')"),
        ("Femur izquierdo", "another language ('izquierdo')"),
        ("rein gauche", "names no structure"),
        ("riñón izquierdo", "names no structure"),
        ("kidney 左", "another language"),
        ("kidney stone", "says 'stone'"),
        ("tumour of the left kidney", "says 'tumour'"),
        ("not a kidney", "says 'not'"),
        ("abdomen without a left kidney", "says 'without'"),
        ("this isn't the shape of a femur", "says 'isn'"),
    ],
)
def test_a_text_of_something_else_is_not_understood(words: str, why: str) -> None:
    found = understand(words, KNOWN)
    assert isinstance(found, str) and why in found


def test_a_model_with_names_of_another_language_understands_them() -> None:
    assert understand("rein gauche", {"rein": (), "rein gauche": ()}) == Named("rein gauche", "")
    assert understand("left Riñón", {"riñón": ("left",)}) == Named("riñón", "left")


def test_all_captions_of_a_structure_are_understood() -> None:
    facts = Facts("kidney", "left", "kits23", 150.0, 110.0, 1.5, {"tumour": True, "cyst": True})
    bounds = Terciles((100.0, 200.0), (1.0, 2.0))
    for findings in ({}, {"tumour": True, "cyst": False}, {"mass or hyperplasia": False}):
        for texts in captions(replace(facts, findings=findings), bounds):
            assert {understand(text, KNOWN) for text in texts} == {Named("kidney", "left")}


def test_embeddings_are_those_of_the_reference_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """sentence-transformers 6.2.0 with the same weights gave the first numbers."""

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", no_network)
    found = embed(["left kidney with a tumour", "a femur"])
    assert found.shape == (2, 384)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(found[:, :4], torch.tensor(REFERENCE), atol=2e-4, rtol=0)


REFERENCE = [[-0.004339, 0.022272, 0.029231, -0.047195], [-0.061562, 0.078570, -0.030708, 0.036166]]


def test_an_embedding_does_not_depend_on_its_batch() -> None:
    texts = ["left kidney", "This is a large, compact right femur; it holds 300 ml and is 420 mm long."]
    torch.testing.assert_close(embed(texts), torch.cat([embed([one]) for one in texts]), atol=1e-5, rtol=0)


def test_a_missing_package_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PACKAGE", "no_such_package")
    text._encoder.cache_clear()
    with pytest.raises(GenMedError, match=r"'\.\[text\]'"):
        embed(["kidney"])
    text._encoder.cache_clear()


@pytest.mark.parametrize(
    ("text", "volume_ml"),
    [
        ("left kidney, 150 ml", 150),
        ("an elongated left kidney of 150.5ml without a tumour, rather large", 150.5),
        ("0.2 l left kidney with a 20 ml tumour", 200),
        ("a kidney of 90 cm³", 90),
        ("a kidney of 90 cc, 95 mm long", 90),
        ("a kidney of 90 or 95 ml", 95),
        ("a kidney of 1-90 ml", None),  # a range
        ("90 ml or 95 ml", None),
        ("a kidney, 0 ml", None),
        ("a kidney, 95 mm long", None),
        ("left kidney", None),
    ],
)
def test_volumes_in_words(text: str, volume_ml: float | None) -> None:
    assert stated_ml(text) == volume_ml
