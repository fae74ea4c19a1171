"""The codec of stored records: what comes back is what was written, and what is none is refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millijoule.workers import records


@dataclass(frozen=True)
class Leaf:
    name: str
    count: int | None = None


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    first: Leaf | None = None
    by_name: dict[str, Leaf] = field(default_factory=dict)
    share: float = 0.5


LEAVES = st.builds(Leaf, st.text(), st.none() | st.integers(-(2**63), 2**63 - 1))
TREES = st.builds(
    Tree,
    st.lists(LEAVES).map(tuple),
    st.none() | LEAVES,
    st.dictionaries(st.text(), LEAVES),
    st.floats(allow_nan=False, allow_infinity=False),
)


@given(TREES)
def test_what_was_written_comes_back(tree: Tree) -> None:
    for indent in (0, 2):
        data = records.encode(tree, indent=indent)
        assert json.loads(data) == json.loads(json.dumps(asdict(tree)))  # a plain reader sees the same
        assert records.decode(Tree, data) == tree


@given(TREES)
def test_a_configuration_is_read_as_its_class_says(tree: Tree) -> None:
    assert records.convert(Tree, json.loads(json.dumps(asdict(tree)))) == tree


def test_equal_records_are_equal_bytes() -> None:
    one = Tree((), by_name={"a": Leaf("a"), "b": Leaf("b")})
    other = Tree((), by_name={"b": Leaf("b"), "a": Leaf("a")})
    assert records.encode(one) == records.encode(other)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ('{"leaves": [{"name": "a"}, {"name": 3}]}', r"`\$\.leaves\[1\]\.name`"),
        ('{"leaves": [{"count": 3}]}', r"name.*`\$\.leaves\[0\]`"),
        ('{"leaves": [], "share": "half"}', r"`\$\.share`"),
        ('{"leaves": [], "share": NaN}', "malformed"),
        ('{"leaves": [{"name": "a", "count": 1.5}]}', r"`\$\.leaves\[0\]\.count`"),
        ('{"leaves": [{"name": "\\ud800"}]}', "truncated|surrogate"),
        ("[]", "object"),
        ("", "truncated"),
        ("[" * 100_000, "nested|array"),
    ],
)
def test_what_is_no_record_is_refused_by_the_path_of_the_field(data: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        records.decode(Tree, data)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"leafs": []}, r"'leafs' - at `\$`; there are leaves, first, by_name, share"),
        ({"leaves": [{"name": "a", "n": 1}]}, r"'n' - at `\$\.leaves\[0\]`"),
        ({"leaves": [], "first": {"nam": "a"}}, r"'nam' - at `\$\.first`"),
        ({"leaves": [], "by_name": {"x": {"name": "a", "y": 1}}}, r"'y' - at `\$\.by_name\.x`"),
        ({"leaves": [], "first": {"name": 1}}, r"`\$\.first\.name`"),
        ([], "object"),
    ],
)
def test_a_word_that_a_configuration_does_not_have_is_refused(raw: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        records.convert(Tree, raw)


def test_fields_of_newer_writers_are_passed_over() -> None:
    assert records.decode(Tree, '{"leaves": [], "new": 1}') == Tree(())
