"""What `make gpu` needs before its steps: packages, from a folder of wheels where the machine lacks them, and no network.

The machine's own Python is used, with the PyTorch built for its driver. Wheels go into a folder of their own that is put
on `PYTHONPATH` (`pip install --target`): a virtual environment with the system's packages would not see them where that
Python is itself one of a virtual environment, as it often is beside a CUDA build. This program is not installed either: it
is imported from the tree, so that what runs is what lies there. Needs the standard library only.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: A folder in which the package `millijoule` is the tree's own folders.
SOURCE = ROOT / "infra" / "typing"
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)

#: A cold disk is slow, and slow is not missing: after this long what is importable is left to the steps to find out.
IMPORT_TIMEOUT_S = 60.0

#: Imported in a process of its own: what a package needs in turn shows only then. qtawesome would import Qt, and only its
#: files are used.
_PROBE = """
import importlib, importlib.util, json, sys
found = {}
for package, module in json.loads(sys.argv[1]).items():
    try:
        if module == "qtawesome":
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError(f"No module named '{module}'", name=module)
        else:
            importlib.import_module(module)
    except ImportError as error:
        found[package] = (error.name or "").split(".")[0] or str(error)
    except Exception as error:
        found[package] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(found))
"""

_MODULES = {"nvidia-ml-py": "pynvml", "pillow": "PIL", "pytest-timeout": "pytest_timeout"}


@dataclass(frozen=True)
class Lack:
    """One package that a step cannot have, and why."""

    package: str
    reason: str


def prepare(site: Path, wheels: Path | None, packages: Iterable[str]) -> dict[str, Lack]:
    """Install into `site` what of `packages` is missing and lies in `wheels`; what is still missing after that.

    Args:
        site: the folder for `PYTHONPATH`; made where it is not there.
        wheels: folder of wheels, or None.
        packages: by their names in registries.

    Raises:
        OSError: `site` cannot be written.
    """
    # the program's name and version, which it looks up where installed packages describe themselves
    name, version = _project()["name"], _project()["version"]
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    note = "" if wheels is None else _install(site, wheels)
    have, minimum = _installed(site), minimum_versions()
    lacks, present = {}, []
    for package in packages:
        if package not in have:
            lacks[package] = Lack(package, f"{package} is not installed")
        elif _is_old(have[package], minimum.get(package)):
            why = f"{package} is {have[package]}, {minimum[package]} or newer is needed"
            lacks[package] = Lack(package, why)
        else:
            present.append(package)
    for package, missing in _import(site, present).items():
        is_module = missing.isidentifier()
        why = f"{package} cannot be imported: {missing}{' is missing' if is_module else ''}"
        lacks[package] = Lack(missing if is_module else package, why)
    if note:
        lacks = {p: Lack(lack.package, f"{lack.reason} ({note})") for p, lack in lacks.items()}
    return lacks


def python_path(site: Path, before: str | None) -> str:
    """`PYTHONPATH` for a step: the tree, the installed wheels, and what was there."""
    return ":".join([str(SOURCE), str(site), *([before] if before else [])])


def how_to_fetch(packages: Iterable[str]) -> str:
    """The command that fetches `packages` for this machine on one that has a network."""
    minimum = minimum_versions()
    names = [f"'{n}>={minimum[n]}'" if n in minimum else n for n in packages]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    platforms = " ".join(f"--platform {p}" for p in PLATFORMS)
    return (
        f"python3 -m pip download --no-deps --only-binary=:all: --python-version {version} --implementation cp "
        f"{platforms} -d WHEELS {' '.join(names)}"
    )


@cache
def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def minimum_versions() -> dict[str, str]:
    """Lower bounds of what the project asks for, by normalised name."""
    extras = _project()["optional-dependencies"].values()
    found = {}
    for requirement in [*_project()["dependencies"], *(r for extra in extras for r in extra)]:
        if match := re.match(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?>=([0-9.]+)", requirement):
            found[_normal(match[1])] = match[2]
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_old(version: str, minimum: str | None) -> bool:
    def numbers(text: str) -> list[int]:
        release = re.match(r"[0-9]+(?:\.[0-9]+)*", text)
        return [int(n) for n in release[0].split(".")] if release else []

    return minimum is not None and numbers(version) < numbers(minimum)


def _installed(site: Path) -> dict[str, str]:
    """Versions by normalised name; `site` comes before the interpreter's own, as on `PYTHONPATH`."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=[str(site), *sys.path]):
        if name := distribution.metadata["Name"]:
            found.setdefault(_normal(name), distribution.version)
    return found


def _install(site: Path, wheels: Path) -> str:
    """Install the wheels whose package the machine lacks or has too old; what went wrong, or ""."""
    if not wheels.is_dir():
        return f"{wheels} is no folder"
    have, minimum = _installed(site), minimum_versions()
    chosen = {}
    for wheel in sorted(wheels.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        name = _normal(name)
        if name not in have or _is_old(have[name], minimum.get(name)):
            chosen[name] = version
    if not chosen:
        return ""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--upgrade", "--target", str(site)]
    command += ["--find-links", str(wheels), *(f"{n}=={v}" for n, v in chosen.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stderr.strip().splitlines()[-1:] or done.returncode
    return f"pip could not install from {wheels}: {said}" if done.returncode else ""


def _import(site: Path, packages: list[str]) -> dict[str, str]:
    """Of each package that cannot be imported: the module that is missing, or the error."""
    env = {**os.environ, "PYTHONPATH": python_path(site, os.environ.get("PYTHONPATH"))}
    modules = {p: _MODULES.get(p, p.replace("-", "_")) for p in packages}
    command = [sys.executable, "-c", _PROBE, json.dumps(modules)]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"imports took more than {IMPORT_TIMEOUT_S:g} s: not checked any further", flush=True)
        return {}
    if done.returncode:
        return dict.fromkeys(packages, f"Python ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    return json.loads(done.stdout.splitlines()[-1])
