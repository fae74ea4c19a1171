"""Rates that runs of a job were told of, kept in its output: what `report` goes by where it is given none.

They are of no importance to the job: they tell no jobs apart, and the last run that states a rate is believed.
"""

from __future__ import annotations

from dataclasses import replace

from millijoule.pipeline.energy.carbon import Rate, Rates, check_pue, check_rate
from millijoule.workers.errors import InputError, NotFoundError
from millijoule.workers.layout import RATES_KEY
from millijoule.workers.records import decode, encode
from millijoule.workers.storage.protocol import Store

#: Where a rate is from that `report` was not given.
AS_GIVEN = "as given to generate"


def keep_rates(store: Store, rates: Rates) -> None:
    """Keep what `rates` states; of what it does not, what an earlier run stated stays. Nothing stated: nothing is written."""
    if rates == Rates():
        return
    try:
        before = _read(store)
    except InputError:
        before = Rates()  # what cannot be read is written anew
    store.put(RATES_KEY, encode(_filled(rates, before), indent=1))


def with_kept_rates(store: Store, rates: Rates) -> Rates:
    """`rates`, what they do not state as the output has it; its sources say so.

    Raises:
        InputError: what the output has are no rates.
    """
    kept = _read(store)

    def named(rate: Rate | None) -> Rate | None:
        return None if rate is None else replace(rate, source=f"{rate.source}, {AS_GIVEN}")

    return _filled(rates, replace(kept, carbon=named(kept.carbon), price=named(kept.price)))


def _filled(rates: Rates, other: Rates) -> Rates:
    return Rates(
        rates.carbon or other.carbon,
        rates.price or other.price,
        other.pue if rates.pue is None else rates.pue,
    )


def _read(store: Store) -> Rates:
    where = f"{store.url}/{RATES_KEY}"
    try:
        rates = decode(Rates, store.get(RATES_KEY))
    except NotFoundError:
        return Rates()
    except ValueError as error:
        raise InputError(f"{where}: not rates: {error}") from error
    for rate, negative in ((rates.carbon, False), (rates.price, True)):
        if rate is not None:
            check_rate(rate, where, negative=negative)
    if rates.pue is not None:
        check_pue(rates.pue)
    return rates
