"""What the columns of a prompt file mean, going by their names.

Names are people's: `CFG Scale`, `negative-prompt` and `Seed` are what they look like. A name is settled once per file, and
two columns of one meaning are refused rather than chosen from.
"""

from __future__ import annotations

import itertools
import logging
import re
import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

from millijoule.pipeline.planning.raw_chunks import RawChunk
from millijoule.workers.errors import InputError

log = logging.getLogger(__name__)

#: The names a column may have in a file, ours first, as they are documented; `folded` says what else is the same name.
COLUMN_NAMES = {
    "prompt": ("prompt", "prompts", "text", "caption"),
    "prompt_id": ("prompt_id", "id", "custom_id"),
    "negative_prompt": ("negative_prompt",),
    "seed": ("seed",),
    "num_images": ("num_images", "n"),
    "width": ("width",),
    "height": ("height",),
    "size": ("size", "image_size"),
    "num_inference_steps": ("num_inference_steps", "steps", "step"),
    "guidance_scale": ("guidance_scale", "cfg_scale", "cfg", "cfgs"),
    "lora": ("lora", "loras"),
}

#: What other programs let a row ask for and a job here cannot give it. Passed through, and said.
NOT_USED = (
    *("sampler", "sampler_name", "sampling_method", "scheduler", "schedule_type", "eta"),
    *("model", "model_name", "model_id", "model_hash", "checkpoint", "vae", "refiner"),
    *("lora", "loras", "lora_scale", "embeddings", "hypernetwork", "controlnet", "ip_adapter"),
    *("clip_skip", "subseed", "subseed_strength", "batch_size", "batch_count", "n_iter", "aspect_ratio"),
    *("init_image", "mask", "strength", "denoising_strength", "hires_fix", "hires_upscale", "restore_faces"),
    *("styles", "style", "quality", "output_format", "response_format"),
)

#: Columns that a message lists.
_SHOWN_NAMES = 30

_SEPARATORS = re.compile(r"[\s_\-]+")


@lru_cache(4096)  # JSON can have new names in every record
def folded(name: str) -> str:
    """`name` without regard to case, spaces, `_` and `-`. A leading `_` stays: it marks a column as a program's own."""
    start = "_" if name.startswith("_") else ""
    return start + _SEPARATORS.sub("", name).casefold()


_MEANINGS = {folded(name): ours for ours, names in COLUMN_NAMES.items() for name in names}
_NOT_USED = frozenset(map(folded, NOT_USED))


class Remarks:
    """What a person should know about how files are read, logged when it is met and once only.

    A hundred part files with a column `Prompt`, or a second pass over them, are one remark.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()

    def add(self, file: str, text: str, *, key: str | None = None, level: int = logging.INFO) -> None:
        """Say `text` about `file`, unless something with the same `key`, by default the text, was said before."""
        if self.is_new(key or text):
            log.log(level, "%s: %s", file, text)

    def is_new(self, key: str) -> bool:
        """Whether this is the first time that `key` is asked about."""
        if key in self._said:
            return False
        self._said.add(key)
        return True


@dataclass(frozen=True)
class KnownNames:
    """The meaning of names, given the column that holds the prompt by exact name, if the user named one.

    `loras` says whether there are LoRAs for a column `lora` to choose among.
    """

    prompt_column: str | None = None
    loras: bool = False

    def meaning(self, name: str) -> str | None:
        """Our name of the column, None for one to pass through."""
        if name == self.prompt_column:
            return "prompt"
        ours = _MEANINGS.get(folded(name))
        if ours == "lora" and not self.loras:
            return None
        return None if ours == "prompt" and self.prompt_column is not None else ours

    def hold_prompt(self, names: Iterable[str]) -> bool:
        """Whether one of `names` is the prompt's."""
        return any(self.meaning(name) == "prompt" for name in names)


class FileColumns:
    """Which column of one file has which meaning; `names` maps our names to the file's."""

    def __init__(self, file: str, known: KnownNames, remarks: Remarks) -> None:
        self.file = file
        self.names: dict[str, str] = {}
        self._known = known
        self._remarks = remarks

    def meet(self, chunk: RawChunk) -> None:
        """Take note of the chunk's columns; raises InputError where they are contradictory or hold no prompt."""
        read: list[str] = []
        idle: list[str] = []
        for name in chunk.columns:
            ours = self._known.meaning(name)
            if ours is None:
                if folded(name) in _NOT_USED and self._remarks.is_new(f"not used {name}"):
                    idle.append(name)
                continue
            if ours not in self.names and name != ours:
                read.append(f"column {name!r} is read as {ours}")
            before = self.names.setdefault(ours, name)
            if before != name:
                hint = "remove or rename one of them"
                if ours == "prompt":
                    hint = f"--prompt-column {shlex.quote(before)}"
                raise InputError(
                    f"{self.file}: columns {before!r} and {name!r} both mean {ours!r}; say which one counts: {hint}"
                )
        if "prompt" not in self.names and (chunk.columns or len(chunk.rows)):
            expected = self._known.prompt_column or ", ".join(COLUMN_NAMES["prompt"])
            raise InputError(
                f"{self.file}: no prompt column (looked for {expected}); the file has "
                f"{_some(chunk.columns)}. Name the right one with --prompt-column"
            )
        if read:
            self._remarks.add(self.file, ", ".join(read))
        if idle:
            text = f"not used: {', '.join(idle)} (passed through)"
            self._remarks.add(self.file, text, level=logging.WARNING)

    @property
    def used(self) -> Collection[str]:
        """The file's names of columns that are not passed through. A size is: it may say more than pixels. So are LoRAs: what a
        row asked for stands in the manifest."""
        return [name for ours, name in self.names.items() if ours not in ("size", "lora")]


def _some(names: Collection[str]) -> str:
    rest = f" and {len(names) - _SHOWN_NAMES:,} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(itertools.islice(names, _SHOWN_NAMES)) + rest if names else "no columns"
