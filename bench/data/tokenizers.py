"""Text -> uint16 tokens: bytes, GPT-2's BPE, or a BPE trained on the corpus.

A tokenizer has `vocabulary_size`, `token_bytes` (bytes of text that each token stands for, uint16, 0 for end-of-text),
`encode(pieces)` -> one uint16 array in which every piece is followed by the separator, and `save(folder)`.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from bench.data.config import DataConfig
from bench.errors import UserError

END_OF_TEXT = "<|endoftext|>"
TRAINED_FILE = "tokenizer.json"
GPT2_FILE = "gpt2.tiktoken"
GPT2_FILES = ("vocab.bpe", "encoder.json")
GPT2_VOCABULARY = 50257
# The files' sha256, as built into tiktoken.
GPT2_DIGESTS = (
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
)
# https://github.com/openai/gpt-2/blob/master/src/encoder.py
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Merges learned from more text than this hardly change, and the trainer holds counts of every distinct word in memory.
TRAINING_CHARACTERS = 100_000_000


class Tokenizer(Protocol):
    vocabulary_size: int
    token_bytes: np.ndarray

    def encode(self, pieces: Sequence[str]) -> np.ndarray: ...

    def save(self, folder: Path) -> None: ...


def build_tokenizer(config: DataConfig, training_pieces: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config` names; `training_pieces` is read only where one is trained."""
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "gpt2":
        return Gpt2Tokenizer(config.tokenizer_files)
    return TrainedTokenizer(training_pieces, config.vocabulary_size)


def tokenizer_identity(config: DataConfig) -> list:
    """What determines the tokens, as plain values. Costs milliseconds."""
    if config.tokenizer == "gpt2":
        if not config.tokenizer_files:
            return ["gpt2", *GPT2_DIGESTS]
        return ["gpt2", *(hashlib.sha256(data).hexdigest() for data in _read_gpt2_files(config.tokenizer_files))]
    return [config.tokenizer, config.vocabulary_size]


class ByteTokenizer:
    """UTF-8 bytes; pieces are separated by a newline."""

    vocabulary_size = 256
    token_bytes = np.ones(256, dtype=np.uint16)

    def encode(self, pieces: Sequence[str]) -> np.ndarray:
        text = "".join(chain.from_iterable((piece, "\n") for piece in pieces))
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def save(self, folder: Path) -> None:
        """Nothing to save: a token is its byte."""


class Gpt2Tokenizer:
    """GPT-2's BPE through tiktoken; end-of-text, the last token, follows every piece.

    files: folder with vocab.bpe and encoder.json; without it tiktoken's cache or the network.
    """

    def __init__(self, files: str | None = None):
        self._encoding = _local_encoding(files) if files else _standard_encoding()
        self.vocabulary_size = self._encoding.n_vocab
        self.token_bytes = np.zeros(self.vocabulary_size, dtype=np.uint16)
        self._ranks = {
            self._encoding.decode_single_token_bytes(token): token for token in range(self.vocabulary_size - 1)
        }
        for text, token in self._ranks.items():
            self.token_bytes[token] = len(text)

    def encode(self, pieces: Sequence[str]) -> np.ndarray:
        end = (self._encoding.eot_token,)
        encoded = self._encoding.encode_ordinary_batch(list(pieces))
        return np.array(list(chain.from_iterable((*tokens, *end) for tokens in encoded)), dtype=np.uint16)

    def save(self, folder: Path) -> None:
        """Writes the vocabulary in tiktoken's own format."""
        lines = (base64.b64encode(text) + b" %d\n" % token for text, token in self._ranks.items())
        (folder / GPT2_FILE).write_bytes(b"".join(lines))


def _standard_encoding():
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    # tiktoken lets every error of its HTTP client and of its cache through.
    except Exception as error:
        raise UserError(
            "GPT-2's vocabulary is not here and cannot be downloaded: check the network or set data.tokenizer_files to "
            "a folder with vocab.bpe and encoder.json"
        ) from error


def _local_encoding(folder: str):
    import tiktoken

    merges, encoder = _read_gpt2_files(folder)
    try:
        ranks = _mergeable_ranks(merges.decode(), json.loads(encoder))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"vocab.bpe and encoder.json in {folder} are damaged or do not belong together") from error
    special = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding(name="gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def _read_gpt2_files(folder: str) -> list[bytes]:
    try:
        return [(Path(folder).expanduser() / name).read_bytes() for name in GPT2_FILES]
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: data.tokenizer_files must be a folder with vocab.bpe and encoder.json"
        ) from error


def _mergeable_ranks(merges: str, encoder: dict[str, int]) -> dict[bytes, int]:
    """Bytes of each token -> its number, by tiktoken's rule that tokens are numbered in the order they are merged.

    Not tiktoken's own reader: it copies local files to a cache and reads the stale copy after they change.
    """
    byte_of = byte_alphabet()
    ranks = {
        bytes(byte_of[char] for char in token): number for token, number in encoder.items() if token != END_OF_TEXT
    }
    merged = [line.replace(" ", "") for line in merges.split("\n")[1:] if line]
    if [encoder[token] for token in merged] != list(range(256, len(ranks))):
        raise ValueError("tokens are not numbered in the order of their merges")
    return ranks


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in GPT-2's vocabulary files."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


class TrainedTokenizer:
    """A byte-level BPE trained on `pieces`; token 0 is end-of-text and follows every piece. Decoding is exact."""

    def __init__(self, pieces: Iterable[str], vocabulary_size: int):
        try:
            import tokenizers
        except ImportError as error:
            raise UserError("data.tokenizer=bpe needs the package tokenizers: pip install -e .[data]") from error
        self._model = tokenizers.Tokenizer(tokenizers.models.BPE())
        self._model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            show_progress=False,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        self._model.train_from_iterator(_first_characters(pieces, TRAINING_CHARACTERS), trainer)
        # Text that happens to contain the words "<|endoftext|>" is text.
        self._model.encode_special_tokens = True
        self.vocabulary_size = self._model.get_vocab_size()
        self.token_bytes = np.zeros(self.vocabulary_size, dtype=np.uint16)
        for token, number in self._model.get_vocab().items():
            # One character of the byte-level alphabet stands for one byte.
            self.token_bytes[number] = 0 if token == END_OF_TEXT else len(token)

    def encode(self, pieces: Sequence[str]) -> np.ndarray:
        end = (self._model.token_to_id(END_OF_TEXT),)
        encoded = self._model.encode_batch_fast(list(pieces), add_special_tokens=False)
        return np.array(list(chain.from_iterable((*piece.ids, *end) for piece in encoded)), dtype=np.uint16)

    def save(self, folder: Path) -> None:
        self._model.save(str(folder / TRAINED_FILE))


def _first_characters(pieces: Iterable[str], limit: int) -> Iterator[str]:
    for piece in pieces:
        yield piece
        limit -= len(piece)
        if limit <= 0:
            return
