"""The commands; and `generate`, the first of them as a function: `from millijoule.jobs import generate`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from millijoule.jobs.job_result import JobResult

if TYPE_CHECKING:
    from millijoule.jobs.generate import generate

__all__ = ["JobResult", "generate"]


class _Package(ModuleType):
    """This package. Its attribute `generate` is the function, also once the submodule of that name has been imported,
    which would otherwise take its place; `import_module("millijoule.jobs.generate")` gives the submodule."""

    @property
    def generate(self) -> Any:
        from millijoule.jobs.generate import generate

        return generate

    @generate.setter
    def generate(self, submodule: ModuleType) -> None: ...


sys.modules[__name__].__class__ = _Package
