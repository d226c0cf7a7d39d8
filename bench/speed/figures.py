"""What the tables of all ops share."""

from typing import Any


def is_ours(name: str) -> bool:
    return name.startswith("ours")


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def missing_lines(rows: list[dict[str, Any]], titles: dict[str, str]) -> list[str]:
    """Each reason once, with the number of shapes it holds for."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for missing in row["left_out"].items():
            counts[missing] = counts.get(missing, 0) + 1
    return [
        f"left out: {titles[name]}, at {count} of {len(rows)} shapes: {why}" for (name, why), count in counts.items()
    ]
