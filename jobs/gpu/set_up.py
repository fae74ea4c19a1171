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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

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
    site.mkdir(parents=True, exist_ok=True)
    _describe_program(site)
    note = ""
    if wheels is not None:
        note = _install(site, wheels)
    return _find_lacks(site, list(packages), note)


def python_path(site: Path, before: str | None) -> str:
    """`PYTHONPATH` for a step: the tree, the installed wheels, and what was there."""
    return ":".join([str(SOURCE), str(site), *([before] if before else [])])


def how_to_fetch(packages: Iterable[str]) -> str:
    """The command that fetches `packages` for this machine on one that has a network."""
    minimum = _minimum_versions()
    names = [f"'{n}>={minimum[n]}'" if n in minimum else n for n in packages]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    platforms = " ".join(f"--platform {p}" for p in PLATFORMS)
    return (
        f"python3 -m pip download --no-deps --only-binary=:all: --python-version {version} --implementation cp "
        f"{platforms} -d WHEELS {' '.join(names)}"
    )


def _describe_program(site: Path) -> None:
    """The program's name and version, which it looks up where installed packages describe themselves."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = site / f"{project['name']}-{project['version']}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )


def _minimum_versions() -> dict[str, str]:
    """Lower bounds of what the project asks for, by normalised name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    found = {}
    for requirement in wanted:
        if match := re.match(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?>=([0-9.]+)", requirement):
            found[_normal(match[1])] = match[2]
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(int(n) for n in release[0].split(".")) if release else ()


def _installed(site: Path) -> dict[str, str]:
    """Versions by normalised name; `site` comes before the interpreter's own, as on `PYTHONPATH`."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=[str(site), *sys.path]):
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(_normal(name), distribution.version)
    return found


def _install(site: Path, wheels: Path) -> str:
    """Install the wheels whose package the machine lacks or has too old; what went wrong, or ""."""
    if not wheels.is_dir():
        return f"{wheels} is no folder"
    have, minimum = _installed(site), _minimum_versions()
    chosen = {}
    for wheel in sorted(wheels.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        name = _normal(name)
        old = name in have and _numbers(have[name]) < _numbers(minimum.get(name, ""))
        if name not in have or old:
            chosen[name] = version
    if not chosen:
        return ""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--upgrade", "--target", str(site)]
    command += ["--find-links", str(wheels), *(f"{n}=={v}" for n, v in chosen.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (
            f"pip could not install from {wheels}: {done.stderr.strip().splitlines()[-1:] or done.returncode}"
        )
    return ""


def _find_lacks(site: Path, packages: list[str], note: str) -> dict[str, Lack]:
    have, minimum = _installed(site), _minimum_versions()
    after = f" ({note})" if note else ""
    lacks = {}
    for package in packages:
        if package not in have:
            lacks[package] = Lack(package, f"{package} is not installed{after}")
        elif _numbers(have[package]) < _numbers(minimum.get(package, "")):
            lacks[package] = Lack(
                package, f"{package} is {have[package]}, {minimum[package]} or newer is needed{after}"
            )
    present = [p for p in packages if p not in lacks]
    for package, missing in _import(site, present).items():
        why = f"{package} cannot be imported: {missing}" + (" is missing" if missing.isidentifier() else "")
        lacks[package] = Lack(missing if missing.isidentifier() else package, why + after)
    return lacks


def _import(site: Path, packages: list[str]) -> Mapping[str, str]:
    """Of each package that cannot be imported: the module that is missing, or the error."""
    env = {**os.environ, "PYTHONPATH": python_path(site, os.environ.get("PYTHONPATH"))}
    modules = {p: _MODULES.get(p, p.replace("-", "_")) for p in packages}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, json.dumps(modules)],
            env=env,
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(
            f"importing everything took more than {IMPORT_TIMEOUT_S:g} s: not checked any further", flush=True
        )
        return {}
    if done.returncode:
        return dict.fromkeys(packages, f"Python ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    return json.loads(done.stdout.splitlines()[-1])
