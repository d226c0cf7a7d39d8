"""What measured seconds and joules are worth in dollars and grams of CO2e, by the dated tables of conf/cost/."""

import re
from dataclasses import asdict, dataclass
from typing import Any

from bench.config import CostConfig, GridConfig, PriceConfig

JOULES_PER_KWH = 3.6e6
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Prices:
    """What holds for one trajectory: of `devices` alike, GPUs or machines without one.

    Attributes:
        named: the table's name for the device; None where it has no price for it.
        grid: None where the user did not say which.
    """

    devices: int
    named: str | None
    price: PriceConfig | None
    grid_name: str | None
    grid: GridConfig | None
    overhead: float

    def dollars(self, seconds: float | None) -> float | None:
        """The rent of all devices for so many seconds each; None without a price."""
        if seconds is None or self.price is None:
            return None
        return seconds / SECONDS_PER_HOUR * self.price.dollars_per_hour * self.devices

    def grams(self, joules: float | None) -> float | None:
        """CO2e of the joules of all devices and the site's overhead on them; None where either is not known."""
        if joules is None or self.grid is None:
            return None
        return joules / JOULES_PER_KWH * self.overhead * self.grid.grams_per_kwh

    def account(self) -> dict[str, Any]:
        """For run.json: each figure that was used, with its source and date."""
        return {
            "devices": self.devices,
            "price": {"device": self.named, **asdict(self.price)} if self.price else None,
            "grid": {"name": self.grid_name, **asdict(self.grid)} if self.grid else None,
            "overhead": self.overhead,
            "dollars": "a list price per device-hour x measured seconds of training steps x devices, not a bill",
            "grams_co2e": "measured joules x overhead x a grid's yearly mean, without manufacture",
        }


def find_prices(config: CostConfig, device: str, devices: int) -> Prices:
    """The prices for `devices` devices whose description is `device`; `config` is a settled experiment's.

    The entry counts whose words the description holds, the longest of several: "H200" is no part of "GH200".
    """
    names = [name for name in config.prices if _names(name, device)]
    named = max(names, key=len, default=None)
    price = config.prices[named] if named is not None else None
    grid = config.grids[config.grid] if config.grid is not None else None
    return Prices(devices, named, price, config.grid, grid, config.overhead)


def _names(name: str, device: str) -> bool:
    """Whether `name` stands in `device` as whole words. A slice of a GPU (MIG) is not the GPU."""
    words = re.compile(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", re.IGNORECASE)
    return bool(words.search(device)) and ("MIG" in device.split()) == ("MIG" in name.split())
