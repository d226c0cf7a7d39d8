"""What tests ask of gains: `compute_gains` with a few replicates, whose answer must be valid JSON, and its entries."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from bench.gains import compute_gains
from bench.gains.sources import Results


def compute_from(results: Results, **options: Any) -> dict[str, Any]:
    gains = compute_gains(results, **{"baseline": "baseline", "estimator": "crossing", "replicates": 200, **options})
    json.dumps(gains, allow_nan=False)
    return gains


def only(entries: Iterable[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any]:
    """The one entry that has these values."""
    (found,) = [entry for entry in entries if all(entry[key] == value for key, value in wanted.items())]
    return found
