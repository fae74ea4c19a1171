"""Check a bundle offline: recompute everything that follows from its raw rows, and list every difference.

Needs Python, NumPy and PyArrow; `cryptography` only where a public key is given. A bundle comes from a stranger: nothing in
it is executed, no path in it is followed, every table must have its exact schema. What was consistently forged before
signing cannot be seen here; what was changed after signing can.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.pipeline.comparison.acceptance import is_blank, parse_icons, shows_scene
from millijoule.pipeline.comparison.attestation import (
    Envelope,
    is_signed_by,
    key_id,
    merkle_root,
    statement,
)
from millijoule.pipeline.comparison.bundle import (
    ENVIRONMENT,
    MANIFEST,
    REGISTRATION,
    RESULT,
    STATEMENT,
    FileEntry,
    Manifest,
    fill_blocks,
    hash_file,
    hash_inputs,
    predicate,
)
from millijoule.pipeline.comparison.protocol_check import StatedEnvironment, check_protocol
from millijoule.pipeline.comparison.registration import ARMS, Registration, canonical_json
from millijoule.pipeline.comparison.result import compute_result
from millijoule.pipeline.comparison.rows import (
    OPTIONAL_TABLES,
    SCHEMAS,
    Rows,
    encode_images,
)
from millijoule.pipeline.comparison.sampled_power import SOURCE as POWER_SOURCE
from millijoule.pipeline.comparison.sampled_power import integrate_power
from millijoule.workers.errors import InputError
from millijoule.workers.records import decode

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

#: Two machines' linear algebra may differ in the last digits; an edit below this changes nothing anyone quotes.
RELATIVE_TOLERANCE = 1e-6
ABSOLUTE_TOLERANCE = 1e-9
#: Larger JSON files than this are no part of a bundle.
MAX_JSON_BYTES = 64 * 2**20

T = TypeVar("T")
Rejudge = Callable[[Registration, Rows], Iterator[str]]


@dataclass(frozen=True)
class CheckReport:
    """`mismatches` is empty for a sound bundle; `notes` are what a sound bundle still leaves open.

    `result` is what the rows give, whatever the bundle says; None where they give nothing.
    """

    mismatches: tuple[str, ...]
    notes: tuple[str, ...]
    result: dict[str, Any] | None


def check_bundle(
    folder: Path, public_key: Ed25519PublicKey | None = None, *, rejudge: Rejudge | None = None
) -> CheckReport:
    """Recompute the bundle in `folder`.

    Args:
        folder: of the bundle.
        public_key: whose signature must be there; without it signatures are not checked.
        rejudge: reads the images again and yields differences; needs the judge's weights.
    """
    mismatches = list(_check_files(folder))
    if any(": missing" in m for m in mismatches):
        return CheckReport(tuple(mismatches), (), None)
    notes: list[str] = []
    mismatches += _check_signature(folder, public_key, notes)
    again = None
    try:
        registration = Registration.from_json(_read(folder / REGISTRATION))
        rows = _read_rows(folder)
        result = _decode(dict, folder / RESULT)
        environment = _decode(StatedEnvironment, folder / ENVIRONMENT)
    except (InputError, ValueError, OSError, pa.ArrowException) as error:
        return CheckReport((*mismatches, f"cannot be read: {error}"), tuple(notes), None)
    try:
        mismatches += check_protocol(registration, rows, environment)
        mismatches += _check_judgements(registration, rows, notes)
        mismatches += _check_blocks(registration, rows)
        mismatches += _check_power(rows)
        again = json.loads(canonical_json(compute_result(registration, rows)))
        again["inputs"] = hash_inputs(folder)
        mismatches += [f"{RESULT}: {d}" for d in differences(result, again)]
    except (KeyError, IndexError, ValueError, TypeError, ArithmeticError, np.linalg.LinAlgError) as error:
        mismatches.append(f"the rows do not fit each other: {error!r}")
    if rejudge is not None:
        if rows.pixels is None:
            mismatches.append("pixels.parquet: missing, nothing to judge again")
        elif not mismatches:
            mismatches += rejudge(registration, rows)
    return CheckReport(tuple(mismatches), tuple(notes), again)


def differences(stated: Any, found: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ; numbers may by rounding."""
    if isinstance(stated, dict) and isinstance(found, dict):
        for key in sorted(stated.keys() | found.keys()):
            if key not in stated or key not in found:
                yield f"{where}{key} is {'missing' if key in found else 'not part of a result'}"
            else:
                yield from differences(stated[key], found[key], f"{where}{key}.")
    elif isinstance(stated, list) and isinstance(found, list) and len(stated) == len(found):
        for i, pair in enumerate(zip(stated, found, strict=True)):
            yield from differences(*pair, f"{where}{i}.")
    elif type(stated) is float and type(found) is float:
        if not math.isclose(stated, found, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE):
            yield f"{where[:-1]} says {stated!r}, the rows give {found!r}"
    elif type(stated) is not type(found) or stated != found:
        yield f"{where[:-1]} says {stated!r}, the rows give {found!r}"


# ---- files, root, signature -------------------------------------------------------------------------------------


def _check_files(folder: Path) -> Iterator[str]:
    """Names, sizes and hashes against the manifest, the manifest against its root."""
    if not folder.is_dir():
        yield f"{folder}: missing"
        return
    there = {p.name: p for p in folder.iterdir()}
    allowed = {REGISTRATION, ENVIRONMENT, RESULT, MANIFEST, STATEMENT, *SCHEMAS}
    missing = sorted(allowed - set(OPTIONAL_TABLES) - set(there))
    no_files = [name for name, path in sorted(there.items()) if path.is_symlink() or not path.is_file()]
    yield from (f"{name}: missing" for name in missing)
    yield from (f"{name!r}: not part of a bundle" for name in sorted(set(there) - allowed))
    yield from (f"{name}: missing, what is there is not a file" for name in no_files if name in allowed)
    if missing or no_files:
        return
    try:
        manifest = decode(Manifest, _read(folder / MANIFEST))
        root = merkle_root(manifest.digests)
        if manifest.to_json() != (folder / MANIFEST).read_bytes():
            yield f"{MANIFEST}: not canonical JSON"
    except ValueError as error:
        yield f"{MANIFEST}: cannot be read: {error}"
        return
    if root != manifest.merkle_root:
        yield f"{MANIFEST}: Merkle root {manifest.merkle_root!r}, its entries give {root}"
    present = (there.keys() & allowed) - {MANIFEST, STATEMENT}
    for name in sorted(present | set(manifest.files)):
        if name not in manifest.files:
            yield f"{name}: not in the manifest"
        elif name not in present:
            yield f"{name!r}: missing, but in the manifest"
        elif FileEntry(hash_file(folder / name), (folder / name).stat().st_size) != manifest.files[name]:
            yield f"{name}: SHA-256 or size differ from the manifest's"


def _check_signature(folder: Path, public_key: Ed25519PublicKey | None, notes: list[str]) -> Iterator[str]:
    """The statement against manifest and result, the signature against the key."""
    try:
        envelope = Envelope.from_json(_read(folder / STATEMENT))
        said = decode(dict, envelope.payload)
        manifest, result = _decode(Manifest, folder / MANIFEST), _decode(dict, folder / RESULT)
        expected = statement(manifest.digests, predicate(result, manifest.merkle_root))
    except (ValueError, KeyError, TypeError) as error:
        yield f"{STATEMENT}: cannot be read, or made again: {error!r}"
        return
    if envelope.payload != expected:
        yield f"{STATEMENT}: is not, byte for byte, the statement about these files"
        yield from (f"{STATEMENT}: {d}" for d in differences(said, json.loads(expected)))
    if public_key is not None:
        if not is_signed_by(envelope, public_key):
            yield f"{STATEMENT}: not signed by the given key {key_id(public_key)}"
    elif not envelope.signatures:
        notes.append("unsigned: whoever held these files may have changed rows and hashes together")
    else:
        keys = ", ".join(s.keyid for s in envelope.signatures)
        notes.append(f"says it is signed by key {keys}: not checked, give --public-key")


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name}: larger than {MAX_JSON_BYTES} bytes")
    return path.read_bytes()


def _decode(kind: type[T], path: Path) -> T:
    """What the JSON file `path` says; raises ValueError, naming it."""
    data = _read(path)
    try:
        return decode(kind, data)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _read_rows(folder: Path) -> Rows:
    tables = {}
    for name, schema in SCHEMAS.items():
        path = folder / name
        if name in OPTIONAL_TABLES and not path.exists():
            continue
        with pq.ParquetFile(path) as file:
            table = file.read()
        if table.schema.remove_metadata() != schema:
            raise InputError(f"{name}: its columns are not those of a bundle")
        table.validate(full=True)
        for field in schema:
            if not field.nullable and table[field.name].null_count:
                raise InputError(f"{name}: column {field.name} has nulls")
        tables[name.removesuffix(".parquet")] = table
    return Rows(**tables)


# ---- rows -------------------------------------------------------------------------------------------------------


def _check_blocks(registration: Registration, rows: Rows) -> Iterator[str]:
    """The derived columns of the block table."""
    again = fill_blocks(registration, rows).blocks
    for stated, found in zip(rows.blocks.to_pylist(), again.to_pylist(), strict=True):
        for difference in differences(stated, found):
            yield f"blocks.parquet: block {stated['block_id']}: {difference}"


def _check_power(rows: Rows) -> Iterator[str]:
    """The second meter's rows of sampled power against the samples, the samples against their blocks."""
    if rows.power is None:
        return
    if not rows.power.num_rows:
        yield "power.parquet: has no rows"
    sampled = {b["block_id"] for b in rows.blocks.to_pylist() if b["telemetry"]}
    for row in rows.power.to_pylist():
        name = f"power.parquet: block {row['block_id']!r}"
        if row["block_id"] not in sampled:
            yield f"{name}: no block in which power was sampled"
        values = [v for v in (row["power_average_mw"], row["power_instant_mw"]) if v is not None]
        if not values or min(values) <= 0:
            yield f"{name}: a sample without power"
    meter = [] if rows.second_meter is None else rows.second_meter.to_pylist()
    own = sorted((r["t_wall_ns"], r["energy_mj"]) for r in meter if r["source"] == POWER_SOURCE)
    found = integrate_power(rows.power, rows.reads).to_pylist()
    if own != sorted((r["t_wall_ns"], r["energy_mj"]) for r in found):
        yield "second_meter.parquet: its power is not what the samples in power.parquet add up to"


def _check_judgements(registration: Registration, rows: Rows, notes: list[str]) -> Iterator[str]:
    """Image hashes, blank and accepted flags."""
    blank: dict[str, bool] = {}
    if rows.pixels is None:
        notes.append("images are not included: hashes and blank flags are not recomputed")
    else:
        for row in rows.pixels.to_pylist():
            size = row["height"], row["width"]
            if min(size) < 1 or len(row["pixels"]) != size[0] * size[1] * 3:
                yield f"pixels.parquet: {row['sha256']}: not an image"
                continue
            head = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
            if hashlib.sha256(head + row["pixels"]).hexdigest() != row["sha256"]:
                yield f"pixels.parquet: {row['sha256']}: its pixels have another hash"
            if size != (registration.height, registration.width):
                yield f"pixels.parquet: {row['sha256']}: {size[1]}x{size[0]} pixels"
            if row["sha256"] in blank:
                yield f"pixels.parquet: {row['sha256']}: stands there twice"
            blank[row["sha256"]] = is_blank(np.frombuffer(row["pixels"], np.uint8).reshape(*size, 3))
    drawn = set(encode_images(rows.images).pairs)
    judged = set()
    gate = registration.gate
    for row in rows.judgements.to_pylist():
        key = (row["request"], row["sha256"])
        name = f"judgements.parquet: request {key[0]}, image {str(key[1])[:12]}"
        if key in judged:
            yield f"{name}: stands there twice"
        judged.add(key)
        if key not in drawn:
            yield f"{name}: no such image was drawn"
            continue
        if rows.pixels is not None and blank.get(row["sha256"]) is not row["blank"]:
            yield f"{name}: blank is {row['blank']}, its pixels say {blank.get(row['sha256'])}"
        if len(row["metrics"]) != len(gate.metrics):
            yield f"{name}: {len(row['metrics'])} metrics in place of {len(gate.metrics)}"
        if not 0 <= row["request"] < len(registration.requests):
            yield f"{name}: no such request is registered"
            continue
        request = registration.requests[row["request"]]
        if row["score" if gate.rule == "icon-scene" else "icons"] is not None:
            yield f"{name}: has what the rule {gate.rule!r} does not use"
        try:
            if gate.rule == "icon-scene":
                icons = parse_icons(row["icons"] or "")
                accepted = shows_scene(request.prompt, request.family, icons, gate.nouns)
            else:
                accepted = row["score"] is not None and row["score"] >= gate.threshold
        except ValueError as error:
            yield f"{name}: {error}"
            continue
        if accepted is not row["accepted"]:
            yield f"{name}: accepted is {row['accepted']}, its reading says {accepted}"
    if rows.pixels is not None and set(blank) != {digest for _, digest in drawn}:
        yield "pixels.parquet: its images are not those that were drawn"
    for request_number, digest in sorted(drawn - judged):
        yield f"judgements.parquet: request {request_number}, image {digest[:12]}: missing"
    expected = {(arm, r) for arm in ARMS for r in range(len(registration.requests))}
    found = [(r["arm"], r["request"]) for r in rows.features.select(["arm", "request"]).to_pylist()]
    if len(set(found)) != len(found) or {f for f in found if f[0] != "reference"} != expected:
        yield "features.parquet: not one row for each arm and request"
