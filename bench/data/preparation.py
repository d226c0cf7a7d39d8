"""Corpus -> a folder of token shards: written beside its place and renamed, so that it is there whole or not at all."""

import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from bench.data import hub, text
from bench.data.config import DataConfig, check
from bench.data.shards import ShardWriter, check_vocabulary, open_shard
from bench.data.tokenizers import GPT2_VOCABULARY, Gpt2Tokenizer, Tokenizer, build_tokenizer, tokenizer_identity
from bench.errors import UserError

Progress = Callable[[str], None] | None
# Raise it when the same text would now give other tokens: folders prepared before are then left alone.
FORMAT = 1
META, TOKEN_BYTES = "meta.json", "token_bytes.npy"
SPLITS = ("train", "validation")
REMEDY = "run `python -m bench prepare` to make it anew"
_BATCH_CHARACTERS = 4_000_000


def prepare(config: DataConfig, folder: Path, progress: Progress = None) -> Path:
    """Makes the shards that `config` describes, unless they are there already, and returns their folder.

    The folder is `<folder>/<name>-<8 hex>`, the hex being a hash of what determines the content. It may be interrupted,
    repeated and run by several processes at once: each writes a folder of its own, `*.partial-<host>-<pid>`, and the
    first to be ready renames it. A damaged folder is made anew. `progress` is called with a short text now and then.

    Raises UserError for every mistake in `config` or in the files it names.
    """
    check(config)
    progress = progress or (lambda text: None)
    target = prepared_folder(config, folder)
    if target.is_dir() and not _is_damaged(target):
        return target
    partial = target.with_name(f"{target.name}.partial-{socket.gethostname()}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent, partial)
        if target.is_dir():
            os.rename(target, partial)
            shutil.rmtree(partial)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"cannot write to the data folder {target.parent}: {error.strerror}") from error
    try:
        build = _check_shards if config.source == "shards" else _write_shards
        _write_meta(partial, build(config, partial, progress))
        _publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def prepared_folder(config: DataConfig, folder: Path) -> Path:
    """Where the shards of `config` belong. Costs milliseconds: files are known by path, size and time of change."""
    identity = json.dumps([FORMAT, config.source, *_IDENTITIES[config.source](config)])
    return Path(folder) / f"{config.name}-{hashlib.blake2b(identity.encode(), digest_size=4).hexdigest()}"


def read_meta(folder: Path) -> dict:
    """meta.json of a prepared folder. Raises UserError naming the file when it is missing or damaged."""
    try:
        return json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / META} is missing or damaged: {REMEDY}") from error


def open_shards(folder: Path, rows: list[dict]) -> list[np.ndarray]:
    """Memory maps of one split's shards. Raises UserError naming the shard that is missing or cut short."""
    try:
        return [open_shard(folder / row["file"], tokens=row["tokens"]) for row in rows]
    except UserError as error:
        raise UserError(f"{error}: {REMEDY}") from error


def _is_damaged(folder: Path) -> bool:
    try:
        meta = read_meta(folder)
        for split in SPLITS:
            open_shards(folder, meta[split])
    except UserError:
        return True
    return False


def _remove_leftovers(folder: Path, own: Path) -> None:
    """Removes what killed processes of this machine left; those of another machine may still be running."""
    for partial in folder.glob("*.partial-*"):
        host, _, process = partial.name.rpartition(".partial-")[2].rpartition("-")
        if partial == own or (host == socket.gethostname() and process.isdigit() and not _is_running(int(process))):
            shutil.rmtree(partial, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _publish(partial: Path, target: Path) -> None:
    try:
        os.rename(partial, target)
    except OSError:
        # Another process was first: its folder has the same content.
        if not target.is_dir():
            raise


def _write_meta(folder: Path, meta: dict) -> None:
    with open(folder / META, "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _write_shards(config: DataConfig, folder: Path, progress: Callable[[str], None]) -> dict:
    counts = {"documents": 0, "pieces": 0, "duplicates": 0}
    threshold = text.validation_keys(config.validation_fraction)
    pieces: Iterable[tuple[int, str]]
    if config.source == "hub":
        pieces = text.unique_pieces(_counted(hub.stream_documents(config), config, counts), counts)
        sample = islice(hub.stream_documents(config), config.documents)
        training = (piece for piece in sample if text.content_key(piece) >= threshold)
    else:
        pieces = sorted(text.unique_pieces(_cut_files(config, counts, progress), counts))
        training = (piece for key, piece in pieces if key >= threshold)
    if config.tokenizer == "bpe":
        progress("training the tokenizer")
    tokenizer = build_tokenizer(config, training)
    shards = _tokenize(
        pieces,
        tokenizer,
        folder,
        threshold,
        lambda tokens: progress(f"{counts['documents']:,} documents, {tokens / 1e6:,.1f} M tokens"),
    )
    _check_splits(config, shards, counts)
    tokenizer.save(folder)
    np.save(folder / TOKEN_BYTES, tokenizer.token_bytes)
    return _describe(config, tokenizer.vocabulary_size, shards) | counts


def _counted(documents: Iterable[str], config: DataConfig, counts: dict[str, int]) -> Iterator[str]:
    for document in islice(documents, config.documents):
        counts["documents"] += 1
        yield document


def _cut_files(config: DataConfig, counts: dict[str, int], progress: Callable[[str], None]) -> Iterator[str]:
    for document in _counted(_read_files(_text_files(config), progress), config, counts):
        yield from text.cut_document(document)


def _read_files(files: list[Path], progress: Callable[[str], None]) -> Iterator[str]:
    for number, file in enumerate(files, start=1):
        progress(f"reading {file.name} ({number} of {len(files)})")
        yield from text.split_documents(text.read_text(file))


def _tokenize(
    pieces: Iterable[tuple[int, str]],
    tokenizer: Tokenizer,
    folder: Path,
    threshold: int,
    progress: Callable[[int], None],
) -> dict[str, list[dict]]:
    """Writes each piece to the split its key decides; returns the rows of shards for each split."""
    writers = {split: ShardWriter(folder, split) for split in SPLITS}
    waiting: dict[str, list[str]] = {split: [] for split in SPLITS}
    characters = dict.fromkeys(SPLITS, 0)

    def flush(split: str) -> None:
        if waiting[split]:
            writers[split].write(tokenizer.encode(waiting[split]))
        waiting[split], characters[split] = [], 0
        progress(sum(writer.tokens for writer in writers.values()))

    for key, piece in pieces:
        split = "validation" if key < threshold else "train"
        waiting[split].append(piece)
        characters[split] += len(piece)
        if characters[split] >= _BATCH_CHARACTERS:
            flush(split)
    for split in SPLITS:
        flush(split)
    return {split: writer.close() for split, writer in writers.items()}


def _check_splits(config: DataConfig, shards: dict[str, list[dict]], counts: dict[str, int]) -> None:
    if counts["pieces"] == 0:
        raise UserError(f"data={config.name} holds no text: every file or row is empty")
    for split in SPLITS:
        if not shards[split]:
            direction = "raise" if split == "validation" else "lower"
            raise UserError(
                f"the {split} split is empty: data={config.name} has only {counts['pieces']:,} different pieces of "
                f"text at data.validation_fraction={config.validation_fraction}: give more text or {direction} it"
            )


def _check_shards(config: DataConfig, folder: Path, progress: Callable[[str], None]) -> dict:
    """Reads ready-made shards once; nothing is copied, meta.json remembers that they are sound."""
    vocabulary_size = config.vocabulary_size or {"bytes": 256, "gpt2": GPT2_VOCABULARY}[config.tokenizer]
    shards: dict[str, list[dict]] = {}
    for split in SPLITS:
        shards[split] = []
        for file in _shard_files(config, split):
            progress(f"checking {file.name}")
            try:
                shard = open_shard(file)
            except UserError as error:
                raise UserError(f"{error}: copy or download it again, or leave it out of data.{split}") from error
            digest = check_vocabulary(file, shard, vocabulary_size)
            shards[split].append({"file": str(file), "tokens": len(shard), "digest": digest})
    validation = {row["digest"]: row["file"] for row in shards["validation"]}
    for row in shards["train"]:
        if row["digest"] in validation:
            raise UserError(f"{row['file']} is in data.train and, as {validation[row['digest']]}, in data.validation")
    token_bytes = _token_bytes(config, vocabulary_size)
    if token_bytes is not None:
        np.save(folder / TOKEN_BYTES, token_bytes)
    return _describe(config, vocabulary_size, shards)


def _token_bytes(config: DataConfig, vocabulary_size: int) -> np.ndarray | None:
    """Bytes of text of each token of ready-made shards, None when unknown; unused numbers stand for none."""
    if config.tokenizer == "bytes":
        known = np.ones(256, dtype=np.uint16)
    elif config.tokenizer == "gpt2" and config.tokenizer_files:
        known = Gpt2Tokenizer(config.tokenizer_files).token_bytes
    else:
        return None
    return np.pad(known, (0, max(vocabulary_size - len(known), 0)))[:vocabulary_size]


def _describe(config: DataConfig, vocabulary_size: int, shards: dict[str, list[dict]]) -> dict:
    content = [vocabulary_size, *([row["digest"] for row in shards[split]] for split in SPLITS)]
    return {
        "name": config.name,
        "source": config.source,
        "tokenizer": config.tokenizer,
        "vocabulary_size": vocabulary_size,
        "fingerprint": hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest(),
        "tokens": {split: sum(row["tokens"] for row in shards[split]) for split in SPLITS},
        **shards,
    }


def _text_files(config: DataConfig) -> list[Path]:
    return sorted(text.CORPUS.glob("*.xz")) if config.source == "embedded" else text.find_files(config.paths)


def _shard_files(config: DataConfig, split: str) -> list[Path]:
    files: dict[Path, None] = {}
    for pattern in getattr(config, split):
        found = sorted(glob.glob(os.path.abspath(Path(pattern).expanduser()), recursive=True))
        if not found:
            raise UserError(f"no such shard: {pattern} (in data.{split})")
        files.update((Path(file), None) for file in found)
    return list(files)


def _stamp(file: Path) -> list:
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    return [str(file), status.st_size, status.st_mtime_ns]


def _split_identity(config: DataConfig) -> list:
    return [*tokenizer_identity(config), config.validation_fraction, config.documents]


def _embedded_identity(config: DataConfig) -> list:
    return [*(hashlib.sha256(file.read_bytes()).hexdigest() for file in _text_files(config)), *_split_identity(config)]


def _text_identity(config: DataConfig) -> list:
    return [*(_stamp(file) for file in _text_files(config)), *_split_identity(config)]


def _hub_identity(config: DataConfig) -> list:
    return [config.dataset, config.subset, config.split, config.column, *_split_identity(config)]


def _shards_identity(config: DataConfig) -> list:
    stamps = [[_stamp(file) for file in _shard_files(config, split)] for split in SPLITS]
    return [*stamps, *tokenizer_identity(config), config.vocabulary_size, bool(config.tokenizer_files)]


_IDENTITIES = {
    "embedded": _embedded_identity,
    "text": _text_identity,
    "hub": _hub_identity,
    "shards": _shards_identity,
}
