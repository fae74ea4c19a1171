"""Warnings of images, counted: how many images have any, and of which kinds.

What a model says of a request holds words of the prompt: an unknown word, the tail it did not read. So there can be as many
texts as images; a kind is a text without what belongs to one request. What is counted is bounded, whatever prompts hold.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

#: As many different texts, and kinds, are counted by themselves; those that come later under `OTHER`.
MAX_KINDS = 10_000
#: Longest kind.
MAX_KIND_CHARS = 200
#: Stands for what is too rare to be told apart.
OTHER = "other warnings"

_QUOTED = re.compile(r"""'[^']*'|"[^"]*\"""")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def kind_of(warning: str) -> str:
    """`warning` without what is of one request: what follows its first ": ", quoted words, numbers.

    "unknown word: 'zorgon'" is of the kind "unknown word", "only 4 of 7 are drawn: 'cat'" of "only N of N are drawn".
    """
    head = warning.partition(": ")[0]
    return _NUMBER.sub("N", _QUOTED.sub("'...'", head)).strip()[:MAX_KIND_CHARS] or OTHER


class WarningCounts:
    """Of the images that were added.

    Attributes:
        images: how many have a warning.
        texts: images by warning, as it was said.
        kinds: images by kind; an image with two warnings of a kind counts once.
    """

    def __init__(self) -> None:
        self.images = 0
        self.texts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()

    def add(self, warnings: pa.ChunkedArray | pa.Array) -> None:
        """Count the warnings of images: a list of texts, or null, for each."""
        lists = warnings.combine_chunks() if isinstance(warnings, pa.ChunkedArray) else warnings
        image = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
        if not len(image):
            return
        texts = pc.list_flatten(lists).fill_null("").dictionary_encode()
        names = texts.dictionary.to_pylist()
        code = texts.indices.to_numpy(zero_copy_only=False)
        self.images += len(np.unique(image))
        _count(self.texts, zip(names, np.bincount(code, minlength=len(names)).tolist(), strict=True))
        kinds: dict[str, int] = {}
        kind_of_code = np.array([kinds.setdefault(kind_of(name), len(kinds)) for name in names])
        of_images = np.unique(np.stack([image, kind_of_code[code]], axis=1), axis=0)[:, 1]
        _count(self.kinds, zip(kinds, np.bincount(of_images, minlength=len(kinds)).tolist(), strict=True))


def _count(counts: Counter[str], found: Iterable[tuple[str, int]]) -> None:
    for name, n in found:
        counts[name if name in counts or len(counts) < MAX_KINDS else OTHER] += n
