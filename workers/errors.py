"""The exceptions of the product, one branch per failure domain: whose fault it is decides what happens next.

docs/failure-domains.md has the table. Each message names where it is, the value and what to do next.
"""

from __future__ import annotations


class MillijouleError(Exception):
    """Base of every error that ends a command with a message instead of a traceback."""


class InputError(MillijouleError):
    """A prompt file, a model file, an option or an output folder cannot be used as given. Ends the command."""


class UsageError(InputError):
    """An option that means nothing, or options that contradict each other, whatever files, model and cluster there are.

    Nothing but another command line helps, so a command ends with the code of one that does not parse.
    """


class RowError(InputError):
    """A request that this model can draw nowhere: a size it does not make, a class it does not have.

    Generators raise it from `generate`. The row is quarantined at once: what the model says of a request by itself needs
    no second worker. Any other exception of `generate` is believed only when another worker fails on the row, too.
    """


class NodeError(MillijouleError):
    """This node cannot work, another may: no or another model, no scratch space, a device that fails, output not in sight.

    The node cools off, its shards go elsewhere; after repeated failures it is left out for the run and listed at its end.
    """


class SickWorkerError(NodeError):
    """The generator fails on a request it has served before: the device, not a prompt, is at fault."""


class StoreError(MillijouleError):
    """Storage refused or failed.

    Attributes:
        transient: True when the same call may succeed later (throttling, time-out): it is waited for. False when a
            person must act first (no permission, no such bucket, disk full): raised in a worker, it is the node's fault as
            long as other nodes can use the store.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class NotFoundError(StoreError):
    """The named object does not exist."""


class AlreadyExistsError(StoreError):
    """An exclusive create met an object that holds other bytes."""


class DamagedError(StoreError):
    """An object of the job is not what was written: no node is at fault, the job ends."""


class JobError(MillijouleError):
    """The job cannot go on: no node is left that can work, or the cluster's head is gone. What is committed stays."""


class SupersededError(JobError):
    """Another run has taken the job over: this one, a scheduler's retry of an earlier one, does not take it back by itself."""
