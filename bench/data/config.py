"""What a user says about a corpus: the schema of the Hydra group `data`, and its check."""

import re
from dataclasses import dataclass, field

from bench.errors import UserError

SOURCES = ("embedded", "text", "hub", "shards")
TOKENIZERS = ("bytes", "gpt2", "bpe")
# Shards hold uint16, and a byte-level vocabulary starts with 256 bytes and the end-of-text token.
LARGEST_VOCABULARY = 2**16
SMALLEST_TRAINED_VOCABULARY = 257


@dataclass
class DataConfig:
    """One corpus, how it is tokenized and how it is split.

    name: first part of the prepared folder's name.
    source: embedded (ships with the project) | text (`paths`) | hub (Hugging Face) | shards (`train`, `validation`).
    paths: text files, or folders to search for them.
    tokenizer: bytes | gpt2 | bpe (trained on the training split).
    vocabulary_size: bpe's size, or the vocabulary of ready-made shards; 0 = the tokenizer's own.
    tokenizer_files: folder with GPT-2's vocab.bpe and encoder.json, for use without network.
    validation_fraction: share of the pieces of text that go to validation.
    dataset, subset, split, column: a data set on the hub and its column of text.
    documents: stop after so many.
    train, validation: ready-made shards, files or globs.
    """

    name: str = "embedded"
    source: str = "embedded"
    paths: list[str] = field(default_factory=list)
    tokenizer: str = "bytes"
    vocabulary_size: int = 0
    tokenizer_files: str | None = None
    validation_fraction: float = 0.05
    dataset: str | None = None
    subset: str | None = None
    split: str | None = "train"
    column: str | None = "text"
    documents: int | None = None
    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)


def check(config: DataConfig) -> None:
    """Raises UserError, naming the field, where `config` cannot be meant."""
    _check_choice("source", config.source, SOURCES)
    _check_choice("tokenizer", config.tokenizer, TOKENIZERS)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise UserError(f"data.name={config.name!r} names a folder: use letters, digits, '.', '_' and '-'")
    if not 0 < config.validation_fraction < 1:
        raise UserError(f"data.validation_fraction={config.validation_fraction} must lie between 0 and 1")
    if config.documents is not None and config.documents < 1:
        raise UserError(f"data.documents={config.documents} must be at least 1, or null for all")
    _check_vocabulary(config)
    needed = {"text": ("paths",), "hub": ("dataset", "split", "column"), "shards": ("train", "validation")}
    for name in needed.get(config.source, ()):
        if not getattr(config, name):
            raise UserError(f"data.source={config.source} needs data.{name}: set it to what should be read")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"data.{name}={value!r} is unknown: choose one of {', '.join(choices)}")


def _check_vocabulary(config: DataConfig) -> None:
    size, tokenizer = config.vocabulary_size, config.tokenizer
    if not 0 <= size <= LARGEST_VOCABULARY:
        raise UserError(f"data.vocabulary_size={size} must lie between 0 and {LARGEST_VOCABULARY}: shards hold uint16")
    if config.source == "shards":
        if tokenizer == "bpe" and size == 0:
            raise UserError("ready-made shards of your own tokenizer need data.vocabulary_size: set it")
    elif tokenizer == "bpe" and size < SMALLEST_TRAINED_VOCABULARY:
        raise UserError(
            f"data.tokenizer=bpe needs data.vocabulary_size of at least {SMALLEST_TRAINED_VOCABULARY}, "
            f"for example 8192 (it is {size})"
        )
    elif tokenizer == "bytes" and size not in (0, 256):
        raise UserError(f"data.tokenizer=bytes has 256 tokens: leave data.vocabulary_size at 0 (it is {size})")
    elif tokenizer == "gpt2" and size != 0:
        raise UserError(f"data.tokenizer=gpt2 has its own vocabulary: leave data.vocabulary_size at 0 (it is {size})")
