"""What a word that a user gives for a model, a decoder or a LoRA stands for: told from its form and from what lies here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from millijoule.workers.errors import InputError
from millijoule.workers.storage.open import is_s3_url
from millijoule.workers.visible_text import without_secrets

#: Endings of files that can run code when they are read.
PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")

_PART = r"[A-Za-z0-9](?:[\w.\-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?:/(.+))?")


@dataclass(frozen=True)
class Place:
    """Where something lies.

    Attributes:
        kind: "here" (a path of this machine), "s3" or "hub".
        word: as it was given.
        repository: "owner/name" on the hub.
        file: in the repository; None: all of it.
    """

    kind: Literal["here", "s3", "hub"]
    word: str
    repository: str = ""
    file: str | None = None


def find_place(option: str, word: str) -> Place:
    """What `word`, given to `option`, stands for. A path that exists is that path, whatever else it looks like.

    Raises:
        InputError: it is nothing of the kind.
    """
    if is_s3_url(word):
        refuse_pickled(option, word)
        return Place("s3", word)
    if Path(word).expanduser().exists():
        return Place("here", word)
    match = _HUB_ID.fullmatch(word)
    if match is None or (match[2] is None and word.endswith((".safetensors", *PICKLED))):
        raise InputError(f"{option} {without_secrets(word)}: no such file or directory")
    refuse_pickled(option, word)
    if match[2] is not None and not match[2].endswith(".safetensors"):
        raise InputError(
            f"{option} {word}: no such file or directory; of a hub's model a .safetensors file can be named behind its id"
        )
    return Place("hub", word, match[1], match[2])


def refuse_pickled(option: str, word: str) -> None:
    """Raise InputError for the name of a pickled file, before it is fetched."""
    if word.endswith(PICKLED):
        raise InputError(
            f"{option} {word}: a pickled file; loading one can run any code, so it is not read. Give the weights as "
            ".safetensors"
        )
