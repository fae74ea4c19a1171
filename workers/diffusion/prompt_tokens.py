"""What of a prompt each text encoder of a pipeline reads: a fixed number of tokens, and not the words behind them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: Most characters of lost words that a warning repeats.
MAX_LOST_CHARS = 1000

#: A tokenizer without a limit has one of 1e30.
UNLIMITED = 1_000_000

#: Tokens that pipelines read at most where neither their arguments nor their tokenizer say it: by class, then by tokenizer.
LIMITS: Mapping[str, Mapping[str, int]] = {
    "IFPipeline": {"tokenizer": 77},
    "HunyuanDiTPipeline": {"tokenizer": 77, "tokenizer_2": 256},
    "Kandinsky3Pipeline": {"tokenizer": 128},
    "LDMTextToImagePipeline": {"tokenizer": 77},
    "PRXPipeline": {"tokenizer": 256},
}

#: Tokenizers by the name of the encoder they belong to, in the order of importance.
TOKENIZERS = (
    *("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4", "prior_tokenizer"),
    "text_tokenizer",
)


@dataclass(frozen=True)
class TextReader:
    """One text encoder's reading of prompts.

    Attributes:
        name: of the encoder, as diffusers calls it.
        tokenizer: of transformers.
        max_tokens: how many it reads, special ones included.
        embed: what the pipeline makes of a prompt before it cuts it into tokens: an instruction before it, a template
            around it.
    """

    name: str
    tokenizer: Any
    max_tokens: int
    embed: Callable[[str], str] = str

    def count(self, prompt: str) -> int:
        """How many tokens `prompt` is, special ones included."""
        return len(self.tokenizer(self.embed(prompt), verbose=False).input_ids)

    def lost(self, prompt: str) -> str:
        """The end of `prompt` that is not read; empty where all is."""
        if self.embed is str and len(prompt.encode()) + 3 < self.max_tokens:
            return ""  # no token is shorter than a byte
        text = self.embed(prompt)
        if len(self.tokenizer(text, verbose=False).input_ids) <= self.max_tokens:
            return ""
        start = text.rfind(prompt) if prompt else len(text)
        if not getattr(self.tokenizer, "is_fast", False):
            read = self.tokenizer(text, truncation=True, max_length=self.max_tokens).input_ids
            kept = self.tokenizer.decode(read, skip_special_tokens=True)
            return text[max(len(kept), start) : start + len(prompt)].strip()
        offsets = self.tokenizer(
            text, truncation=True, max_length=self.max_tokens, return_offsets_mapping=True, verbose=False
        ).offset_mapping
        end = max((stop for _, stop in offsets), default=0)
        return text[max(end, start) : start + len(prompt)].strip()


@dataclass(frozen=True)
class PromptReader:
    """All text encoders of a pipeline; `readers` is empty where its tokenizers cannot be asked."""

    readers: tuple[TextReader, ...]

    def lost(self, prompt: str) -> str:
        """The end of `prompt` that no encoder reads."""
        return min((reader.lost(prompt) for reader in self.readers), key=len, default="")

    def lengths(self, prompt: str) -> tuple[int, ...]:
        """How many tokens of `prompt` each encoder reads: prompts that agree in them are padded alike."""
        return tuple(min(reader.count(prompt), reader.max_tokens) for reader in self.readers)

    def warnings(self, prompt: str, what: str = "prompt") -> tuple[str, ...]:
        """One warning for each way in which `prompt` is not read to its end, with the words that are lost."""
        lost = [(reader, reader.lost(prompt)) for reader in self.readers]
        cut = [(reader, words) for reader, words in lost if words]
        if not cut:
            return ()
        if len(cut) == len(lost):
            reader, words = min(cut, key=lambda pair: len(pair[1]))
            return (
                f"the {what} is {reader.count(prompt)} tokens long, this model reads the first {reader.max_tokens}: "
                f"lost are {_shortened(words)!r}",
            )
        whole = " and ".join(reader.name for reader, words in lost if not words)
        limits = {reader.max_tokens: (reader, words) for reader, words in cut}
        return tuple(
            f"{' and '.join(r.name for r, _ in cut if r.max_tokens == limit)} read the first {limit} tokens of the {what}, "
            f"{whole} the whole: not read by all are {_shortened(words)!r}"
            for limit, (_, words) in limits.items()
        )

    def unknown_words(self, prompt: str) -> tuple[str, ...]:
        """Words of `prompt` for which the first encoder has no token."""
        tokenizer = self.readers[0].tokenizer if self.readers else None
        unknown = getattr(tokenizer, "unk_token_id", None)
        if tokenizer is None or unknown is None:
            return ()
        return tuple(
            word.strip(".,;:!?()")
            for word in dict.fromkeys(prompt.split())
            if unknown in tokenizer(word, add_special_tokens=False, verbose=False).input_ids
        )


def open_prompt_reader(pipeline: Any) -> PromptReader:
    """The text encoders of `pipeline`, by what its class is known to do, its arguments and its tokenizers say."""
    name = type(pipeline).__name__
    parameters = inspect.signature(pipeline.__call__).parameters
    stated = parameters["max_sequence_length"].default if "max_sequence_length" in parameters else None
    readers = []
    for part in TOKENIZERS:
        tokenizer = getattr(pipeline, part, None)
        if not callable(tokenizer) or not isinstance(getattr(tokenizer, "model_max_length", None), int):
            continue
        limit = LIMITS.get(name, {}).get(part)
        if limit is None:
            own = int(tokenizer.model_max_length)
            limit = own if "CLIP" in type(tokenizer).__name__ or not isinstance(stated, int) else stated
        if limit < UNLIMITED:
            encoder = part.replace("tokenizer", "text_encoder")
            embed, more = _EMBEDDED.get(name, _plain)(pipeline, tokenizer)
            readers.append(TextReader(encoder, tokenizer, limit + more, embed))
    return PromptReader(tuple(readers))


def _plain(pipeline: Any, tokenizer: Any) -> tuple[Callable[[str], str], int]:
    return str, 0


def _with_instruction(pipeline: Any, tokenizer: Any) -> tuple[Callable[[str], str], int]:
    """SANA: an instruction of many tokens stands before the prompt, and all but two of them are allowed for."""
    parameters = inspect.signature(pipeline.__call__).parameters
    lines = parameters["complex_human_instruction"].default
    if not lines:
        return str, 0
    instruction = "\n".join(lines)
    return lambda prompt: instruction + prompt, len(tokenizer(instruction).input_ids) - 2


def _in_chat(pipeline: Any, tokenizer: Any) -> tuple[Callable[[str], str], int]:
    """Z-Image: the prompt is what a user says in a chat, whose marks are read, too."""

    def embed(prompt: str) -> str:
        said = [{"role": "user", "content": prompt}]
        return str(
            tokenizer.apply_chat_template(
                said, tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
        )

    return embed, 0


def _after_system_prompt(pipeline: Any, tokenizer: Any) -> tuple[Callable[[str], str], int]:
    """Lumina: a sentence to the assistant stands before the prompt, and is read first."""
    return lambda prompt: f"{pipeline.system_prompt} <Prompt Start> {prompt}", 0


_EMBEDDED: Mapping[str, Callable[[Any, Any], tuple[Callable[[str], str], int]]] = {
    "SanaPipeline": _with_instruction,
    "SanaPAGPipeline": _with_instruction,
    "SanaSprintPipeline": _with_instruction,
    "ZImagePipeline": _in_chat,
    "Lumina2Pipeline": _after_system_prompt,
}


def _shortened(words: str) -> str:
    return words if len(words) <= MAX_LOST_CHARS else words[: MAX_LOST_CHARS - 3] + "..."
