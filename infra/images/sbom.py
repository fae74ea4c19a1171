"""Writes what is in an image as CycloneDX 1.6: Python's packages, Debian's packages, and the Python that runs them.

Runs while the image is built, in a stage that has what the last stage has, and needs nothing but Python. Reproducible: the same
packages make the same bytes, so there is no time in it.

    python sbom.py --python /opt/millijoule --python /usr/local --dpkg-status /var/lib/dpkg/status --os-release /etc/os-release OUT
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote

Component = dict[str, Any]


def python_packages(*prefixes: Path) -> list[Component]:
    """A component for each distribution below the prefixes' `site-packages`; the first prefix that has one counts."""
    folders = [
        str(folder) for prefix in prefixes for folder in sorted(prefix.glob("lib/python3*/site-packages"))
    ]
    found: dict[str, Component] = {}
    for distribution in importlib.metadata.distributions(path=folders):
        told = distribution.metadata
        name = re.sub(r"[-_.]+", "-", told["Name"]).lower()
        purl = f"pkg:pypi/{name}@{quote(distribution.version)}"
        component = {
            "type": "library",
            "bom-ref": purl,
            "name": name,
            "version": distribution.version,
            "purl": purl,
        }
        licence = told.get("License-Expression") or told.get("License") or ""
        if told.get("License-Expression"):
            component["licenses"] = [{"expression": licence}]
        elif 0 < len(licence) < 80 and "\n" not in licence:
            component["licenses"] = [{"license": {"name": licence}}]
        found.setdefault(name, component)
    return list(found.values())


def debian_packages(status: str, os_release: str) -> list[Component]:
    """A component for each package that dpkg's status says is installed."""
    system = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', os_release, re.MULTILINE))
    vendor, distro = (
        system.get("ID", "debian"),
        f"{system.get('ID', 'debian')}-{system.get('VERSION_ID', '0')}",
    )
    found = []
    for paragraph in status.split("\n\n"):
        told = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, re.MULTILINE))
        # what is wanted (install, or hold as of `apt-mark hold`), the package's state, and what is there
        if told.get("Status", "").split(" ")[-1] != "installed":
            continue
        name, version, machine = told["Package"], told["Version"], told["Architecture"]
        purl = f"pkg:deb/{vendor}/{quote(name)}@{quote(version, safe='')}?arch={machine}&distro={distro}"
        component = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
        if source := told.get("Source"):
            component["properties"] = [{"name": "debian:source", "value": source}]
        found.append(component)
    return found


def interpreter() -> Component:
    """The Python that runs this, which no package manager knows of."""
    version = platform.python_version()
    purl = f"pkg:generic/cpython@{version}"
    return {"type": "application", "bom-ref": purl, "name": "cpython", "version": version, "purl": purl}


def bill(components: list[Component], image: str, version: str) -> dict[str, Any]:
    """The whole as a CycloneDX document."""
    components = sorted(components, key=lambda component: component["bom-ref"])
    content = json.dumps([image, version, components], sort_keys=True).encode()
    serial = uuid.UUID(bytes=hashlib.sha256(content).digest()[:16], version=5)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"component": {"type": "container", "bom-ref": image, "name": image, "version": version}},
        "components": components,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--python", type=Path, action="append", required=True, help="prefix of an environment"
    )
    parser.add_argument("--dpkg-status", type=Path, required=True)
    parser.add_argument("--os-release", type=Path, default=Path("/etc/os-release"))
    parser.add_argument("--name", default="millijoule", help="of the image")
    parser.add_argument("output", type=Path)
    told = parser.parse_args(arguments)
    try:
        return write(told)
    except OSError as error:
        print(f"sbom: {error}", file=sys.stderr)
        return 2


def write(told: argparse.Namespace) -> int:
    """What the options say; the exit code. Raises OSError for a path that cannot be used."""
    for prefix in told.python:
        os.listdir(prefix)  # one that is not there is none without packages
    packages = python_packages(*told.python)
    own = [package["version"] for package in packages if package["name"] == "millijoule"]
    debian = debian_packages(told.dpkg_status.read_text(), told.os_release.read_text())
    if not own or not debian:
        print(
            f"sbom: {len(packages)} Python packages, {len(debian)} of Debian: that is no image",
            file=sys.stderr,
        )
        return 1
    components = [*packages, *debian, interpreter()]
    told.output.parent.mkdir(parents=True, exist_ok=True)
    told.output.write_text(json.dumps(bill(components, told.name, own[0]), indent=1) + "\n")
    print(
        f"sbom: {len(packages)} Python packages, {len(debian)} of Debian, into {told.output}", file=sys.stderr
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
