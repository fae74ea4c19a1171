"""What only the user knows and a statement needs: where the machines stand, and what making them emitted.

Embodied emissions are told per device kind: a GPU by a part of its product's name, and `node` for the rest of the machine around
it. Nothing here has a default: a kind of which nothing is declared is missing in the statement.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from millijoule.workers.errors import InputError
from millijoule.workers.records import convert

OPTION = "--embodied"
#: The name that stands for a whole machine beside its GPUs.
NODE = "node"
#: Hours of a year, leap days shared out.
HOURS_PER_YEAR = 8766.0

_FORMS = "NAME=KG/YEARS or NAME=KG/YEARS*SHARE, such as H200=164/4 or node=1300/5*0.5"
_TEXT = re.compile(r"(?P<name>[^=]+)=(?P<kg>[^/*]+)/(?P<years>[^/*]+)(?:\*(?P<share>.+))?")


@dataclass(frozen=True)
class Embodied:
    """What one device of a kind emitted before it ran: SCI's TE, EL and RR/ToR.

    Attributes:
        name: part of the product's name, or `node`.
        kg: TE, kilograms of CO2e of one device over its life, use left out.
        years: EL, how long it will be in use.
        share: RR/ToR, the part of it (0 to 1) that the job had reserved.
        source: where the figure is from, for whoever reads the statement.
    """

    name: str
    kg: float
    years: float
    share: float = 1.0
    source: str = "declared"

    def grams(self, hours: float) -> float:
        """M of this kind, grams of CO2e: TE * (TiR / EL) * (RR / ToR), with TiR = `hours` of devices."""
        return self.kg * 1000 * hours / (self.years * HOURS_PER_YEAR) * self.share


@dataclass(frozen=True)
class _File:
    device: tuple[Embodied, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Declared:
    """What was said on the command line; empty: nothing."""

    embodied: tuple[Embodied, ...] = ()
    location: str | None = None

    def embodied_of(self, kind: str) -> Embodied | None:
        """What is declared of a product; of several names in it the longest counts. `NODE` is only itself."""
        fitting = [
            e
            for e in self.embodied
            if (e.name == NODE if kind == NODE else e.name != NODE and e.name.lower() in kind.lower())
        ]
        return max(fitting, key=lambda e: len(e.name), default=None)


def read_declared(texts: Sequence[str], location: str | None) -> Declared:
    """`("H200=164/4", "node=1300/5*0.5")`, or paths of TOML files with `[[device]]` tables, and where the machines stand.

    Raises:
        InputError: a text is neither, a number means nothing, or a kind stands twice.
    """
    found: list[Embodied] = []
    for text in texts:
        found += [_of_text(text)] if "=" in text else _of_file(Path(text))
    names = [e.name.lower() for e in found]
    for e in found:
        where = f"{OPTION}: {e.name!r}"
        if not e.name.strip():
            raise InputError(f"{OPTION}: a device has no name")
        if names.count(e.name.lower()) > 1:
            raise InputError(f"{where} stands twice")
        if not (math.isfinite(e.kg) and e.kg >= 0 and math.isfinite(e.years) and e.years > 0):
            raise InputError(f"{where}: kilograms of CO2e, 0 or more, and years of life, more than 0")
        if not 0 <= e.share <= 1:
            raise InputError(f"{where}: the share that the job had reserved is from 0 to 1, not {e.share:g}")
    return Declared(tuple(found), location)


def _of_text(text: str) -> Embodied:
    match = _TEXT.fullmatch(text)
    try:
        if match is None:
            raise ValueError("not of this form")
        return Embodied(
            match["name"].strip(), float(match["kg"]), float(match["years"]), float(match["share"] or 1.0)
        )
    except ValueError as error:
        raise InputError(f"{OPTION} {text}: {_FORMS}, or a TOML file ({error})") from error


def _of_file(path: Path) -> list[Embodied]:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        for device in raw.get("device", ()):  # whole numbers are numbers
            device |= {k: float(v) for k, v in device.items() if type(v) is int}
        return list(convert(_File, raw).device)
    except OSError as error:
        raise InputError(
            f"{OPTION} {path}: neither {_FORMS}, nor a file that can be read ({error.strerror})"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{OPTION} {path}: not a file of [[device]] tables: {error}") from error
