"""The list of what is in an image: valid CycloneDX, complete for Python's and Debian's packages, and the same bytes each time."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft7Validator
from packaging.utils import canonicalize_name
from referencing import Registry, Resource
from support.manifests.documents import ROOT
from support.tools import needs

spec = importlib.util.spec_from_file_location("sbom", ROOT / "infra/images/sbom.py")
sbom = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sbom)

OS_RELEASE = (
    'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\nVERSION_ID="12"\nID=debian\n'
)
STATUS = """Package: libc6
Status: install ok installed
Priority: optional
Architecture: amd64
Multi-Arch: same
Source: glibc
Version: 2.36-9+deb12u13
Description: GNU C Library: Shared libraries
 Contains the standard libraries.
 Version: 1 of this text is no field.

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1.0

Package: tzdata
Status: install ok installed
Architecture: all
Version: 2025b-0+deb12u1

Package: libnccl2
Status: hold ok installed
Architecture: amd64
Version: 2.27.3-1

Package: half-there
Status: install reinstreq half-installed
Architecture: amd64
Version: 1.0
"""


def distribution(prefix: Path, name: str, version: str, more: str = "") -> None:
    folder = prefix / f"lib/python3.11/site-packages/{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{more}\n")


@pytest.fixture
def image(tmp_path):
    """A root of an image: an environment, the base's own packages, and dpkg's status."""
    distribution(tmp_path / "opt/millijoule", "millijoule", "0.1.0", "License-Expression: Apache-2.0")
    distribution(tmp_path / "opt/millijoule", "Ruamel.YAML_ext", "1.0+cpu", "License: MIT")
    distribution(tmp_path / "usr/local", "pip", "26.0")
    (tmp_path / "status").write_text(STATUS)
    (tmp_path / "os-release").write_text(OS_RELEASE)
    return tmp_path


def written(root: Path) -> str:
    output = root / "out/bom.json"
    command = [sys.executable, str(ROOT / "infra/images/sbom.py")]
    command += ["--python", str(root / "opt/millijoule"), "--python", str(root / "usr/local")]
    command += ["--dpkg-status", str(root / "status"), "--os-release", str(root / "os-release"), str(output)]
    subprocess.run(command, check=True, capture_output=True)
    return output.read_text()


def test_everything_in_an_image_is_listed_once_and_nothing_else(image):
    bom = json.loads(written(image))
    assert [c["purl"] for c in bom["components"]] == [
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u13?arch=amd64&distro=debian-12",
        "pkg:deb/debian/libnccl2@2.27.3-1?arch=amd64&distro=debian-12",
        "pkg:deb/debian/tzdata@2025b-0%2Bdeb12u1?arch=all&distro=debian-12",
        f"pkg:generic/cpython@{sys.version.split()[0]}",
        "pkg:pypi/millijoule@0.1.0",
        "pkg:pypi/pip@26.0",
        "pkg:pypi/ruamel-yaml-ext@1.0%2Bcpu",
    ]
    licences = {c["name"]: c["licenses"] for c in bom["components"] if "licenses" in c}
    assert licences == {
        "millijoule": [{"expression": "Apache-2.0"}],
        "ruamel-yaml-ext": [{"license": {"name": "MIT"}}],
    }
    assert bom["metadata"]["component"]["version"] == "0.1.0"


def test_the_same_packages_make_the_same_bytes_and_others_another_number(image):
    first = written(image)
    assert written(image) == first
    distribution(image / "usr/local", "wheel", "1.0")
    assert json.loads(written(image))["serialNumber"] != json.loads(first)["serialNumber"]


def test_what_is_no_image_is_refused(image, capsys):
    arguments = ["--python", str(image / "usr/local"), "--dpkg-status", str(image / "status")]
    assert sbom.main([*arguments, "--os-release", str(image / "os-release"), str(image / "bom.json")]) == 1
    assert not (image / "bom.json").exists()


def environment() -> list[str]:
    return [folder for folder in sys.path if folder.endswith("site-packages")]


def test_a_whole_environment_is_listed_completely():
    """By an oracle of its own: the folders that installers leave."""
    prefixes = [Path(folder).parents[2] for folder in environment()]
    listed = {(c["name"], c["version"]) for c in sbom.python_packages(*prefixes)}
    there = {
        (canonicalize_name(match[1]), match[2])
        for folder in environment()
        for info in Path(folder).glob("*.dist-info")
        if (info / "METADATA").exists() and (match := re.fullmatch(r"(.+?)-([^-]+)\.dist-info", info.name))
    }
    assert len(there) > 100
    assert {name for name, _ in there} == {name for name, _ in listed}
    own = {canonicalize_name(name) for name in importlib.metadata.packages_distributions().get("numpy", [])}
    assert own <= {name for name, _ in listed}


@needs(None if shutil.which("dpkg-query") else "this is no Debian: dpkg-query is not there")
def test_every_package_of_debian_is_listed_as_dpkg_lists_them():
    listed = {
        (c["name"], c["version"])
        for c in sbom.debian_packages(Path("/var/lib/dpkg/status").read_text(), OS_RELEASE)
    }
    command = ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package} ${Version}\n"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert listed == {tuple(line.split()[1:]) for line in said if line.startswith("installed ")}


def test_the_list_is_valid_cyclonedx_and_a_wrong_field_is_not(image):
    pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib is not installed (pip install .[test])")
    packageurl = pytest.importorskip("packageurl")
    folder = importlib.resources.files("cyclonedx.schema._res")
    names = ("bom-1.6", "spdx", "jsf-0.82")
    schemas = [json.loads((folder / f"{name}.SNAPSHOT.schema.json").read_text()) for name in names]
    registry = Registry().with_resources([(s["$id"], Resource.from_contents(s)) for s in schemas])
    valid = Draft7Validator(schemas[0], registry=registry)
    bom = json.loads(written(image))
    assert list(valid.iter_errors(bom)) == []
    for component in bom["components"]:
        assert packageurl.PackageURL.from_string(component["purl"]).to_string() == component["purl"]
        for field in list(component):
            wrong = {**component, f"{field}x": component[field]}
            assert not valid.is_valid({**bom, "components": [wrong]}), field
    assert bom["specVersion"] == "1.6"
    for field in ("bomFormat", "serialNumber", "metadata"):
        assert not valid.is_valid({**bom, field: "other"})
