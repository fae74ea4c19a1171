"""The options that say what a kilowatt-hour costs in money and carbon: the same for every command that has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from millijoule.pipeline.energy.carbon import Rates


@dataclass(frozen=True)
class RateOptions:
    """What energy costs."""

    price_per_kwh: Annotated[str | None, tyro.conf.arg(metavar="X|CSV")] = None
    """Electricity price in your currency: a number, or a CSV file with columns time and value."""

    gco2_per_kwh: Annotated[str | None, tyro.conf.arg(metavar="X|CSV")] = None
    """Grams of CO2e per kWh of your grid (location-based): a number, or a CSV file with columns time and value."""

    pue: float | None = None
    """Power usage effectiveness of the building, 1 or more: multiplies money and grams, never joules."""

    def read(self, carbon_source: str | None = None) -> Rates:
        """The rates these options name.

        Args:
            carbon_source: where the intensity is from; default the file's name.

        Raises:
            InputError: a value means nothing, or a file cannot be used; the message names the option.
        """
        from millijoule.pipeline.energy.carbon import Rates, check_pue, read_rate

        price, carbon = self.price_per_kwh, self.gco2_per_kwh
        return Rates(
            carbon=None if carbon is None else read_rate(carbon, "--gco2-per-kwh", source=carbon_source),
            price=None if price is None else read_rate(price, "--price-per-kwh", negative=True),
            pue=None if self.pue is None else check_pue(self.pue),
        )
