"""Dockerfiles: stages, pinned bases, no root, no compiler at the end; and the two files that go into the images."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.manifests.documents import ROOT
from support.tools import missing, needs

dockerfile = importlib.import_module("dockerfile") if importlib.util.find_spec("dockerfile") else None
needs_parser = needs(None if dockerfile else "dockerfile is not installed (pip install .[test])")
FOLDER = ROOT / "infra/images"
FILES = sorted(FOLDER.glob("*.Dockerfile"))
COMPILERS = re.compile(r"\b(g\+\+|gcc|clang|build-essential|apt-get)\b")


Stage = list[tuple[str, tuple[str, ...], str]]


def stages(text: str) -> list[Stage]:
    """Instructions of each stage (name, flags, rest), as BuildKit's own parser reads them; the first has what stands before any."""
    found: list[Stage] = [[]]
    for command in dockerfile.parse_string(text):
        if command.cmd.upper() == "FROM":
            found.append([])
        rest = command.original.partition(" ")[2]
        for flag in command.flags:
            rest = rest.replace(flag, "", 1).strip()
        found[-1].append((command.cmd.upper(), command.flags, rest))
    return found


#: Instructions that are used here, and the flags that BuildKit knows of them.
KNOWN = {
    "FROM": {"platform"},
    "RUN": {"mount", "network", "security"},
    "COPY": {"from", "chmod", "chown", "link", "parents", "exclude"},
    **dict.fromkeys(("ARG", "SHELL", "ENV", "USER", "WORKDIR", "CMD", "LABEL"), frozenset()),
}
BASE = re.compile(r"BASE=\S+:\d+\.\d+\.\d+[-\w]*(@sha256:[0-9a-f]{64})?")


def of(stage: Stage, word: str) -> list[str]:
    return [rest for name, _, rest in stage if name == word]


def faults(text: str) -> list[str]:
    before, *built = stages(text)
    if len(built) < 2:
        return ["one stage"]
    first, last = built[0], built[-1]
    names = [re.search(r" AS (\w+)$", of(stage, "FROM")[0]) for stage in built]
    sources = [
        flag.partition("=")[2]
        for stage in built
        for _, flags, _ in stage
        for flag in flags
        if "--from=" in flag
    ]
    rules = {
        "unknown instruction": any(word not in KNOWN for stage in [before, *built] for word, _, _ in stage),
        "unknown flag": any(
            flag.partition("=")[0].removeprefix("--") not in KNOWN.get(word, ())
            for stage in built
            for word, flags, _ in stage
            for flag in flags
        ),
        "a stage that is not there": not set(sources) <= {name[1] for name in names if name},
        "base without a version": not of(before, "ARG") or not BASE.fullmatch(of(before, "ARG")[0]),
        "another base": any(of(stage, "FROM")[0].split()[0] != "${BASE}" for stage in built),
        "root": of(last, "USER") != ["1000:1000"],
        "compiler at the end": any(COMPILERS.search(rest) for rest in of(last, "RUN")),
        "packages without versions": any(
            re.search(r"apt-get install[^&]* (?!-)[\w+.-]+(\s|$)(?!=)", rest) for rest in of(first, "RUN")
        ),
        "kernels may be missing": not any("assert forms_here()" in rest for rest in of(first, "RUN")),
        "versions not held": not all(
            "-c /constraints.txt" in rest for rest in of(first, "RUN") if "/pip install" in rest
        ),
        "no list of what is in it": not _listed(built),
    }
    return [rule for rule, broken in rules.items() if broken]


def _listed(built: list[Stage]) -> bool:
    """Whether the last stage has a list, made where everything is that it has itself, and nothing more."""
    lists = [stage for stage in built if any("sbom.py" in rest for rest in of(stage, "RUN"))]
    if len(lists) != 1:
        return False
    (listing,), last = lists, built[-1]
    environment = ("COPY", ("--from=build",), "/opt/millijoule /opt/millijoule")
    (command,) = (rest for rest in of(listing, "RUN") if "sbom.py" in rest)
    copied = [rest for word, flags, rest in last if word == "COPY" and flags == ("--from=inventory",)]
    return (
        environment in listing
        and environment in last
        and not any(
            "apt-get" in rest or "pip install" in rest for rest in of(listing, "RUN") + of(last, "RUN")
        )
        and {"--python /opt/millijoule", "--python /usr/local", "--dpkg-status /var/lib/dpkg/status"}
        <= set(re.findall(r"--[a-z-]+ \S+", command))
        and copied == ["/millijoule.cdx.json /usr/share/doc/millijoule/millijoule.cdx.json"]
        and command.split()[-1] == "/millijoule.cdx.json"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_an_image_has_all_that_a_job_may_need_and_nothing_for_tests_or_training(file):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.search(r"/source\[([\w,]+)\]", file.read_text())[1].split(",")) == set(extras) - {
        "train",
        "test",
    }


@needs_parser
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_dockerfile_has_stages_a_pinned_base_a_list_and_no_root(file):
    text = file.read_text()
    assert faults(text) == []
    for wrong in (
        text.replace("python:3.11.14-slim-bookworm\n", "python:latest\n"),
        text.replace("USER 1000:1000\n", ""),
        text.replace("RUN groupadd", "RUN apt-get install -y gcc && groupadd"),
        text.replace("g++=4:12.2.0-3", "g++"),
        text.replace("assert forms_here()", "forms_here()"),
        text.replace("-c /constraints.txt", "", 1),
        text.replace("COPY --from=inventory", "COPY --from=build"),
        text.replace("--from=inventory", "--from=inventories"),
        text.replace("--python /usr/local ", ""),
        text.replace("FROM ${BASE} AS inventory", "FROM build AS inventory"),
    ):
        assert wrong != text
        assert faults(wrong) != []
    for pinned in ("python:3.11.14-slim-bookworm@sha256:" + 64 * "0",):
        assert faults(text.replace("BASE=python:3.11.14-slim-bookworm\n", f"BASE={pinned}\n")) == []


@needs_parser
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_misspelt_instruction_and_flag_is_noticed(file):
    text = file.read_text()
    places = [m.end(1) for m in re.finditer(r"^([A-Z]+) ", text, re.MULTILINE)]
    places += [m.end(1) for m in re.finditer(r"^[A-Z]+ (--[a-z]+)=", text, re.MULTILINE)]
    assert len(places) > 20
    assert [
        text[p - 8 : p + 8]
        for p in places
        if not faults(text[:p] + ("X" if text[p] == " " else "x") + text[p:])
    ] == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_everything_an_image_copies_is_let_through_and_there(file):
    let = (FOLDER / f"{file.name}.dockerignore").read_text().splitlines()
    assert "*" in let
    for name in re.findall(r"^COPY (?:--chmod=\S+ )?(infra/\S+)", file.read_text(), re.MULTILINE):
        assert (ROOT / name).exists()
        assert any(line[0] == "!" and name.startswith(line[1:]) for line in let)


@pytest.mark.parametrize(("code", "becomes"), [(0, 0), (1, 1), (2, 2), (3, 0), (4, 0), (5, 5), (7, 0)])
def test_a_scheduler_does_not_repeat_what_would_not_change(tmp_path, code, becomes):
    stand_in = tmp_path / "millijoule"
    stand_in.write_text(f'#!/bin/sh\n[ "$1" = "a b" ] && exit {code}\nexit 99\n')
    stand_in.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([FOLDER / "millijoule-job", "a b"], env=env, capture_output=True, check=False)
    assert done.returncode == becomes


@pytest.mark.long
@needs(missing("gcc"))
def test_triton_takes_its_binding_from_the_image_and_needs_no_compiler(tmp_path):
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    script = FOLDER / "triton_binding.py"
    subprocess.run([sys.executable, script, "build", tmp_path / "built"], check=True)
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    compiler.chmod(0o755)
    ask = "from triton.backends.nvidia.driver import CudaUtils; CudaUtils()"
    env = {
        **os.environ,
        "PATH": "/nowhere",
        "CC": str(compiler),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_LIBCUDA_PATH": "/nowhere",
        "MILLIJOULE_TRITON_BINDING": str(tmp_path / "built"),
    }
    done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=False)
    # without a GPU the driver's own functions are all that is missing
    assert done.returncode == 0 or "undefined symbol: cu" in done.stderr
    assert list((tmp_path / "cache").glob("*/cuda_utils*.so"))
    other = tmp_path / "other.c"
    other.write_text(Path(driver.__file__).with_name("driver.c").read_text() + "\n")
    done = subprocess.run(
        [compiler, other, "-o", tmp_path / "x.so"], env=env, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert not (tmp_path / "x.so").exists()
