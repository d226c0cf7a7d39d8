"""Shards on disk, against files built by hand from the formats' descriptions."""

import struct

import numpy as np
import pytest

from bench.data.shards import ShardWriter, Tokens, check_vocabulary, open_shard
from bench.errors import UserError


def llmc_shard(path, tokens, *, magic=20240520, version=1, promised=None, data=None):
    """A shard as llm.c's data_common.py writes it."""
    header = struct.pack("<256i", magic, version, len(tokens) if promised is None else promised, *[0] * 253)
    body = struct.pack(f"<{len(tokens)}H", *tokens) if data is None else data
    path.write_bytes(header + body)
    return path


def test_reads_llmc_and_headerless_shards(tmp_path):
    tokens = [0, 1, 50256, 65535, 7]
    assert open_shard(llmc_shard(tmp_path / "a.bin", tokens)).tolist() == tokens
    headerless = tmp_path / "b.bin"
    headerless.write_bytes(struct.pack("<5H", *tokens))
    assert open_shard(headerless).tolist() == tokens
    long = np.arange(5000, dtype="<u2")
    headerless.write_bytes(long.tobytes())
    assert np.array_equal(open_shard(headerless), long)


def test_a_shard_is_mapped_not_read(tmp_path):
    shard = open_shard(llmc_shard(tmp_path / "a.bin", [1, 2, 3]))
    assert isinstance(shard.base, np.memmap)
    assert not shard.flags.writeable


def test_writer_writes_llmc_format(tmp_path):
    writer = ShardWriter(tmp_path, "train", tokens_per_shard=10)
    for start in range(0, 24, 4):
        writer.write(np.arange(start, start + 4, dtype=np.uint16))
    rows = writer.close()
    assert [(row["file"], row["tokens"]) for row in rows] == [("train-00000.bin", 12), ("train-00001.bin", 12)]
    expected = llmc_shard(tmp_path / "expected.bin", range(12)).read_bytes()
    assert (tmp_path / "train-00000.bin").read_bytes() == expected
    tokens = Tokens([open_shard(tmp_path / row["file"]) for row in rows])
    assert len(tokens) == 24
    assert np.concatenate(tokens.shards).tolist() == list(range(24))
    assert rows[0]["digest"] == check_vocabulary(tmp_path, tokens.shards[0], 12) != rows[1]["digest"]


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ({"promised": 4}, "is cut short: its header promises 4 tokens, it holds 3"),
        ({"data": b"\1\0\2\0\3"}, "is cut short: its header promises 3 tokens, it holds 2"),
        ({"promised": 2}, "is longer than the 2 tokens its header promises"),
        ({"version": 2}, "is of version 2: only version 1 can be read"),
        ({"magic": 20240801, "version": 7}, "is a Llama-3 shard of uint32 tokens (magic 20240801)"),
        ({"magic": 20240522}, "is an evaluation file of multiple-choice questions (magic 20240522)"),
        ({"promised": 0, "data": b""}, "is empty"),
    ],
)
def test_a_bad_shard_is_refused_by_name(tmp_path, shard, message):
    path = llmc_shard(tmp_path / "bad.bin", [1, 2, 3], **shard)
    with pytest.raises(UserError) as error:
        open_shard(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\1\0\2", "is cut short: 3 bytes are not a whole number of uint16 tokens"),
        (struct.pack("<3i", 20240520, 1, 3), "is cut short: it ends inside its header"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, data, message):
    path = tmp_path / "bad.bin"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        open_shard(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_missing_shard(tmp_path):
    with pytest.raises(UserError, match=r"cannot read shard .*none\.bin: No such file"):
        open_shard(tmp_path / "none.bin")


def test_a_headerless_shard_shortened_by_whole_tokens_is_known_by_its_count(tmp_path):
    path = tmp_path / "short.bin"
    path.write_bytes(bytes(8))
    with pytest.raises(UserError, match=r"short\.bin is cut short or replaced: it holds 4 tokens, not 5"):
        open_shard(path, tokens=5)


def test_token_beyond_the_vocabulary(tmp_path):
    path = llmc_shard(tmp_path / "gpt2.bin", [5, 50256, 50257, 60000])
    check_vocabulary(path, open_shard(path), 60001)
    with pytest.raises(UserError) as error:
        check_vocabulary(path, open_shard(path), 50257)
    assert f"shard {path} has token 50257 at position 2, beyond the vocabulary of 50,257" in str(error.value)
