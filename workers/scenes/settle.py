"""From scenes and seeds to tokens, many at a time: what `scenes.complete` and `scenes.scene_tokens` do one by one.

A scene is a row of numbers here, `SceneRow`, so that settling what scenes leave open is a few array operations for all images of a
batch. The rules and the order of choices are those of `complete`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from millijoule.workers.scenes.scenes import (
    BACKGROUNDS,
    CHOICES_STREAM,
    COLOURS,
    ICON_TOKENS,
    MAX_COUNT,
    NUM_TOKENS,
    RELATIONS,
    SIZES,
    Group,
    Scene,
    icons,
)
from millijoule.workers.scenes.vocabulary import NOUN_NUMBER

#: Of a scene: how many groups; noun, colour, size and count of each of two; relation, background, arrangement. Indices; OPEN is "any".
SceneRow = tuple[int, ...]
OPEN = -1

_GROUPS, _RELATION, _BACKGROUND, _ARRANGEMENT = 0, 9, 10, 11
_NOUN, _COLOUR, _SIZE, _COUNT = range(4)


def scene_row(scene: Scene) -> SceneRow:
    """`scene` in numbers."""
    groups = [_group_row(g) for g in scene.groups]
    groups += [(0, 0, 0, 1)] * (2 - len(groups))
    arrangement = OPEN if scene.arrangement is None else scene.arrangement
    return (
        len(scene.groups),
        *groups[0],
        *groups[1],
        _index(RELATIONS, scene.relation),
        _index(BACKGROUNDS, scene.background),
        arrangement,
    )


def settle(rows: Sequence[SceneRow], seeds: np.ndarray) -> np.ndarray:
    """Tokens int64 `[scenes, NUM_TOKENS]` of the scenes `rows`, what is open settled by uint64 seeds `[scenes]`."""
    scenes = np.array(rows, np.int64).reshape(-1, _ARRANGEMENT + 1)
    choices = _Choices(seeds)
    groups = scenes[:, _GROUPS]
    table = _tables()
    # background: none that a group has as its colour
    excluded = np.zeros(len(scenes), np.int64)
    for k in range(2):
        colour = scenes[:, 1 + 4 * k + _COLOUR]
        excluded |= np.where((groups > k) & (colour != OPEN), table.ground_bit[colour], 0)
    background = scenes[:, _BACKGROUND]
    is_open = background == OPEN
    chosen = table.nth_ground[excluded, choices.of(is_open, table.grounds_left[excluded])]
    background = np.where(is_open, chosen, background)
    # colours: not the background's
    taken = table.colour_of_ground[background]
    left = np.where(taken == OPEN, len(COLOURS), len(COLOURS) - 1)
    settled = []
    for k in range(2):
        noun, colour, size, count = (scenes[:, 1 + 4 * k + what] for what in range(4))
        is_there = groups > k
        is_open = is_there & (colour == OPEN)
        nth = choices.of(is_open, left)
        nth += (taken != OPEN) & (nth >= taken)
        colour = np.where(is_open, nth, colour)
        is_open = is_there & (size == OPEN)
        size = np.where(is_open, choices.of(is_open, len(SIZES)), size)
        settled.append((noun, colour, size, count))
    relation, arrangement = scenes[:, _RELATION], scenes[:, _ARRANGEMENT]
    is_open = (groups == 2) & (relation == OPEN)
    relation = np.where(is_open, choices.of(is_open, len(RELATIONS)), relation)
    is_open = arrangement == OPEN
    arrangement = np.where(is_open, choices.of(is_open, 2), arrangement)
    # windows
    counts = settled[0][_COUNT] - 1, settled[1][_COUNT] - 1
    layout = np.where(
        groups == 2,
        2 * MAX_COUNT + 4 * relation + 2 * counts[0] + counts[1],
        2 * counts[0] + arrangement,
    )
    group, window = (x[layout] for x in (table.group, table.window))  # [scenes, MAX_COUNT]
    group = np.where(groups[:, None] == 0, OPEN, group)
    tokens = np.zeros((len(scenes), NUM_TOKENS), np.int64)
    slots = tokens[:, :-1].reshape(len(scenes), MAX_COUNT, ICON_TOKENS)
    for at, what in enumerate((_NOUN, _COLOUR, _SIZE)):
        value = np.where(group == 1, settled[1][what][:, None], settled[0][what][:, None])
        slots[..., at] = np.where(group == OPEN, 0, 1 + value)
    slots[..., 3] = np.where(group == OPEN, 0, 1 + window)
    tokens[:, :-1] = slots.reshape(len(scenes), NUM_TOKENS - 1)
    tokens[:, -1] = background
    return tokens


class _Choices:
    """`scenes.Choices` of many scenes: who does not choose does not move on."""

    def __init__(self, seeds: np.ndarray) -> None:
        self._state = seeds.astype(np.uint64) ^ np.uint64(CHOICES_STREAM)

    def of(self, who: np.ndarray, options: np.ndarray | int) -> np.ndarray:
        """An index below `options` for those who choose, int64 `[scenes]`; any number for the others."""
        with np.errstate(over="ignore"):
            self._state += who.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            z = self._state
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
            # the upper 64 bits of z * options, which is small
            count = np.asarray(options).astype(np.uint64)
            low = ((z & np.uint64(0xFFFFFFFF)) * count) >> np.uint64(32)
            return (((z >> np.uint64(32)) * count + low) >> np.uint64(32)).astype(np.int64)


class _Tables:
    """What rules say, as arrays.

    Attributes:
        ground_bit: of a colour that is a background, too, else 0.
        grounds_left, nth_ground: by the bits of those that are excluded.
        colour_of_ground: OPEN where there is none.
        group, window: of each of the layouts' icons in order, OPEN where there is none.
    """

    def __init__(self) -> None:
        self.ground_bit = np.array([1 << BACKGROUNDS.index(c) if c in BACKGROUNDS else 0 for c in COLOURS])
        kept = [
            [i for i in range(len(BACKGROUNDS)) if not bits >> i & 1] for bits in range(1 << len(BACKGROUNDS))
        ]
        self.grounds_left = np.array([len(k) for k in kept])
        self.nth_ground = np.array([k + [0] * (len(BACKGROUNDS) - len(k)) for k in kept])
        self.colour_of_ground = np.array([_index(COLOURS, b) for b in BACKGROUNDS])
        layouts = [
            Scene((Group("a", COLOURS[0], SIZES[0], count),), None, BACKGROUNDS[0], arrangement)
            for count in range(1, MAX_COUNT + 1)
            for arrangement in range(2)
        ]
        layouts += [
            Scene(
                (Group("a", COLOURS[0], SIZES[0], one), Group("b", COLOURS[0], SIZES[0], other)),
                relation,
                BACKGROUNDS[0],
                0,
            )
            for relation in RELATIONS
            for one in (1, 2)
            for other in (1, 2)
        ]
        shape = len(layouts), MAX_COUNT
        self.group, self.window = np.full(shape, OPEN), np.full(shape, OPEN)
        for row, scene in enumerate(layouts):
            for slot, icon in enumerate(icons(scene)):
                self.group[row, slot] = int(icon.noun == "b")
                self.window[row, slot] = icon.window


@cache
def _tables() -> _Tables:
    return _Tables()


def _group_row(group: Group) -> tuple[int, int, int, int]:
    return (
        NOUN_NUMBER[group.noun],
        _index(COLOURS, group.colour),
        _index(SIZES, group.size),
        group.count,
    )


def _index(names: Sequence[str], name: str | None) -> int:
    return names.index(name) if name in names else OPEN
