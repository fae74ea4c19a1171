"""Known flaws of the pinned packages: compares pins with a database of advisories and keeps a record of what was compared.

Works without a network on a folder of OSV records: a checkout of pypa/advisory-database (YAML, CC-BY 4.0) or an unpacked export of
osv.dev for PyPI (JSON). The record names the database, its revision and date, every pin that was compared, and every match. It has
none of the database's text. `tests/infra/test_audit.py` holds the record to the pins and to the matches that were accepted.

    python infra/audit/audit.py compare FOLDER --revision COMMIT --date 2026-11-30     # writes the record, fails on new matches
    python infra/audit/audit.py state --most-days 31                                   # fails on matches, unseen pins, age
    python infra/audit/audit.py ask PIP_AUDIT                                          # asks the package index, where it answers
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

HERE = Path(__file__).parent
PINS, RECORD, ACCEPTED = HERE.parent / "constraints", HERE / "record.json", HERE / "accepted.toml"


def pins(folder: Path = PINS) -> dict[str, str]:
    """Package (normalised) -> version, of every constraints file."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.txt")):
        for name, version in re.findall(r"^([\w.-]+)==([^\s;#]+)", file.read_text(), re.MULTILINE):
            found[canonicalize_name(name)] = version
    return found


def advisories(folder: Path, packages: Iterable[str]) -> Iterator[dict[str, Any]]:
    """OSV records below `folder` that are not withdrawn and name one of the packages."""
    wanted = set(packages)
    for file in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.json")]):
        # the database has a folder for each package: most need not be read
        if file.suffix == ".yaml" and canonicalize_name(file.parent.name) not in wanted:
            continue
        text = file.read_text()
        record = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
        if not isinstance(record, dict) or "withdrawn" in record:
            continue
        if any(_name(affected) in wanted for affected in record.get("affected", ())):
            yield record


def _name(affected: dict[str, Any]) -> str:
    package = affected.get("package", {})
    return canonicalize_name(package.get("name", "")) if package.get("ecosystem") == "PyPI" else ""


def affects(record: dict[str, Any], package: str, version: str) -> bool:
    """Whether an advisory means this version: it is listed, or lies in a range of the package's own versions.

    A version or a bound that is no version of Python's counts as meant: what cannot be compared is for a person to look at.
    """
    for affected in record["affected"]:
        if _name(affected) != package:
            continue
        if version in affected.get("versions", ()):
            return True
        for told in affected.get("ranges", ()):
            if told["type"] != "GIT" and _within(told["events"], version):
                return True
        # only commits are named, no versions at all
        if not affected.get("versions") and all(told["type"] == "GIT" for told in affected.get("ranges", ())):
            return True
    return False


def _within(events: list[dict[str, str]], version: str) -> bool:
    try:
        at = Version(version)
        points = sorted(
            (Version("0.dev0" if bound == "0" else bound), kind)
            for event in events
            for kind, bound in event.items()
        )
    except InvalidVersion:
        return True
    inside = False
    for bound, kind in points:
        if kind == "introduced" and at >= bound:
            inside = True
        elif (kind == "fixed" and at >= bound) or (kind == "last_affected" and at > bound):
            inside = False
    return inside


def compare(folder: Path, revision: str, date: str, of: dict[str, str]) -> dict[str, Any]:
    """The record of one comparison."""
    known = list(advisories(folder, of))
    matches = [
        {
            "id": record["id"],
            "aliases": sorted(record.get("aliases", [])),
            "package": name,
            "version": version,
        }
        for record in known
        for name, version in of.items()
        if affects(record, name, version)
    ]
    if not known:
        raise SystemExit(
            f"{folder} names none of the {len(of)} pinned packages: is it a database of advisories?"
        )
    return {
        "database": "pypa/advisory-database",
        "revision": revision,
        "date": date,
        "advisories_of_pinned_packages": len(known),
        "matches": sorted(matches, key=lambda match: (match["package"], match["id"])),
        "pins": dict(sorted(of.items())),
    }


def accepted(file: Path = ACCEPTED) -> dict[tuple[str, str], str]:
    """(package, advisory) -> why it does no harm here."""
    return {
        (entry["package"], entry["id"]): entry["reason"]
        for entry in tomllib.loads(file.read_text())["accepted"]
    }


def open_matches(record: dict[str, Any], of: dict[str, str], known: dict[tuple[str, str], str]) -> list[str]:
    """Matches of a record that the pins still have and that nobody has accepted."""
    return [
        f"{match['package']} {match['version']}: {match['id']} {' '.join(match['aliases'])}".rstrip()
        for match in record["matches"]
        if of.get(match["package"]) == match["version"] and (match["package"], match["id"]) not in known
    ]


def unseen(record: dict[str, Any], of: dict[str, str]) -> list[str]:
    """Pins that no comparison has seen."""
    return [f"{name}=={version}" for name, version in of.items() if record["pins"].get(name) != version]


def _iso_date(text: str) -> str:
    """A date by which a record can grow old."""
    if datetime.date.fromisoformat(text) > datetime.date.today() + datetime.timedelta(days=1):
        raise ValueError(text)
    return text


def age_days(record: dict[str, Any], today: datetime.date) -> int:
    """How old the database was."""
    return (today - datetime.date.fromisoformat(record["date"])).days


def ask(pip_audit: str, of: dict[str, str]) -> tuple[list[str], list[str]] | None:
    """Matches by the package index, through pip-audit, and pins it said nothing of; None where it has no advisories to give."""

    def answers(some: dict[str, str]) -> list[dict[str, Any]]:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("".join(f"{name}=={version}\n" for name, version in some.items()))
            file.flush()
            command = [pip_audit, "--no-deps", "--disable-pip", "--format", "json", "-r", file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        return json.loads(done.stdout)["dependencies"] if done.stdout.startswith("{") else []

    # one first: an index that does not answer is not asked for all
    (first, *_) = answers(dict([next(iter(of.items()))])) or [{"skip_reason": "no answer"}]
    if "skip_reason" in first:
        return None
    # the answer for all may fail where the one for the first did not
    told = [found for found in answers(of) if "skip_reason" not in found]
    if not told:
        return None
    matches = [
        f"{found['name']} {found['version']}: {flaw['id']} {' '.join(flaw.get('aliases', []))}".rstrip()
        for found in told
        for flaw in found["vulns"]
        if (canonicalize_name(found["name"]), flaw["id"]) not in accepted()
    ]
    return matches, sorted(of.keys() - {canonicalize_name(found["name"]) for found in told})


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 nothing is open, 1 something is, 2 a path that was given, or the record, is not there, 3 nobody could be asked."""
    try:
        return run(arguments)
    except OSError as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2


def run(arguments: list[str] | None) -> int:
    """The same; raises OSError for a file that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    does = parser.add_subparsers(dest="does", required=True)
    comparing = does.add_parser(
        "compare", help="compare the pins with a folder of advisories, write the record"
    )
    comparing.add_argument("folder", type=Path)
    comparing.add_argument("--revision", required=True, help="commit or name of the database")
    comparing.add_argument(
        "--date", required=True, type=_iso_date, help="of that revision, YYYY-MM-DD, not in the future"
    )
    comparing.add_argument("--record", type=Path, default=RECORD)
    state = does.add_parser("state", help="what the record says of the pins")
    state.add_argument("--most-days", type=int, help="fail if the database was older")
    asking = does.add_parser("ask", help="ask the package index through pip-audit")
    asking.add_argument("pip_audit")
    told = parser.parse_args(arguments)

    of = pins()
    if told.does == "ask":
        if (answer := ask(told.pip_audit, of)) is None:
            print("audit: the package index gives no advisories; only the record counts", file=sys.stderr)
            return 3
        matches, untold = answer
        if untold:
            print(f"audit: the index says nothing of {', '.join(untold)}", file=sys.stderr)
        print(
            "\n".join(matches) or f"audit: no flaw is known of {len(of) - len(untold)} pins", file=sys.stderr
        )
        return 1 if matches else 3 if untold else 0
    if told.does == "compare":
        record = compare(told.folder, told.revision, told.date, of)
        told.record.write_text(json.dumps(record, indent=1) + "\n")
    else:
        record = json.loads(RECORD.read_text())
    matches, new = open_matches(record, of, accepted()), unseen(record, of)
    days = age_days(record, datetime.date.today())
    old = getattr(told, "most_days", None) is not None and days > told.most_days
    print(
        f"audit: {len(record['pins'])} pins against {record['advisories_of_pinned_packages']} advisories of"
        f" {record['database']} at {record['revision'][:12]}, {days} days old",
        *(f"audit: open: {match}" for match in matches),
        *(f"audit: not compared yet: {pin}" for pin in new),
        *([f"audit: older than {told.most_days} days"] if old else []),
        sep="\n",
        file=sys.stderr,
    )
    return bool(matches or old or (new and told.does == "state"))


if __name__ == "__main__":
    sys.exit(main())
