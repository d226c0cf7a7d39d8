"""Token shards on disk.

Ours are llm.c's and modded-nanogpt's: a header of 256 int32 (magic 20240520, version 1, number of tokens), then uint16
tokens, all little-endian. Readers also take nanoGPT's headerless uint16.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bench.errors import UserError

HEADER_BYTES = 1024
TOKEN = np.dtype("<u2")
MAGIC, VERSION = 20240520, 1
# https://github.com/karpathy/llm.c/blob/master/dev/data/data_common.py
FOREIGN_MAGIC = {
    20240801: "a Llama-3 shard of uint32 tokens",
    20240522: "an evaluation file of multiple-choice questions",
}
TOKENS_PER_SHARD = 100_000_000
_CHUNK_TOKENS = 1 << 24


class Tokens:
    """The tokens of one split: a row of memory-mapped shards, read only where touched. len() counts tokens.

    shards: one-dimensional uint16 arrays. No window of tokens crosses from one shard into the next.
    """

    def __init__(self, shards: Sequence[np.ndarray]):
        self.shards = list(shards)

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)


def open_shard(path: Path, *, tokens: int | None = None) -> np.ndarray:
    """Memory-maps one shard, shape (tokens,), uint16. `tokens`: how many there must be, where that is known.

    Raises UserError naming the file when it is missing, empty, cut short, or of another format or version.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from error
    start = _data_start(path, head, size)
    if start == size:
        raise UserError(f"shard {path} is empty")
    # A plain array over the map: slicing np.memmap itself is ten times slower.
    shard = np.asarray(np.memmap(path, dtype=TOKEN, mode="r", offset=start))
    if tokens is not None and len(shard) != tokens:
        raise UserError(f"shard {path} is cut short or replaced: it holds {len(shard):,} tokens, not {tokens:,}")
    return shard


def _data_start(path: Path, head: bytes, size: int) -> int:
    """Offset of the first token. A GPT-2 shard without header cannot pass for one with: it would begin with 55432."""
    magic = int.from_bytes(head[:4], "little")
    if magic in FOREIGN_MAGIC:
        raise UserError(f"shard {path} is {FOREIGN_MAGIC[magic]} (magic {magic}): only uint16 token shards can be read")
    if magic != MAGIC:
        if size % TOKEN.itemsize:
            raise UserError(f"shard {path} is cut short: {size:,} bytes are not a whole number of uint16 tokens")
        return 0
    if len(head) < HEADER_BYTES:
        raise UserError(f"shard {path} is cut short: it ends inside its header")
    version, promised = (int(value) for value in np.frombuffer(head, "<i4")[1:3])
    if version != VERSION:
        raise UserError(f"shard {path} is of version {version}: only version {VERSION} can be read")
    held = (size - HEADER_BYTES) / TOKEN.itemsize
    if held < promised:
        raise UserError(f"shard {path} is cut short: its header promises {promised:,} tokens, it holds {int(held):,}")
    if held > promised:
        raise UserError(f"shard {path} is longer than the {promised:,} tokens its header promises")
    return HEADER_BYTES


def check_vocabulary(path: Path, shard: np.ndarray, vocabulary_size: int) -> str:
    """Reads a shard once: raises UserError where a token lies beyond the vocabulary, and returns the tokens' hash."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(shard), _CHUNK_TOKENS):
        chunk = shard[start : start + _CHUNK_TOKENS]
        if chunk.max() >= vocabulary_size:
            beyond = np.flatnonzero(chunk >= vocabulary_size)
            raise UserError(
                f"shard {path} has token {chunk[beyond[0]]} at position {start + beyond[0]:,}, beyond the vocabulary "
                f"of {vocabulary_size:,}: set data.vocabulary_size to the one it was made with"
            )
        digest.update(chunk.data)
    return digest.hexdigest()


class ShardWriter:
    """Writes one split as `<split>-00000.bin`, `<split>-00001.bin`, ...; a shard ends after the write that fills it."""

    def __init__(self, folder: Path, split: str, *, tokens_per_shard: int = TOKENS_PER_SHARD):
        self.tokens = 0
        self._folder, self._split, self._tokens_per_shard = folder, split, tokens_per_shard
        self._shards: list[dict] = []
        self._file: BinaryIO | None = None

    def write(self, tokens: np.ndarray) -> None:
        """Appends tokens, shape (n,), uint16."""
        if self._file is None:
            self._name = f"{self._split}-{len(self._shards):05d}.bin"
            self._file = open(self._folder / self._name, "wb")  # noqa: SIM115 (_finish closes it)
            self._file.write(bytes(HEADER_BYTES))
            self._digest = hashlib.blake2b(digest_size=16)
            self._count = 0
        data = np.ascontiguousarray(tokens, dtype=TOKEN)
        self._file.write(data.data)
        self._digest.update(data.data)
        self._count += len(data)
        self.tokens += len(data)
        if self._count >= self._tokens_per_shard:
            self._finish()

    def close(self) -> list[dict]:
        """Returns a row per shard: file name, number of tokens, hash of the tokens."""
        if self._file is not None:
            self._finish()
        return self._shards

    def _finish(self) -> None:
        assert self._file is not None
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        header[:3] = MAGIC, VERSION, self._count
        self._file.seek(0)
        self._file.write(header.data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._shards.append({"file": self._name, "tokens": self._count, "digest": self._digest.hexdigest()})
