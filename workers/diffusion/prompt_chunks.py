"""Prompts longer than CLIP reads, encoded piece by piece: as many pieces as it takes, their states one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def count_chunks(pipeline: Any, text: str) -> int:
    """How many pieces `text` has for the encoder that needs most; at least one."""
    return max(
        -(-len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) // _room(tokenizer)) or 1
        for tokenizer, _ in _encoders(pipeline)
    )


def encode_chunks(
    pipeline: Any, prompts: Sequence[str], negatives: Sequence[str] | None, chunks: int, takes_negatives: bool
) -> dict[str, Tensor]:
    """Arguments that stand for the prompts in a call: states of `[rows, chunks * 77, width]` for CLIP.

    Where a text has fewer than `chunks` pieces, the rest are of the empty prompt. The pooled state, where a pipeline takes
    one, is the first piece's, as in other programs that read prompts in pieces.

    Args:
        pipeline: one of `families.CHUNKED`.
        prompts: of the rows.
        negatives: of the rows; None: there are none.
        chunks: how many pieces each text is given.
        takes_negatives: whether the pipeline has arguments for them.
    """
    states, pooled = _encode(pipeline, prompts, chunks)
    call = {"prompt_embeds": states} | ({"pooled_prompt_embeds": pooled} if pooled is not None else {})
    if not takes_negatives:
        return call
    if negatives is None and getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
        against, pooled = torch.zeros_like(states), None if pooled is None else torch.zeros_like(pooled)
    else:
        against, pooled = _encode(pipeline, negatives or [""] * len(prompts), chunks)
    call["negative_prompt_embeds"] = against
    return call | ({"negative_pooled_prompt_embeds": pooled} if pooled is not None else {})


def _encoders(pipeline: Any) -> list[tuple[Any, Any]]:
    names = ("", "_2")
    pairs = [
        (getattr(pipeline, f"tokenizer{n}", None), getattr(pipeline, f"text_encoder{n}", None)) for n in names
    ]
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if tokenizer is not None]


def _room(tokenizer: Any) -> int:
    return int(tokenizer.model_max_length) - 2  # beside the tokens for start and end


def _encode(pipeline: Any, texts: Sequence[str], chunks: int) -> tuple[Tensor, Tensor | None]:
    """States `[rows, chunks * length, width]`, and the pooled ones of two-encoder pipelines."""
    encoders = _encoders(pipeline)
    all_states, pooled = [], None
    for tokenizer, encoder in encoders:
        pieces = [_pieces(tokenizer, text, chunks) for text in texts]  # [rows, chunks, length]
        ids = torch.tensor(pieces, device=encoder.device).flatten(0, 1)  # [rows * chunks, length]
        with torch.no_grad():
            if len(encoders) == 1:
                states = encoder(ids)[0]
            else:
                out = encoder(ids, output_hidden_states=True)
                states = out.hidden_states[-2]
                pooled = out[0].unflatten(0, (len(texts), chunks))[:, 0]  # the last encoder's counts
        all_states.append(states.unflatten(0, (len(texts), chunks)).flatten(1, 2))
    return torch.cat(all_states, dim=-1), pooled


def _pieces(tokenizer: Any, text: str, chunks: int) -> list[list[int]]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    room = _room(tokenizer)
    pieces = [ids[i * room : (i + 1) * room] for i in range(chunks)]
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return [[start, *piece, end, *([pad] * (room - len(piece)))] for piece in pieces]
