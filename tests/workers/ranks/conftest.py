"""Tiny pipelines drawn by one process, and by two together."""

from __future__ import annotations

import pytest
from support.ranks import forked_ranks  # noqa: F401  (a fixture)

pytest.importorskip("diffusers")
