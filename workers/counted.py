"""Numbers of things in messages: "1 shard", "12,000 shards"."""

from __future__ import annotations


def counted(n: int, noun: str, plural: str | None = None) -> str:
    """`n` and its noun, in the singular for 1; `plural` where more than an s is added."""
    return f"{n:,} {noun if n == 1 else plural or f'{noun}s'}"
