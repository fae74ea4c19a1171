"""Addresses with a secret in them are refused, and the refusal does not repeat the secret."""

from __future__ import annotations

import pytest

from millijoule.workers.errors import InputError
from millijoule.workers.sources.words import find_place
from millijoule.workers.storage.inputs import expand_inputs
from millijoule.workers.storage.open import open_store
from millijoule.workers.visible_text import without_secrets

SECRET = "marker-of-a-secret"
URLS = (
    f"s3://AKIA:{SECRET}@bucket/in/p.csv",
    f"https://user:{SECRET}@host/p.csv",
    f"https://host/p.csv?X-Amz-Signature={SECRET}",
    f"redis://:{SECRET}@host",
)


#: A bucket's model is opened as a store is.
READERS = (open_store, lambda url: expand_inputs([url]), lambda url: find_place("--model", url))


@pytest.mark.parametrize(
    ("url", "read"), [(u, r) for r in READERS for u in URLS if r is not READERS[2] or u[:2] != "s3"]
)
def test_a_secret_in_an_address_goes_nowhere(url, read):
    with pytest.raises(InputError) as refused:
        read(url)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("url", ["s3://bucket/a@b?c/*.csv", "/data/a@b", "out?x"])
def test_paths_and_keys_may_have_such_characters(url):
    open_store(url)


def test_what_is_left_of_an_address():
    assert without_secrets("https://u:p@h:1/a/b?c=d") == "https://...@h:1/a/b?..."
    assert without_secrets("https://h/a") == "https://h/a"
    assert without_secrets("/a@b?c") == "/a@b?c"
