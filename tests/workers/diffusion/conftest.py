"""Loaded tiny pipelines, one of each family for all tests of the folder."""

from __future__ import annotations

import functools

import pytest
from support.tiny_pipelines import tiny_pipeline

from millijoule.workers.diffusion.generator import DiffusersGenerator
from millijoule.workers.generators.options import GeneratorOptions

pytest.importorskip("diffusers")


@functools.cache
def load_tiny(family: str, long_prompts: str = "truncate") -> DiffusersGenerator:
    options = GeneratorOptions(engine="eager", long_prompts=long_prompts)
    return DiffusersGenerator.load(tiny_pipeline(family), options=options)


@pytest.fixture
def tiny():
    """`tiny(family, long_prompts=...)` is a generator; tests put back what they change in it."""
    return load_tiny
