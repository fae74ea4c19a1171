"""A user's own objects: what is no function of an importable module is refused with the option it was given to."""

import pytest

from millijoule.workers.errors import InputError
from millijoule.workers.factories import find_factory
from millijoule.workers.generators.registry import describe_model, load_generator


def test_a_function_is_found_by_module_and_name():
    assert find_factory("--model", "python:json:dumps")([1]) == "[1]"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("python:json", "write python:MODULE:FACTORY"),
        ("python::dumps", "write python:MODULE:FACTORY"),
        ("python:json:dumps:more", "write python:MODULE:FACTORY"),
        ("python:no_such_module:f", "no_such_module"),
        ("python:json:no_such_name", "no_such_name"),
    ],
)
def test_what_is_no_factory_is_refused_by_name(name, words):
    with pytest.raises(InputError, match=f"--model {name}: .*{words}"):
        load_generator(name)


def test_a_factory_is_described_without_being_imported():
    assert describe_model("python:no_such_module:f") != describe_model("python:no_such_module:g")
    with pytest.raises(InputError, match="write python:MODULE:FACTORY"):
        describe_model("python:json")
