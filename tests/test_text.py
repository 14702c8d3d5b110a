"""Sentence embeddings offline, and which structure a text names."""

import socket

import pytest
import torch

from genmed import text
from genmed.errors import GenMedError
from genmed.text import Named, embed, understand

KNOWN = {"kidney": ("left", "right"), "femur": ("right",), "ventricle": (), "fourth ventricle": ()}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("left kidney with a tumour", Named("kidney", "left")),
        ("A small RIGHT kidney.", Named("kidney", "right")),
        ("two kidneys", Named("kidney", "")),
        ("renal shape", Named("kidney", "")),
        ("left femur", Named("femur", "")),  # there is none in training
        ("the fourth ventricle", Named("fourth ventricle", "")),
        ("a ventricle", Named("ventricle", "")),
        ("spleen", None),
        ("linke Niere", None),
        ("左肾", None),
        ("kidney and femur", None),
        ("", None),
    ],
)
def test_a_text_names_one_known_structure_or_none(words: str, named: Named | None) -> None:
    assert understand(words, KNOWN) == named


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
    with pytest.raises(GenMedError, match=r"genmed\[text\]"):
        embed(["kidney"])
    text._encoder.cache_clear()
