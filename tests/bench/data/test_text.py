"""Files -> documents -> pieces."""

import gzip
import lzma
import os

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bench.data import text
from bench.errors import UserError

PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
# A frame without the unpacked size in its header, as `zstd` writes from a pipe, and two frames in a row.
STREAMED = zstandard.ZstdCompressor(write_content_size=False).compress


@pytest.mark.parametrize("suffix", PACK)
def test_reads_plain_and_packed(tmp_path, suffix):
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(PACK[suffix]("na\u00efve\r\ncaf\u00e9\n".encode()))
    assert text.read_text(file) == "na\u00efve\ncaf\u00e9\n"


def test_reads_joined_zstandard_frames(tmp_path):
    file = tmp_path / "a.zst"
    file.write_bytes(STREAMED(b"one ") + STREAMED(b"two"))
    assert text.read_text(file) == "one two"


def test_byte_order_mark_is_not_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffText".encode())
    assert text.read_text(file) == "Text"


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"not packed at all"])
def test_a_damaged_archive_is_named(tmp_path, suffix, damage):
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(damage(PACK[suffix](os.urandom(5000))))
    with pytest.raises(UserError) as error:
        text.read_text(file)
    assert f"cannot unpack {file}: it is damaged or cut short" in str(error.value)


def test_other_encodings_are_refused(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError) as error:
        text.read_text(file)
    assert str(error.value) == f"{file} is not UTF-8 text (byte 3): convert it first"


def test_finds_files(tmp_path):
    for name in ("b.txt", "a.md", "deep/er/c.txt.xz", "d.gz", "e.tar.gz", "f.py", "g.json.zst", "h"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    found = text.find_files([str(tmp_path)])
    assert [file.relative_to(tmp_path).as_posix() for file in found] == ["a.md", "b.txt", "d.gz", "deep/er/c.txt.xz"]
    named = text.find_files([str(tmp_path / "f.py"), str(tmp_path / "b.txt"), str(tmp_path)])
    assert [file.name for file in named] == ["f.py", "b.txt", "a.md", "d.gz", "c.txt.xz"]


def test_a_link_is_read_by_its_own_name(tmp_path):
    (tmp_path / "blob").write_bytes(gzip.compress(b"linked"))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt.gz").symlink_to(tmp_path / "blob")
    (file,) = text.find_files([str(tmp_path / "corpus")])
    assert text.read_text(file) == "linked"


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match=r"no such file or folder: nowhere \(in data\.paths\)"):
        text.find_files(["nowhere"])
    with pytest.raises(UserError, match=r"no text in .*: a folder is searched for \.txt and \.md"):
        text.find_files([str(tmp_path)])


def test_documents_are_parted_by_two_blank_lines():
    got = list(text.split_documents("\n\nOne.\n\nStill one.\n\n\nTwo.\n \n\t\n\n  Indented.\n\n\n \n\n\n"))
    assert got == ["One.\n\nStill one.", "Two.", "  Indented."]
    assert list(text.split_documents(" \n\n\n ")) == []


def test_long_documents_are_cut_at_paragraphs_then_lines_then_words():
    paragraphs = ["a" * 30, "b" * 30, "c" * 30, "d" * 70]
    assert list(text.cut_document("\n\n".join(paragraphs), 100)) == ["\n\n".join(paragraphs[:3]), "d" * 70]
    assert list(text.cut_document("\n".join(paragraphs), 100)) == ["\n".join(paragraphs[:3]), "d" * 70]
    assert list(text.cut_document(" ".join(paragraphs), 100)) == [" ".join(paragraphs[:3]), " " + "d" * 70]
    assert list(text.cut_document("x" * 250, 100)) == ["x" * 100, "x" * 100, "x" * 50]


@given(st.text(alphabet="ab \n", max_size=300), st.integers(2, 40))
def test_cutting_loses_line_ends_at_most(document, limit):
    pieces = list(text.cut_document(document, limit))
    assert all(0 < len(piece) <= limit for piece in pieces)
    assert "".join(pieces).replace("\n", "") == document.replace("\n", "")


def test_unique_pieces_counts_what_it_drops():
    counts = {"pieces": 0, "duplicates": 0}
    got = [piece for _, piece in text.unique_pieces(["a", "b", "a", "c", "b", "a"], counts)]
    assert got == ["a", "b", "c"]
    assert counts == {"pieces": 3, "duplicates": 3}


def test_many_keys_are_remembered(monkeypatch):
    """Beyond the set of recent keys, against Python's own set."""
    monkeypatch.setattr(text, "_HASHES_IN_SET", 8)
    pieces = [str(number) for number in np.random.default_rng(0).integers(0, 150, 600)]
    counts = {"pieces": 0, "duplicates": 0}
    got = [piece for _, piece in text.unique_pieces(pieces, counts)]
    assert got == list(dict.fromkeys(pieces))
    assert counts["duplicates"] == 600 - len(set(pieces))


def test_keys_are_uniform():
    """The share of keys under the threshold is the fraction, to within four standard errors."""
    share = np.mean([text.content_key(str(number)) < text.validation_keys(0.1) for number in range(10_000)])
    assert abs(share - 0.1) < 4 * (0.09 / 10_000) ** 0.5
