"""The exceptions a user can meet. Each message names the place, the value and what to do next."""

from __future__ import annotations


class MillijouleError(Exception):
    """Base of every error that ends a command with a message instead of a traceback."""


class InputError(MillijouleError):
    """A prompt file, a model file, an option or an output folder cannot be used as given."""


class StoreError(MillijouleError):
    """Storage refused or failed.

    Attributes:
        transient: True when the same call may succeed later (throttling, time-out), False when a person
            must act first (no permission, no such bucket, disk full).
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient

    def __reduce__(self):  # Ray carries errors between processes; keep `transient`
        return (_rebuild_store_error, (type(self), str(self), self.transient))


class NotFoundError(StoreError):
    """The named object does not exist."""


class AlreadyExistsError(StoreError):
    """An exclusive create met an object that holds other bytes."""


def _rebuild_store_error(cls: type[StoreError], message: str, transient: bool) -> StoreError:
    return cls(message, transient=transient)
