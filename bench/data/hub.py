"""Documents streamed from the Hugging Face hub, never the whole corpus in memory."""

import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit
from urllib.request import getproxies

from bench.data.config import DataConfig
from bench.errors import UserError

# The hub's own conversion of data sets that are still defined by a script, which `datasets` >= 4 refuses to run.
CONVERTED = "refs/convert/parquet"


def stream_documents(config: DataConfig) -> Iterator[str]:
    """Text of every row of `config.dataset` in the hub's order.

    Raises UserError without the `datasets` package or network, and for an unknown data set, subset, split or column.
    """
    rows = iter(_open_stream(config))
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise _unreachable(config, error) from error
        if row is None:
            return
        if config.column not in row:
            raise UserError(
                f"{config.dataset} has no column {config.column!r}: set data.column to one of {', '.join(row)}"
            )
        text = row[config.column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(f"column {config.column!r} of {config.dataset} holds {type(text).__name__}, not text")
        # A lone surrogate cannot be written as UTF-8 and would stop the preparation after hours.
        text = text.encode("utf-8", "replace").decode().strip("\n")
        if text and not text.isspace():
            yield text


def _open_stream(config: DataConfig):
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"data={config.name} needs the package datasets: pip install -e .[data]") from error
    _check_network(config)
    wanted = {"path": config.dataset, "name": config.subset, "split": config.split, "streaming": True}
    try:
        return load_dataset(**wanted)
    # The hub client raises errors of a dozen libraries; whatever it is, one line about it is what the user needs.
    except Exception as error:
        if "scripts are no longer supported" not in str(error):
            raise _unreachable(config, error) from error
    try:
        return load_dataset(**wanted, revision=CONVERTED)
    except Exception as error:
        raise _unreachable(config, error) from error


def _check_network(config: DataConfig) -> None:
    """Looks up the hub's address: its client would retry for half a minute, with a log line each, and fail the same."""
    if getproxies() or os.path.exists(config.dataset or ""):
        return
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)
    except OSError as error:
        raise _unreachable(config, error) from error


def _unreachable(config: DataConfig, error: Exception) -> UserError:
    subset = f" ({config.subset})" if config.subset else ""
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"cannot stream {config.dataset}{subset} from the Hugging Face hub: {cause}. Check the network and the names, "
        "or use data=text or data=shards"
    )
