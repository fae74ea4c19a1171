"""A server on loopback that speaks the hub's API as far as huggingface_hub asks it, and keeps every request.

    with StandInHub() as hub:
        hub.add("owner/name", folder)
        ... hub.requests

A repository can be gated, or slow, the hub `away`. `use(monkeypatch)` points this process at it; `env` is for other processes.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

#: Larger files are kept by the hub in LFS, which states their SHA-256.
LFS_BYTES = 2048


@dataclass
class Repository:
    """One commit, the tip of `main`."""

    folder: Path
    commit: str
    gated: bool = False
    token: str | None = None  # that may read it where it is gated
    seconds: float = 0.0  # before each answer
    old: dict[str, Path] = field(default_factory=dict)  # folders of earlier commits

    def at(self, revision: str) -> tuple[str, Path] | None:
        if revision in ("main", self.commit):
            return self.commit, self.folder
        return (revision, self.old[revision]) if revision in self.old else None


class StandInHub:
    """Use as a context manager. `requests` are (method, path, token)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.away = False  # connections end without an answer
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StandInHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repository: str, folder: Path, **more: Any) -> Repository:
        """Make `folder` the tip of `main`; an earlier tip stays reachable by its commit."""
        before = self.repositories.get(repository)
        commit = hashlib.sha1(
            "".join(f"{n}{p.read_bytes()!r}" for n, p in _files(folder).items()).encode()
        ).hexdigest()
        old = {**before.old, before.commit: before.folder} if before is not None else {}
        made = self.repositories[repository] = Repository(folder, commit, old=old, **more)
        return made

    def env(self, home: Path) -> dict[str, str]:
        """For a process that is to ask this hub, with the hub's cache in `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def use(self, monkeypatch: Any, home: Path) -> None:
        """The same for this process: huggingface_hub reads its variables when it is imported."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)

    def fetched(self) -> list[str]:
        """Paths of the files whose content was asked for, in order of their names."""
        return sorted(
            p.split("/resolve/", 1)[1].split("/", 1)[1]
            for m, p, _ in self.requests
            if m == "GET" and "/resolve/" in p
        )

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        if self.away:
            handler.close_connection = True
            return None
        path = unquote(urlsplit(handler.path).path)
        token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.requests.append((handler.command, path, token))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
        else:
            name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.repositories.get(name)
        if repository is None:
            return _send(handler, 401 if token is None else 404, {"X-Error-Code": "RepoNotFound"}, b"", body)
        time.sleep(repository.seconds)
        if repository.gated and (token is None or token != repository.token):
            return _send(handler, 401 if token is None else 403, {"X-Error-Code": "GatedRepo"}, b"", body)
        kind, revision = (rest[0], rest[1]) if rest else ("revision", "main")
        found = repository.at(revision)
        if found is None:
            return _send(handler, 404, {"X-Error-Code": "RevisionNotFound"}, b"", body)
        commit, folder = found
        files = _files(folder)
        if kind == "resolve":
            wanted = "/".join(rest[2:])
            if wanted not in files:
                return _send(handler, 404, {"X-Error-Code": "EntryNotFound"}, b"", body)
            data = files[wanted].read_bytes()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(data)}"'}
            return _send(handler, 200, headers, data, body)
        if kind == "tree":
            content: Any = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                | (
                    {"lfs": {"oid": _oid(d), "size": len(d), "pointerSize": 130}}
                    if len(d) > LFS_BYTES
                    else {}
                )
                for n, d in ((n, p.read_bytes()) for n, p in files.items())
            ]
        else:
            siblings = [
                {"rfilename": n, "size": len(d), "blobId": hashlib.sha1(d).hexdigest()}
                | (
                    {"lfs": {"sha256": _oid(d), "size": len(d), "pointerSize": 130}}
                    if len(d) > LFS_BYTES
                    else {}
                )
                for n, d in ((n, p.read_bytes()) for n, p in files.items())
            ]
            content = {
                "id": name,
                "sha": commit,
                "siblings": siblings,
                "gated": False,
                "private": False,
                "tags": [],
            }
        return _send(handler, 200, {"Content-Type": "application/json"}, json.dumps(content).encode(), body)


def _files(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}


def _oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if len(data) > LFS_BYTES else hashlib.sha1(data).hexdigest()


def _send(
    handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes, body: bool
) -> None:
    handler.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(data))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if body:
        handler.wfile.write(data)
