"""Preparing: what ends up in which split, and what happens when it is killed, repeated, run twice or damaged."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.data import DataConfig, open_dataset, prepare
from bench.data.preparation import prepared_folder
from bench.data.tokenizers import build_tokenizer
from bench.errors import UserError

SEPARATED = "\n\n\n"


def document(number):
    return f"Document {number} says {number * 7919 % 1000} things."


def texts(tokens):
    return {line for shard in tokens.shards for line in bytes(shard.tolist()).decode().splitlines()}


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(folder).iterdir()}


@pytest.fixture
def config(tmp_path):
    """Two files of a hundred one-line documents each."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for part in range(2):
        numbers = range(part * 100, part * 100 + 100)
        (corpus / f"{part}.txt").write_text(SEPARATED.join(map(document, numbers)))
    return DataConfig(name="small", source="text", paths=[str(corpus)], validation_fraction=0.2)


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def test_every_document_is_in_one_split(config, data):
    dataset = open_dataset(config, data)
    train, validation = texts(dataset.train), texts(dataset.validation)
    assert train.isdisjoint(validation)
    assert train | validation == {document(number) for number in range(200)}
    assert 15 < len(validation) < 70
    meta = json.loads((dataset.folder / "meta.json").read_text())
    assert (meta["documents"], meta["pieces"], meta["duplicates"]) == (200, 200, 0)
    assert meta["tokens"] == {"train": len(dataset.train), "validation": len(dataset.validation)}


def test_identical_pieces_are_dropped_and_counted(config, data):
    (Path(config.paths[0]) / "again.txt").write_text(SEPARATED.join([document(3), document(500), document(3)]))
    dataset = open_dataset(config, data)
    assert len(dataset.train) + len(dataset.validation) == sum(len(document(n)) + 1 for n in [*range(200), 500])
    assert json.loads((dataset.folder / "meta.json").read_text())["duplicates"] == 2


def test_adding_a_file_moves_no_piece(config, data):
    before = open_dataset(config, data)
    (Path(config.paths[0]) / "more.md").write_text(SEPARATED.join(map(document, range(200, 300))))
    after = open_dataset(config, data)
    assert before.folder != after.folder
    assert before.fingerprint != after.fingerprint
    assert texts(before.train) < texts(after.train)
    assert texts(before.validation) < texts(after.validation)


def test_the_order_of_files_does_not_matter(config, data):
    folder = Path(config.paths[0])
    other = replace(config, paths=[str(folder / "1.txt"), str(folder / "0.txt")])
    assert open_dataset(config, data).fingerprint == open_dataset(other, data).fingerprint


def test_pieces_of_all_files_mix(config, data):
    stream = bytes(open_dataset(config, data).train.shards[0].tolist()).decode().splitlines()
    from_second_file = [int(line.split()[1]) >= 100 for line in stream]
    assert 10 < sum(from_second_file[: len(stream) // 2]) < len(stream) // 2 - 10


def test_documents_limits_the_corpus(config, data):
    dataset = open_dataset(replace(config, documents=50), data)
    assert texts(dataset.train) | texts(dataset.validation) == {document(number) for number in range(50)}


def test_the_folders_name_follows_what_determines_the_content(config, data):
    target = prepared_folder(config, data)
    assert target.parent == data
    assert len(target.name) == len("small-") + 8
    for changes in ({"validation_fraction": 0.3}, {"tokenizer": "bpe", "vocabulary_size": 300}, {"documents": 9}):
        assert prepared_folder(replace(config, **changes), data) != target
    assert prepared_folder(replace(config, column="other"), data) == target
    file = Path(config.paths[0]) / "0.txt"
    file.write_text(file.read_text() + "!")
    assert prepared_folder(config, data) != target


def test_tokenizer_files_and_token_bytes(config, data):
    dataset = open_dataset(replace(config, tokenizer="bpe", vocabulary_size=300), data)
    assert (dataset.folder / "tokenizer.json").exists()
    written = sum(
        int(dataset.token_bytes[shard].sum()) for s in (dataset.train, dataset.validation) for shard in s.shards
    )
    assert written == sum(len(document(number)) for number in range(200))
    assert open_dataset(config, data).token_bytes.tolist() == [1] * 256


def test_a_trained_tokenizer_sees_training_text_only(config, data, monkeypatch):
    seen = []

    def spy(config, training_pieces):
        seen.extend(training_pieces)
        return build_tokenizer(config, seen)

    monkeypatch.setattr("bench.data.preparation.build_tokenizer", spy)
    prepare(replace(config, tokenizer="bpe", vocabulary_size=300), data)
    monkeypatch.undo()
    train = texts(open_dataset(config, data).train)
    assert set(seen) == train
    assert len(seen) == len(train)


def test_preparing_again_touches_nothing(config, data):
    told = []
    folder = prepare(config, data, told.append)
    assert told
    assert told[0] == "reading 0.txt (1 of 2)"
    before = snapshot(folder)
    told.clear()
    assert prepare(config, data, told.append) == folder
    assert not told
    assert snapshot(folder) == before


def test_opening_writes_nothing(config, data):
    folder = prepare(config, data)
    before = snapshot(folder)
    open_dataset(config, data)
    assert snapshot(folder) == before
    assert list(data.iterdir()) == [folder]


IN_ANOTHER_PROCESS = """
import os, signal, sys, time
from pathlib import Path
from bench.data import DataConfig, prepare

def die(text):
    if "tokens" in text:
        os.kill(os.getpid(), signal.SIGKILL)

def wait(text):
    "Until the other process has begun too."
    (here / f"begun-{os.getpid()}").touch()
    while len(list(here.glob("begun-*"))) < 2:
        time.sleep(0.01)

here, corpus, data, progress = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
config = DataConfig(name="small", source="text", paths=[corpus], validation_fraction=0.2)
print(prepare(config, data, globals()[progress]))
"""


def start_process(config, data, progress):
    arguments = [str(data.parent), config.paths[0], str(data), progress]
    root = Path(__file__).parents[3]
    return subprocess.Popen(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, *arguments], stdout=subprocess.PIPE, text=True, cwd=root
    )


def test_killed_in_the_middle(config, data):
    process = start_process(config, data, "die")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (left,) = data.iterdir()
    assert left.name.endswith(f".partial-{socket.gethostname()}-{process.pid}")
    assert prepare(config, data).is_dir()
    assert list(data.iterdir()) == [prepared_folder(config, data)], "what the dead process left is gone"


def test_two_processes_at_the_same_time(config, data):
    processes = [start_process(config, data, "wait") for _ in range(2)]
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers == [str(prepared_folder(config, data))] * 2
    assert list(data.iterdir()) == [prepared_folder(config, data)], "the loser discarded its own"
    assert texts(open_dataset(config, data).validation)


def test_leftovers_of_the_living_and_of_other_machines_stay(config, data):
    names = [f"x.partial-{socket.gethostname()}-{os.getppid()}", "x.partial-elsewhere-4194999", "x.partial-odd"]
    for name in names:
        (data / name).mkdir(parents=True)
    folder = prepare(config, data)
    assert sorted(path.name for path in data.iterdir()) == sorted([*names, folder.name])


def test_a_failure_leaves_nothing_behind(config, data):
    (Path(config.paths[0]) / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"bad\.txt is not UTF-8 text"):
        prepare(config, data)
    assert list(data.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "size", "message"),
    [
        ("train-00000.bin", 1500, "is cut short: its header promises"),
        ("train-00000.bin", 1000, "is cut short: it ends inside its header"),
        ("train-00000.bin", 2, "is cut short or replaced: it holds 1 tokens"),
        ("validation-00000.bin", 0, "is empty"),
        ("meta.json", 100, "is missing or damaged"),
        ("meta.json", 0, "is missing or damaged"),
    ],
)
def test_a_damaged_folder_is_refused_by_name_and_made_anew(config, data, file, size, message):
    folder = prepare(config, data)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    os.truncate(folder / file, size)
    with pytest.raises(UserError) as error:
        open_dataset(config, data)
    assert str(folder / file) in str(error.value)
    assert message in str(error.value)
    assert str(error.value).endswith("run `python -m bench prepare` to make it anew")
    assert prepare(config, data) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert list(data.iterdir()) == [folder]


@pytest.mark.parametrize("file", ["meta.json", "train-00000.bin"])
def test_a_missing_file_is_named(config, data, file):
    (prepare(config, data) / file).unlink()
    with pytest.raises(UserError, match=file):
        open_dataset(config, data)
    prepare(config, data)
    open_dataset(config, data)


def test_empty_splits_say_what_to_do(config, data):
    with pytest.raises(UserError, match=r"the validation split is empty: .* only 200 different pieces .* raise it"):
        prepare(replace(config, validation_fraction=1e-9), data)
    with pytest.raises(UserError, match=r"the train split is empty: .* lower it"):
        prepare(replace(config, validation_fraction=1 - 1e-9), data)
    for file in Path(config.paths[0]).iterdir():
        file.write_text(" \n\n")
    with pytest.raises(UserError, match="data=small holds no text"):
        prepare(config, data)


def test_a_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the data folder .*file"):
        prepare(config, tmp_path / "file")


def write_shard(path, tokens):
    path.write_bytes(struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + np.asarray(tokens, "<u2").tobytes())


@pytest.fixture
def ready(tmp_path):
    """Ready-made shards: two of llm.c's to train on, one of nanoGPT's to validate."""
    write_shard(tmp_path / "train_1.bin", range(100))
    write_shard(tmp_path / "train_2.bin", range(100, 250))
    np.arange(50, dtype="<u2").tofile(tmp_path / "val.bin")
    train, validation = [str(tmp_path / "train_*.bin")], [str(tmp_path / "val.bin")]
    return DataConfig(name="ready", source="shards", tokenizer="gpt2", train=train, validation=validation)


def test_ready_made_shards(ready, data):
    dataset = open_dataset(ready, data)
    assert [len(shard) for shard in dataset.train.shards] == [100, 150]
    assert dataset.validation.shards[0].tolist() == list(range(50))
    assert dataset.vocabulary_size == 50257
    assert dataset.token_bytes is None
    assert [path.name for path in dataset.folder.iterdir()] == ["meta.json"], "nothing is copied"
    assert open_dataset(replace(ready, vocabulary_size=50304), data).vocabulary_size == 50304
    padded = open_dataset(replace(ready, vocabulary_size=300, tokenizer="bytes"), data)
    assert padded.token_bytes.tolist() == [1] * 256 + [0] * 44


def test_ready_made_shards_are_checked_once(ready, data):
    told = []
    prepare(ready, data, told.append)
    assert told == ["checking train_1.bin", "checking train_2.bin", "checking val.bin"]
    told.clear()
    prepare(ready, data, told.append)
    assert not told
    write_shard(Path(ready.validation[0]), range(60, 80))
    prepare(ready, data, told.append)
    assert told, "a changed file is checked again"


def test_bad_ready_made_shards_are_refused_by_name(ready, data):
    path = Path(ready.validation[0])
    with pytest.raises(UserError, match=r"train_2\.bin has token 200 at position 100, beyond the vocabulary of 200"):
        open_dataset(replace(ready, vocabulary_size=200), data)
    open_dataset(ready, data)
    shard = path.with_name("train_2.bin")
    os.truncate(shard, 1100)
    with pytest.raises(UserError) as error:
        open_dataset(ready, data)
    assert f"shard {shard} is cut short: its header promises 150 tokens, it holds 38" in str(error.value)
    assert "copy or download it again, or leave it out of data.train" in str(error.value)
    with pytest.raises(UserError, match=r"no such shard: .*none_\*\.bin \(in data\.train\)"):
        open_dataset(replace(ready, train=[str(path.with_name("none_*.bin"))]), data)


def test_ready_made_splits_never_overlap(ready, data):
    shard = Path(ready.validation[0]).with_name("train_1.bin")
    with pytest.raises(UserError, match=r"train_1\.bin is in data\.train and, as .*train_1\.bin, in data\.validation"):
        open_dataset(replace(ready, validation=[str(shard)]), data)
    np.arange(100, dtype="<u2").tofile(shard.with_name("same_text.bin"))
    with pytest.raises(
        UserError, match=r"train_1\.bin is in data\.train and, as .*same_text\.bin, in data\.validation"
    ):
        open_dataset(replace(ready, validation=[str(shard.with_name("same_text.bin"))]), data)


def test_our_shards_are_ready_made_shards(config, data):
    """What `prepare` wrote can be carried elsewhere, opened as shards, and is still known as the same corpus."""
    ours = open_dataset(config, data)
    train, validation = ([str(ours.folder / f"{split}-*.bin")] for split in ("train", "validation"))
    shards = DataConfig(name="carried", source="shards", tokenizer="bytes", train=train, validation=validation)
    assert open_dataset(shards, data).fingerprint == ours.fingerprint
