"""A job's images are of one model, also where that is what a user's factory makes, whose source or weights may change.

Other models are identified by their files before a job is planned (`registry.describe_model`). What a factory makes is known
when it has been called: the job's first worker writes down the SHA-256 that its generator states.
"""

from __future__ import annotations

from millijoule.workers import factories
from millijoule.workers.errors import AlreadyExistsError, NodeError
from millijoule.workers.layout import FACTORY_MODEL_KEY
from millijoule.workers.lease import WorkerConfig
from millijoule.workers.storage.protocol import Store


def check_factory_model(store: Store, config: WorkerConfig, sha256: str) -> None:
    """Raise NodeError if the job began with a generator that states another `sha256`."""
    if not config.model.startswith(factories.PREFIX):
        return
    stated = sha256.encode()
    try:
        if config.commits_exclusively:
            store.put_exclusive(FACTORY_MODEL_KEY, stated)
        elif not store.exists(FACTORY_MODEL_KEY):
            store.put(FACTORY_MODEL_KEY, stated)
    except AlreadyExistsError:
        pass  # what is there is compared below
    if (begun := store.get(FACTORY_MODEL_KEY)) != stated:
        raise NodeError(
            f"{config.model}: states SHA-256 {sha256[:16]} here, {store.url} began with {begun.decode()[:16]}: "
            "bring back that version on every node, or give another output"
        )
