"""Tokenizers, each against the library that defines it."""

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import tiktoken.load
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from bench.data.config import DataConfig
from bench.data.tokenizers import ByteTokenizer, build_tokenizer, byte_alphabet, tokenizer_identity
from bench.errors import UserError

TEXT = ["Hello hello, the theatre! " * 3, "na\u00efve caf\u00e9 \U0001f600 <|endoftext|> they'll", "  the\n\n\tend "]
MERGES = ["h e", "t he", "\u0120 the", "l l", "he ll", "hell o"]


@pytest.fixture
def gpt2_files(tmp_path):
    """A vocabulary in GPT-2's two files: 256 bytes, six merges, end-of-text."""
    byte_tokens = list(byte_alphabet())
    merged = [merge.replace(" ", "") for merge in MERGES]
    encoder = {token: number for number, token in enumerate([*byte_tokens, *merged, "<|endoftext|>"])}
    (tmp_path / "encoder.json").write_text(json.dumps(encoder))
    (tmp_path / "vocab.bpe").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    return tmp_path


def split_at(tokens, separator):
    """The pieces between separators; the last token must be one."""
    ends = [-1, *np.flatnonzero(tokens == separator)]
    assert ends[-1] == len(tokens) - 1
    return [tokens[start + 1 : end].tolist() for start, end in pairwise(ends)]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_bytes(pieces):
    tokens = ByteTokenizer().encode(pieces)
    assert tokens.dtype == np.uint16
    assert bytes(tokens.tolist()).decode() == "".join(piece + "\n" for piece in pieces)
    assert ByteTokenizer.token_bytes.sum() == ByteTokenizer.vocabulary_size == 256


def test_the_byte_alphabet_is_the_one_of_tokenizers():
    alphabet = byte_alphabet()
    assert sorted(alphabet) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    decoder = tokenizers.decoders.ByteLevel()
    assert all(decoder.decode([char]) == chr(byte) for char, byte in alphabet.items() if byte < 128)
    assert sorted(alphabet.values()) == list(range(256))


def test_gpt2_from_files(gpt2_files):
    tokenizer = build_tokenizer(DataConfig(tokenizer="gpt2", tokenizer_files=str(gpt2_files)), [])
    assert tokenizer.vocabulary_size == 263
    tokens = tokenizer.encode(["hello the", "the"])
    assert tokens.tolist() == [261, 258, 262, 257, 262]
    # An independent implementation of the same files.
    peer = tokenizers.ByteLevelBPETokenizer(str(gpt2_files / "encoder.json"), str(gpt2_files / "vocab.bpe"))
    encoded = tokenizer.encode(TEXT)
    assert encoded.dtype == np.uint16
    plain = [piece.replace("<|endoftext|>", "") for piece in TEXT]
    assert split_at(tokenizer.encode(plain), 262) == [peer.encode(piece).ids for piece in plain]
    lengths = [int(tokenizer.token_bytes[piece].sum()) for piece in split_at(encoded, 262)]
    assert lengths == [len(piece.encode()) for piece in TEXT], "the words <|endoftext|> in a text are text"
    assert tokenizer.token_bytes[262] == 0


def test_gpt2_saves_tiktokens_format(gpt2_files, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    tokenizer = build_tokenizer(DataConfig(tokenizer="gpt2", tokenizer_files=str(gpt2_files)), [])
    tokenizer.save(gpt2_files)
    ranks = tiktoken.load.load_tiktoken_bpe(str(gpt2_files / "gpt2.tiktoken"))
    peer = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(gpt2_files / "vocab.bpe"), str(gpt2_files / "encoder.json")
    )
    assert ranks == peer


@pytest.mark.parametrize("file", ["vocab.bpe", "encoder.json"])
def test_gpt2_files_missing(gpt2_files, file):
    (gpt2_files / file).unlink()
    with pytest.raises(UserError) as error:
        build_tokenizer(DataConfig(tokenizer="gpt2", tokenizer_files=str(gpt2_files)), [])
    assert f"cannot read {gpt2_files / file}: data.tokenizer_files must be a folder with" in str(error.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [("encoder.json", '{"a": 0'), ("encoder.json", "[1]"), ("vocab.bpe", "#version\nt he\nh e\n"), ("vocab.bpe", "")],
)
def test_gpt2_files_damaged(gpt2_files, file, content):
    (gpt2_files / file).write_text(content)
    with pytest.raises(UserError, match=r"vocab\.bpe and encoder\.json in .* are damaged or do not belong together"):
        build_tokenizer(DataConfig(tokenizer="gpt2", tokenizer_files=str(gpt2_files)), [])


def test_gpt2_without_network_and_files(monkeypatch):
    def offline(name):
        raise ConnectionError("Failed to resolve\nhost")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError) as error:
        build_tokenizer(DataConfig(tokenizer="gpt2"), [])
    assert "cannot be downloaded: check the network or set data.tokenizer_files" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def trained():
    return build_tokenizer(DataConfig(tokenizer="bpe", vocabulary_size=290), TEXT * 20)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_bpe_round_trip_is_exact(trained, pieces):
    tokens = trained.encode(pieces)
    inside = split_at(tokens, 0)
    assert [trained._model.decode(piece) for piece in inside] == pieces
    assert [int(trained.token_bytes[piece].sum()) for piece in inside] == [len(piece.encode()) for piece in pieces]


def test_bpe_text_may_name_the_end_of_text(trained):
    tokens = trained.encode(["a<|endoftext|>b"])
    assert (tokens == 0).tolist() == [False] * (len(tokens) - 1) + [True]


def test_bpe_merges_and_is_deterministic(trained, tmp_path):
    again = build_tokenizer(DataConfig(tokenizer="bpe", vocabulary_size=290), iter(TEXT * 20))
    tokens = trained.encode(TEXT)
    assert trained.vocabulary_size == 290
    assert len(tokens) < 0.8 * len("".join(TEXT).encode())
    assert np.array_equal(tokens, again.encode(TEXT))
    trained.save(tmp_path)
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert saved.encode("theatre").ids == trained.encode(["theatre"])[:-1].tolist()


def test_bpe_of_a_tiny_text_has_fewer_tokens():
    tokenizer = build_tokenizer(DataConfig(tokenizer="bpe", vocabulary_size=8192), ["ab ab"])
    assert 257 <= tokenizer.vocabulary_size < 300
    assert len(tokenizer.token_bytes) == tokenizer.vocabulary_size


def test_bpe_reads_no_more_than_it_needs(monkeypatch):
    monkeypatch.setattr("bench.data.tokenizers.TRAINING_CHARACTERS", 100)
    endless = iter(lambda: "word " * 10, None)
    assert build_tokenizer(DataConfig(tokenizer="bpe", vocabulary_size=260), endless).vocabulary_size == 260


def test_bpe_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"data\.tokenizer=bpe needs the package tokenizers: pip install -e"):
        build_tokenizer(DataConfig(tokenizer="bpe", vocabulary_size=300), TEXT)


def test_identity_follows_the_vocabulary(gpt2_files):
    local = DataConfig(tokenizer="gpt2", tokenizer_files=str(gpt2_files))
    before = tokenizer_identity(local)
    assert before != tokenizer_identity(DataConfig(tokenizer="gpt2"))
    (gpt2_files / "vocab.bpe").write_text("other")
    assert tokenizer_identity(local) != before
    sizes = [DataConfig(tokenizer="bpe", vocabulary_size=size) for size in (300, 301)]
    assert tokenizer_identity(sizes[0]) != tokenizer_identity(sizes[1])
