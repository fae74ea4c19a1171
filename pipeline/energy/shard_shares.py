"""Whose a committed shard's energy is: that of its accepted images, and of the images that nobody got.

    energy = accepted + filtered + quarantined                                        exact, in millijoules

Every image of the shard that the model drew to the end has an equal share, whether it was accepted, hidden by the model's
safety checker, or no image because its pixels are not finite numbers: they were drawn in the same batches by the same work.
A request that failed otherwise (it raised, killed its worker, was never tried) has none: what it cost cannot be told from
its neighbours', so the accepted images bear it and are never made to look cheaper than they were. A shard of which nothing
was drawn to the end is waste as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from millijoule.pipeline.energy.counter_split import MISSING
from millijoule.pipeline.energy.packed import NONE
from millijoule.workers.schemas import Commit


@dataclass(frozen=True)
class ShardShares:
    """How the energy of each shard is divided, int64 `[n]` each, in millijoules; `MISSING` where it is not known."""

    accepted_mj: np.ndarray
    filtered_mj: np.ndarray
    quarantined_mj: np.ndarray


def shard_shares(
    energy_mj: np.ndarray, ok: np.ndarray, filtered: np.ndarray, drawn: np.ndarray
) -> ShardShares:
    """Divide the energy of each shard.

    Where it does not come out even, accepted images have 1 mJ more first, then filtered ones.

    Args:
        energy_mj: of each shard, int64 `[n]`; negative where it was not measured.
        ok: accepted images of each shard.
        filtered: images that the model's safety checker hid.
        drawn: images drawn to the end, those two included; `NONE` where the commit does not say, as before there
            were filtered images: then the accepted ones have all of it.
    """
    stated = drawn != NONE
    heads = np.maximum(np.where(stated, drawn, ok), ok + filtered)
    base, rest = np.divmod(energy_mj, np.maximum(heads, 1))
    accepted = ok * base + np.minimum(rest, ok)
    hidden = filtered * base + np.clip(rest - ok, 0, filtered)
    accepted = np.where(stated, np.where(heads > 0, accepted, 0), energy_mj)
    known = energy_mj >= 0
    parts = (accepted, hidden, energy_mj - accepted - hidden)
    return ShardShares(*(np.where(known, part, MISSING) for part in parts))


def commit_shares(commit: Commit, energy_mj: int | None) -> tuple[int | None, int | None, int | None]:
    """`shard_shares` of one commit: what accepted, filtered and quarantined images used of `energy_mj`."""
    numbers = (energy_mj, commit.images_ok, commit.images_filtered, commit.images_drawn)
    shares = shard_shares(*(np.array([NONE if n is None else n], np.int64) for n in numbers))
    accepted, filtered, quarantined = (
        None if mj.item() == MISSING else mj.item()
        for mj in (shares.accepted_mj, shares.filtered_mj, shares.quarantined_mj)
    )
    return accepted, filtered, quarantined


def accepted_mj(commit: Commit, energy_mj: int | None) -> int | None:
    """What the accepted images of a commit used of `energy_mj`."""
    return commit_shares(commit, energy_mj)[0]


def equal_shares(energy_mj: np.ndarray, commit: np.ndarray) -> np.ndarray:
    """Divide `energy_mj` of each commit (negative: missing) equally among its images; the first have 1 mJ more.

    `commit` is the number of each image's commit, the images of one commit together.
    """
    lengths = np.diff(np.flatnonzero(np.diff(commit, prepend=-1, append=-1)))
    of_commit = np.repeat(lengths, lengths)
    turn = np.arange(len(commit)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    mine = energy_mj[commit]
    base, rest = np.divmod(mine, np.maximum(of_commit, 1))
    return np.where(mine < 0, mine, base + (turn < rest))
