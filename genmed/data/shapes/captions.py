"""Captions of shapes from facts: what it is, which side, what was found, how large and how long.

Words such as "large" compare a shape with its own category in the training part: they are its terciles there.
Everything is a function of the facts; nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

import numpy as np

TEMPLATES = (
    "{name}",
    "{a_name}{findings}",
    "{size} {name}{findings}",
    "{a_form} {name}",
    "{name}{findings}, {volume}",
    "{size} {name}, {volume}, {form}",
    "This is {a_size}, {form} {name}{findings}; it holds {volume} and is {extent} long.",
    "The shape of {a_name}{findings}, from the {source} data.",
)
HELD_OUT_TEMPLATES = (
    "Somebody's {name}{findings}, from end to end {extent}",
    "{a_form} {name} of {volume}{findings}, rather {size}",
)
SIZES = ("small", "medium-sized", "large")
FORMS = ("compact", "moderately elongated", "elongated")
FEWEST = 6  # training shapes of a category, or there are no terciles


@dataclass(frozen=True)
class Facts:
    """What is known of a shape; None is unknown. `findings` map "tumour" to whether there is one."""

    category: str
    side: str
    source: str
    volume_ml: float | None
    extent_mm: float | None
    elongation: float
    findings: Mapping[str, bool]


@dataclass(frozen=True)
class Terciles:
    """Bounds between the thirds of a category's training shapes; None where there are too few."""

    volume_ml: tuple[float, float] | None
    elongation: tuple[float, float] | None

    @classmethod
    def of(cls, training: Sequence[Facts]) -> Terciles:
        volumes = [facts.volume_ml for facts in training if facts.volume_ml is not None]
        return cls(_thirds(volumes), _thirds([facts.elongation for facts in training]))


def captions(facts: Facts, terciles: Terciles) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Captions for training, and those in phrasings that training never sees.

    A template that needs a word that is not known is left out, so both may be short, but the first is never empty.
    """
    words = _words(facts, terciles)
    seen, held_out = (
        tuple(dict.fromkeys(template.format(**words) for template in templates if _needs(template) <= words.keys()))
        for templates in (TEMPLATES, HELD_OUT_TEMPLATES)
    )
    return seen, held_out


def _needs(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name}


def _words(facts: Facts, terciles: Terciles) -> dict[str, str]:
    name = f"{facts.side} {facts.category}" if facts.side in ("left", "right") else facts.category
    words = {"name": name, "a_name": _with_article(name), "source": facts.source, "findings": _findings(facts)}
    if facts.volume_ml is not None:
        words["volume"] = f"{_rounded(facts.volume_ml)} ml"
        if terciles.volume_ml:
            words["size"] = SIZES[_third(facts.volume_ml, terciles.volume_ml)]
            words["a_size"] = _with_article(words["size"])
    if facts.extent_mm is not None:
        words["extent"] = f"{_rounded(facts.extent_mm)} mm"
    if terciles.elongation:
        words["form"] = FORMS[_third(facts.elongation, terciles.elongation)]
        words["a_form"] = _with_article(words["form"])
    return words


def _findings(facts: Facts) -> str:
    present, absent = (
        [_with_article(name) for name, there in sorted(facts.findings.items()) if there == wanted]
        for wanted in (True, False)
    )
    if present:
        return f" with {' and '.join(present)}"
    return f" without {' or '.join(absent)}" if absent else ""


def _with_article(words: str) -> str:
    return f"{'an' if words[:1].lower() in 'aeio' else 'a'} {words}"


def _rounded(value: float) -> str:
    """Two significant digits, without an exponent."""
    return f"{float(f'{value:.2g}'):g}" if value < 1e5 else f"{value:.0f}"


def _thirds(values: Sequence[float]) -> tuple[float, float] | None:
    if len(values) < FEWEST:
        return None
    low, high = np.quantile(np.asarray(values, dtype=np.float64), [1 / 3, 2 / 3])
    return float(low), float(high)


def _third(value: float, bounds: tuple[float, float]) -> int:
    return int(np.searchsorted(bounds, value, side="right"))
