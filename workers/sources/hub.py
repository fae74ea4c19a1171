"""Models on the Hugging Face hub, or on a server that speaks its API: asked by the driver alone, once per job.

A revision is settled to a commit, of which only the files that are loaded are fetched, into huggingface_hub's own cache. Its variables
hold: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE. Where the hub does not answer, what the cache has counts.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millijoule.workers.counted import counted
from millijoule.workers.errors import InputError, NodeError
from millijoule.workers.generators.file_hashes import file_sha256

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")

#: Given the names of all files and a function that fetches one and returns its path: the names of those that are wanted.
Chooser = Callable[[Collection[str], Callable[[str], Path]], Collection[str]]


@dataclass(frozen=True)
class HubFiles:
    """Files of one commit of a repository, as they lie in the cache."""

    folder: Path
    commit: str
    names: tuple[str, ...]


def fetch_from_hub(option: str, repository: str, revision: str | None, choose: Chooser) -> HubFiles:
    """The files that `choose` wants of `repository` at `revision` (a branch, tag or commit; None: its main branch).

    Raises:
        InputError: huggingface_hub is missing; the hub does not have it, does not give it to this user, or cannot be asked
            while the cache does not have it. The message names the id and what to do.
        NodeError: there is no room for it.
    """
    hub = _import()
    quiet = hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()
    try:
        if (cached := _cached(hub, repository, revision, choose)) is not None:
            return cached
        with _words(hub, option, repository, revision):
            return _fetch(hub, option, repository, revision, choose)
    finally:
        if not quiet:
            hub.utils.enable_progress_bars()


def _import() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise InputError(
            f"models of the hub need huggingface_hub: pip install 'millijoule[diffusers]' ({error})"
        ) from error
    return huggingface_hub


def _fetch(hub: Any, option: str, repository: str, revision: str | None, choose: Chooser) -> HubFiles:
    began = time.monotonic()
    api = hub.HfApi()
    try:
        info = api.model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:
        found = _cached(hub, repository, revision, choose, any_revision=True) if _no_answer(error) else None
        if found is None:
            raise
        log.warning(
            "%s %s: the hub does not answer (%s); the cache has commit %s",
            *(option, repository, type(error).__name__, found.commit[:12]),
        )
        return found
    commit = info.sha
    files = {sibling.rfilename: sibling for sibling in info.siblings or ()}

    def get(name: str) -> Path:
        return Path(hub.hf_hub_download(repository, name, revision=commit))

    names = tuple(choose(files, get))
    size = sum(files[name].size or 0 for name in names)
    log.info(
        "%s %s at commit %s: %s, %.1f MB",
        option,
        repository,
        commit[:12],
        counted(len(names), "file"),
        size / 1e6,
    )
    folder = hub.snapshot_download(repository, revision=commit, allow_patterns=[_literal(n) for n in names])
    if revision is not None and not _COMMIT.fullmatch(revision):
        _remember(hub, repository, revision, commit)
    elif revision is None:
        _remember(hub, repository, hub.constants.DEFAULT_REVISION, commit)
    for name in names:
        _check(Path(folder, name), files[name])
    log.info("%s %s: fetched or found in the cache (%.1f s)", option, repository, time.monotonic() - began)
    return HubFiles(Path(folder), commit, names)


def _check(path: Path, sibling: Any) -> None:
    """A large file has a hash that the hub states: a cache can be damaged, or a download cut off."""
    lfs = sibling.lfs
    stated = None if lfs is None else lfs["sha256"] if isinstance(lfs, dict) else lfs.sha256
    if stated is not None and file_sha256(path) != stated:
        raise InputError(
            f"{path}: is not the file that the hub has under this name; remove it and {os.path.realpath(path)}, then "
            "try again"
        )


def _remember(hub: Any, repository: str, revision: str, commit: str) -> None:
    """Write down in the cache what a branch or tag stood for, as a download by its name does: without the hub it still does."""
    path = _storage(hub, repository) / "refs" / revision
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    except OSError as error:
        log.warning("%s: cannot be written (%s)", path, error)


def _cached(
    hub: Any, repository: str, revision: str | None, choose: Chooser, *, any_revision: bool = False
) -> HubFiles | None:
    """What the cache has, without asking: of a commit always, of a branch or tag where the hub cannot be asked."""
    commit = revision
    if revision is None or not _COMMIT.fullmatch(revision):
        if not any_revision and not hub.constants.is_offline_mode():
            return None
        try:
            ref = _storage(hub, repository) / "refs" / (revision or hub.constants.DEFAULT_REVISION)
            commit = ref.read_text().strip()
        except OSError:
            return None
    assert commit is not None
    folder = _storage(hub, repository) / "snapshots" / commit
    present = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    names = present
    if not present:
        return None
    # the listing of the commit, where an earlier download kept it, also says what is missing
    if listing := getattr(hub, "get_cached_repo_tree", None):
        try:
            names = [entry.path for entry in listing(repository, revision=commit)]
        except hub.errors.CachedRepoTreeNotFoundError:
            pass
    try:
        wanted = tuple(choose(names, lambda name: folder / name))
    except InputError:
        return None  # what is wrong with it, the hub's own listing says
    if not set(wanted) <= set(present):
        return None
    return HubFiles(folder, commit, wanted)


def _storage(hub: Any, repository: str) -> Path:
    cache = Path(hub.constants.HF_HUB_CACHE).expanduser()
    return cache / f"models--{repository.replace('/', '--')}"


def _literal(name: str) -> str:
    """A pattern that matches `name` alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _no_answer(error: Exception) -> bool:
    """Whether no server answered; huggingface_hub's releases differ in whose exception says so."""
    return isinstance(error, ConnectionError | TimeoutError) or any(
        kind.__name__ == "TransportError" for kind in type(error).__mro__
    )


@contextmanager
def _words(hub: Any, option: str, repository: str, revision: str | None) -> Iterator[None]:
    """What goes wrong in between, as the product's own exceptions."""
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    what = f"{option} {repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(
            f"{what}: is gated: accept its terms at {endpoint}/{repository} and set HF_TOKEN to a token of that account "
            "where the job is started"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{what}: no such file or directory here, and {endpoint} has no model of that name that this user may see; "
            "check the spelling, or set HF_TOKEN if it is a private one"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{what}: has no revision {revision!r} (--revision: a branch, tag or commit)"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise InputError(
            f"{what}: is not in the cache ({hub.constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE says not to ask the hub. "
            "Unset it for one run, or copy the cache from a machine that has the model"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise InputError(
                f"{what}: {endpoint} refuses it to this user ({status}); set HF_TOKEN to a token that may read it"
            ) from error
        raise InputError(
            f"{what}: {endpoint} answers {status}: {str(error).splitlines()[0]}; try again later"
        ) from error
    except Exception as error:
        if _no_answer(error):
            raise InputError(
                f"{what}: no such file or directory here, and {endpoint} does not answer ({type(error).__name__}), nor "
                f"is the model in the cache ({hub.constants.HF_HUB_CACHE}). Check the network or HF_ENDPOINT"
            ) from error
        if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.EROFS,
        ):
            raise NodeError(
                f"{what}: the hub's cache {error.filename or hub.constants.HF_HUB_CACHE}: {error.strerror}; free space "
                "there, or set HF_HOME to another folder"
            ) from error
        raise
