#!/opt/millijoule/bin/python
"""Triton without a compiler at run time: its one C file, the binding to CUDA's driver, is compiled when the image is built.

Kernels need no compiler of the host, only this binding does. `build FOLDER` compiles it where a compiler is; afterwards this file
stands in the image as `CC`: asked for the same source it hands out what was compiled, and refuses everything else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

#: Environment variable: the folder that `build` filled.
FOLDER = "MILLIJOULE_TRITON_BINDING"


def fingerprint(source: Path) -> str:
    """SHA-256 of a C file, hex."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def build(folder: Path) -> None:
    """Compile Triton's binding into `folder`, named by its source's fingerprint.

    The driver's library is not there when an image is built: an empty one of its name stands in for it. What is compiled names it,
    and takes its functions from the real one when it is loaded.
    """
    from triton.backends.nvidia import driver

    source = Path(driver.__file__).with_name("driver.c")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as stub:
        library = Path(stub, "libcuda.so.1")
        empty = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(library)]
        subprocess.run(empty, input="", text=True, check=True)
        subprocess.run(
            [
                *("gcc", str(source), "-O3", "-shared", "-fPIC", "-Wno-psabi"),
                *("-o", str(folder / f"{fingerprint(source)}.so"), f"-L{stub}", "-l:libcuda.so.1"),
                *(f"-I{include}" for include in driver.include_dirs),
                f"-I{sysconfig.get_paths()['include']}",
            ],
            check=True,
        )


def hand_out(arguments: list[str], folder: Path) -> int:
    """Answer a compiler's command line: the exit code, 1 for a source that was not compiled beforehand."""
    sources = [Path(argument) for argument in arguments if argument.endswith(".c")]
    if len(sources) == 1 and "-o" in arguments[:-1]:
        compiled = folder / f"{fingerprint(sources[0])}.so"
        if compiled.is_file():
            shutil.copyfile(compiled, arguments[arguments.index("-o") + 1])
            return 0
    print(
        f"there is no compiler in this image, and {' '.join(map(str, sources)) or 'this'} is not Triton's binding",
        file=sys.stderr,
    )
    return 1


def main(arguments: list[str]) -> int:
    """The exit code: 2 where the folder is not said, 1 where a file cannot be used."""
    try:
        if arguments[:1] == ["build"]:
            if len(arguments) != 2:
                print("triton-binding: build FOLDER", file=sys.stderr)
                return 2
            build(Path(arguments[1]))
            return 0
        if not (folder := os.environ.get(FOLDER)):
            print(f"triton-binding: {FOLDER} is not set: the folder that `build` filled", file=sys.stderr)
            return 2
        return hand_out(arguments, Path(folder))
    except OSError as error:
        print(f"triton-binding: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
