"""A prepared corpus, opened: memory maps of both splits and what is known about the vocabulary."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.data.config import DataConfig, check
from bench.data.preparation import TOKEN_BYTES, Progress, open_shards, prepare, prepared_folder, read_meta
from bench.data.shards import Tokens
from bench.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """folder: where it was prepared.

    token_bytes: bytes of text that each token stands for, (vocabulary_size,) uint16, None when unknown.
    fingerprint: hash of the vocabulary's size and of every token of both splits, wherever and whenever prepared.
    """

    folder: Path
    train: Tokens
    validation: Tokens
    vocabulary_size: int
    token_bytes: np.ndarray | None
    fingerprint: str


def open_dataset(config: DataConfig, folder: Path, progress: Progress = None) -> Dataset:
    """Opens the corpus of `config` under `folder` in milliseconds; prepares it first where that needs no download.

    Raises UserError naming the file when a shard is missing or cut short, and where a corpus must be downloaded first.
    """
    check(config)
    prepared = prepared_folder(config, folder)
    if not prepared.is_dir():
        if config.source == "hub":
            raise UserError(
                f"data={config.name} is not prepared: run `python -m bench prepare data={config.name}` first"
            )
        prepare(config, folder, progress)
    meta = read_meta(prepared)
    token_bytes = prepared / TOKEN_BYTES
    return Dataset(
        folder=prepared,
        train=Tokens(open_shards(prepared, meta["train"])),
        validation=Tokens(open_shards(prepared, meta["validation"])),
        vocabulary_size=meta["vocabulary_size"],
        token_bytes=np.load(token_bytes) if token_bytes.exists() else None,
        fingerprint=meta["fingerprint"],
    )
