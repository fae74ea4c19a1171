"""Rates that `generate` was given, for a report that is given none."""

import json

import pytest

from millijoule.pipeline.energy.carbon import Rate, Rates
from millijoule.pipeline.output.kept_rates import keep_rates, with_kept_rates
from millijoule.workers.errors import InputError
from millijoule.workers.layout import RATES_KEY
from millijoule.workers.storage.open import open_store

TARIFF = Rate("tariff.csv", (0.2, -0.01), (1000.0, 4600.0), 3600.0)


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def test_what_is_not_given_is_as_it_was_kept_and_says_so(store):
    assert with_kept_rates(store, Rates()) == Rates()
    keep_rates(store, Rates())
    assert list(store.list()) == []
    keep_rates(store, Rates(price=TARIFF, pue=1.3))
    named = Rate("tariff.csv, as given to generate", *(TARIFF.values, TARIFF.times_s, TARIFF.row_seconds))
    assert with_kept_rates(store, Rates()) == Rates(None, named, 1.3)
    own = Rates(Rate("mine", (400.0,)), Rate("declared value", (0.0,)), 1.0)
    assert with_kept_rates(store, own) == own
    assert with_kept_rates(store, Rates(pue=1.0)) == Rates(None, named, 1.0)


def test_the_last_run_that_states_a_rate_is_believed(store):
    keep_rates(store, Rates(Rate("a", (1.0,)), TARIFF, 1.5))
    keep_rates(store, Rates(price=Rate("b", (2.0,))))
    keep_rates(store, Rates())
    kept = with_kept_rates(store, Rates())
    assert (kept.carbon.values, kept.price.values, kept.pue) == ((1.0,), (2.0,), 1.5)


@pytest.mark.parametrize(
    "raw",
    [
        "junk",
        {"price": 3},
        {"pue": 0.5},
        {"carbon": {"source": "x", "values": [-1]}},
        {"price": {"source": "x", "values": [1, 2], "times_s": [5]}},
        {"price": {"source": "x", "values": [1, 2], "times_s": [5, 4]}},
        {"price": {"source": "x", "values": []}},
        {"price": {"source": "x", "values": [1], "row_seconds": -1}},
    ],
)
def test_what_are_no_rates_is_refused_and_written_anew_by_the_next_run(store, raw):
    store.put(RATES_KEY, json.dumps(raw).encode())
    with pytest.raises(InputError, match=r"rates\.json|--pue"):
        with_kept_rates(store, Rates())
    keep_rates(store, Rates(pue=1.2))
    assert with_kept_rates(store, Rates()) == Rates(pue=1.2)
