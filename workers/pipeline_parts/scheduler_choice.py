"""`--scheduler`: another of diffusers' schedulers in the place of the pipeline's own.

    NAME[:SETTING=VALUE,...]      DPMSolverMultistepScheduler:use_karras_sigmas=true,algorithm_type=sde-dpmsolver++

The other takes over the settings of the pipeline's own where it has them, as diffusers' `from_config` does.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import msgspec

from millijoule.workers.diffusion.libraries import import_diffusers
from millijoule.workers.errors import InputError, UsageError


def parse_scheduler(text: str) -> tuple[str, dict[str, Any]]:
    """Class name and settings; raises InputError where `text` is not of the form."""
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(
                f"--scheduler {text}: write NAME or NAME:SETTING=VALUE,..., such as use_karras_sigmas=true"
            )
        settings[key] = _value(value)
    if not name.isidentifier():
        raise UsageError(f"--scheduler {text}: {name!r} is not the name of a scheduler of diffusers")
    return name, settings


def _value(text: str) -> Any:
    """A number or a truth value as JSON writes it, everything else as text; Python's spelling of truth is fine."""
    try:
        value = msgspec.json.decode(text.lower() if text in ("True", "False", "None") else text)
    except ValueError:
        return text
    return value if value is None or isinstance(value, bool | int | float) else text


def check_scheduler(text: str, own: str) -> None:
    """Raise InputError unless `text` names a scheduler that can take the place of one of class `own`, and settings it has."""
    diffusers, _ = import_diffusers()
    _find(diffusers, text, getattr(diffusers, own, None))


def change_scheduler(pipeline: Any, text: str) -> None:
    """Give `pipeline` the scheduler that `text` names.

    Raises:
        InputError: it cannot take the place of the pipeline's own, or has no such setting.
    """
    diffusers, _ = import_diffusers()
    own = pipeline.scheduler
    kind, settings = _find(diffusers, text, type(own))
    try:
        pipeline.scheduler = kind.from_config(own.config, **settings)
    except Exception as error:  # a value the class does not take
        raise InputError(f"--scheduler {text}: {error}") from error


def compatible_schedulers(own: Any) -> list[str]:
    """Names of the classes that can take the place of the scheduler class `own`, itself included."""
    names = {*getattr(own, "_compatibles", ()), own.__name__}
    return sorted(names)


def _find(diffusers: Any, text: str, own: Any) -> tuple[Any, dict[str, Any]]:
    name, settings = parse_scheduler(text)
    there = [n for n in compatible_schedulers(own) if hasattr(diffusers, n)] if own is not None else []
    if name not in there:
        near = difflib.get_close_matches(name, there, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"--scheduler {name}: {hint}this pipeline's own is {getattr(own, '__name__', 'none')}, in its place can be "
            f"{', '.join(there) or 'no other'}"
        )
    kind: Any = getattr(diffusers, name)
    if not isinstance(kind, type):  # a stand-in of diffusers for a class whose library is missing
        raise InputError(f"--scheduler {name}: needs a library that is not installed")
    known = list(inspect.signature(kind).parameters)
    for key in settings:
        if key not in known:
            raise InputError(
                f"--scheduler {text}: {name} has no setting {key}; it has {', '.join(sorted(known))}"
            )
    return kind, settings
