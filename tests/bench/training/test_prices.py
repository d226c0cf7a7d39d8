import math

import pytest

from bench.compose import compose_config
from bench.config import CostConfig, GridConfig, PriceConfig, settle
from bench.training.prices import find_prices

HOUR, KWH = 3600.0, 3.6e6
H100, H100_NVL, H200, EPYC = (PriceConfig(price, "a page", "2026-05") for price in (3.0, 2.0, 4.5, 0.5))
TABLE = {"H100": H100, "H100 NVL": H100_NVL, "H200": H200, "EPYC 7763": EPYC}
FRANCE = GridConfig(50.0, "a table", 2023)


def prices(device="NVIDIA H100 80GB HBM3", devices=1, **settings):
    return find_prices(CostConfig(prices=TABLE, grids={"FRA": FRANCE}, **settings), device, devices)


def test_dollars_are_hours_of_every_device():
    assert prices().dollars(HOUR) == 3.0
    assert prices(devices=8).dollars(90 * 60.0) == 8 * 1.5 * 3.0
    assert prices().dollars(0.0) == 0.0


def test_grams_are_kilowatt_hours_on_the_grid_with_the_sites_overhead():
    assert prices(grid="FRA").grams(KWH) == 50.0
    assert math.isclose(prices(grid="FRA", overhead=1.2).grams(10 * KWH), 600.0)


def test_joules_are_those_of_all_devices_already():
    assert prices(devices=8, grid="FRA").grams(KWH) == 50.0


def test_what_is_not_known_is_none():
    assert prices().dollars(None) is None
    assert prices(device="NVIDIA Unheard-of").dollars(HOUR) is None
    assert prices().grams(KWH) is None
    assert prices(grid="FRA").grams(None) is None


@pytest.mark.parametrize(
    ("device", "price"),
    [
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA H100 NVL", H100_NVL),
        ("nvidia h200", H200),
        ("AMD EPYC 7763 64-Core Processor, 2 threads", EPYC),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("", None),
    ],
)
def test_a_price_is_that_of_the_longest_name_of_whole_words(device, price):
    assert prices(device=device).price is price


def test_the_longest_name_counts_and_not_the_last():
    table = CostConfig(prices={"H100 PCIe": H100_NVL, "PCIe": EPYC})
    assert find_prices(table, "NVIDIA H100 PCIe", 1).price is H100_NVL


def test_a_name_is_no_pattern():
    table = CostConfig(prices={"Xeon(R) Gold": EPYC, "H.00": H100})
    assert find_prices(table, "Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz, 4 threads", 1).price is EPYC
    assert find_prices(table, "NVIDIA H100", 1).price is None


def test_the_account_names_each_figure_with_its_source_and_date():
    account = prices(device="NVIDIA H100 NVL", devices=2, grid="FRA", overhead=1.1).account()
    assert account["price"] == {"device": "H100 NVL", "dollars_per_hour": 2.0, "source": "a page", "date": "2026-05"}
    assert account["grid"] == {"name": "FRA", "grams_per_kwh": 50.0, "source": "a table", "year": 2023}
    assert (account["devices"], account["overhead"]) == (2, 1.1)
    assert "list price" in account["dollars"]


def test_the_account_of_what_is_not_known():
    account = prices(device="some CPU").account()
    assert account["price"] is None
    assert account["grid"] is None


def test_the_table_that_is_shipped(overrides):
    cost = settle(compose_config([*overrides, "cost.grid=FRA"])).cost
    assert find_prices(cost, "NVIDIA H100 80GB HBM3", 1).dollars(HOUR) == 2.95
    assert find_prices(cost, "NVIDIA H200", 1).dollars(HOUR) == 4.54
    assert find_prices(cost, "NVIDIA B200", 1).dollars(HOUR) == 6.03
    assert find_prices(cost, "AMD EPYC 7763, 2 threads", 1).grams(KWH) == 56.039
    assert settle(compose_config(overrides)).cost.grid is None
    for entry in (*cost.prices.values(), *cost.grids.values()):
        assert entry.source
