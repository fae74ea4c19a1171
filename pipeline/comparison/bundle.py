"""Write a comparison as one folder that an outsider can check offline.

```
registration.json     what was fixed before the first run (canonical JSON)
environment.json      machine, software, models as loaded
reads.parquet ...     raw rows, see `comparison_rows`
result.json           what follows from them
manifest.json         size and SHA-256 of every file above, Merkle root
statement.dsse.json   in-toto statement over the same files in a DSSE envelope, signed if there is a key
```

`bundle_check` is the other side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.pipeline.comparison.attestation import merkle_root, sign, statement
from millijoule.pipeline.comparison.registration import Registration, canonical_json
from millijoule.pipeline.comparison.result import compute_result, index_images, measure_blocks
from millijoule.pipeline.comparison.rows import BLOCK_SCHEMA, DERIVED_BLOCK_COLUMNS, Rows
from millijoule.workers.errors import InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

REGISTRATION, ENVIRONMENT, RESULT = "registration.json", "environment.json", "result.json"
MANIFEST, STATEMENT = "manifest.json", "statement.dsse.json"

#: What of the result the statement repeats.
_QUOTED = (
    "registration_sha256",
    "verdict",
    "claim",
    "ratio_per_accepted_image",
    "boundary",
    "evidence_class",
)


@dataclass(frozen=True)
class FileEntry:
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """The files of a bundle by name, without manifest and statement."""

    files: dict[str, FileEntry]
    merkle_root: str
    format: Literal["millijoule-energy-comparison-bundle/1"] = "millijoule-energy-comparison-bundle/1"

    @property
    def digests(self) -> dict[str, str]:
        return {name: entry.sha256 for name, entry in self.files.items()}

    def to_json(self) -> bytes:
        return canonical_json(asdict(self))


def write_bundle(
    folder: Path,
    registration: Registration,
    environment: Mapping[str, Any],
    rows: Rows,
    key: Ed25519PrivateKey | None = None,
) -> dict[str, Any]:
    """Write all files of a bundle into `folder`, which must be new or empty.

    Args:
        folder: is created.
        registration: of the comparison.
        environment: JSON values.
        rows: raw rows; the derived columns of blocks are filled in here.
        key: signs the statement; without one the bundle is unsigned.

    Returns:
        The result.

    Raises:
        InputError: `folder` has files in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InputError(f"{folder}: not empty; a bundle is written once")
    rows = fill_blocks(registration, rows)
    result = compute_result(registration, rows)
    (folder / REGISTRATION).write_bytes(registration.to_json())
    (folder / ENVIRONMENT).write_bytes(canonical_json(environment))
    for name, table in rows.by_file():
        pq.write_table(table, folder / name, compression="zstd")
    result["inputs"] = hash_inputs(folder)
    (folder / RESULT).write_bytes(canonical_json(result))
    seal(folder, key)
    return result


def hash_inputs(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that the result follows from."""
    derived = (RESULT, MANIFEST, STATEMENT)
    return {p.name: hash_file(p) for p in sorted(folder.iterdir()) if p.name not in derived}


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fill_blocks(registration: Registration, rows: Rows) -> Rows:
    """`rows` with the derived columns of the block table as they follow from the others."""
    numbers = measure_blocks(rows, index_images(registration, rows))
    blocks = rows.blocks
    for name in DERIVED_BLOCK_COLUMNS:
        field = BLOCK_SCHEMA.field(name)
        column = pa.array([getattr(n, name) for n in numbers], field.type)
        blocks = blocks.set_column(BLOCK_SCHEMA.get_field_index(name), field, column)
    return replace(rows, blocks=blocks)


def seal(folder: Path, key: Ed25519PrivateKey | None) -> None:
    """Write manifest and statement over the files that lie in `folder`."""
    names = sorted(p.name for p in folder.iterdir() if p.name not in (MANIFEST, STATEMENT))
    files = {n: FileEntry(hash_file(folder / n), (folder / n).stat().st_size) for n in names}
    manifest = Manifest(files, merkle_root({n: entry.sha256 for n, entry in files.items()}))
    (folder / MANIFEST).write_bytes(manifest.to_json())
    result = json.loads((folder / RESULT).read_bytes())
    said = statement(manifest.digests, predicate(result, manifest.merkle_root))
    (folder / STATEMENT).write_bytes(sign(said, key).to_json())


def predicate(result: Mapping[str, Any], root: str) -> dict[str, Any]:
    """What the statement says about the files: the verdict and what it stands on."""
    return {
        "merkle_root": root,
        **{name: result[name] for name in _QUOTED},
        "quality_gate_passed": result["gate"]["passed"],
    }
