"""Hashes and signatures of a set of files: Merkle root, in-toto Statement v1, DSSE envelope with Ed25519.

A signature says that the holder of a key vouched for these bytes, and that they have not changed since. It says nothing
about whether a meter told the truth. `cryptography` is needed to sign and to check signatures, for nothing else.

Sources: RFC 6962 section 2.1 (tree hash), in-toto attestation specification 1.0 (Statement), DSSE 1.0.2 (envelope and
pre-authentication encoding).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from millijoule.pipeline.comparison.registration import canonical_json
from millijoule.workers.errors import InputError
from millijoule.workers.records import decode, encode

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
#: A name, not an address: nothing is fetched from it.
PREDICATE_TYPE = "https://millijoule.dev/energy-comparison/v1"
PAYLOAD_TYPE: Literal["application/vnd.in-toto+json"] = "application/vnd.in-toto+json"


@dataclass(frozen=True)
class Signature:
    """`keyid` is the SHA-256 of the public key's DER form; `sig` is base64 in JSON."""

    keyid: str
    sig: bytes


@dataclass(frozen=True)
class Envelope:
    """A statement as it was signed. Field names are DSSE's; `payload` is base64 in JSON."""

    payload: bytes
    signatures: tuple[Signature, ...]
    payloadType: Literal["application/vnd.in-toto+json"] = PAYLOAD_TYPE

    def to_json(self) -> bytes:
        return encode(self) + b"\n"

    @staticmethod
    def from_json(data: bytes) -> Envelope:
        """Raises ValueError where `data` is no such envelope, or its base64 is another spelling of the same bytes."""
        envelope, raw = decode(Envelope, data), decode(dict, data)
        spelt = [raw["payload"], *(s["sig"] for s in raw["signatures"])]
        meant = [envelope.payload, *(s.sig for s in envelope.signatures)]
        if spelt != [base64.b64encode(m).decode() for m in meant]:
            raise ValueError("base64 that is not as it is written")
        return envelope


def merkle_root(digests: Mapping[str, str]) -> str:
    """Root over files in the order of their names; a leaf is name, NUL, and the file's SHA-256."""
    leaves = [
        hashlib.sha256(b"\0" + name.encode() + b"\0" + bytes.fromhex(digest)).digest()
        for name, digest in sorted(digests.items())
    ]
    return _tree(leaves).hex() if leaves else hashlib.sha256().hexdigest()


def _tree(leaves: list[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << ((len(leaves) - 1).bit_length() - 1)  # the largest power of two below their number
    return hashlib.sha256(b"\1" + _tree(leaves[:half]) + _tree(leaves[half:])).digest()


def statement(digests: Mapping[str, str], predicate: Mapping[str, Any]) -> bytes:
    """An in-toto Statement v1 about files, given by name and SHA-256."""
    return canonical_json(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": n, "digest": {"sha256": d}} for n, d in sorted(digests.items())],
            "predicateType": PREDICATE_TYPE,
            "predicate": predicate,
        }
    )


def sign(payload: bytes, key: Ed25519PrivateKey | None) -> Envelope:
    """An envelope with one signature, or with none where there is no key."""
    if key is None:
        return Envelope(payload, ())
    signature = Signature(key_id(key.public_key()), key.sign(_pre_authentication(payload)))
    return Envelope(payload, (signature,))


def is_signed_by(envelope: Envelope, key: Ed25519PublicKey) -> bool:
    """Whether one of the envelope's signatures is `key`'s over this payload; key ids decide nothing."""
    from cryptography.exceptions import InvalidSignature

    for signature in envelope.signatures:
        try:
            key.verify(signature.sig, _pre_authentication(envelope.payload))
            return True
        except InvalidSignature:
            continue
    return False


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of the key's DER form (SubjectPublicKeyInfo)."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def load_private_key(pem: bytes, *, where: str) -> Ed25519PrivateKey:
    """An unencrypted Ed25519 key, as `openssl genpkey -algorithm ed25519` writes it; raises InputError."""
    return _load_key("private", pem, where)


def load_public_key(pem: bytes, *, where: str) -> Ed25519PublicKey:
    """An Ed25519 public key, as `openssl pkey -pubout` writes it; raises InputError."""
    return _load_key("public", pem, where)


def _load_key(kind: Literal["private", "public"], pem: bytes, where: str) -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise InputError("signatures need `cryptography`: pip install millijoule[verify]") from error
    try:
        key: Any
        if kind == "private":
            key = serialization.load_pem_private_key(pem, password=None)
        else:
            key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: not an unencrypted {kind} key in PEM form: {error}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey | ed25519.Ed25519PublicKey):
        raise InputError(f"{where}: not an Ed25519 key; make one with: openssl genpkey -algorithm ed25519")
    return key


def _pre_authentication(payload: bytes) -> bytes:
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
