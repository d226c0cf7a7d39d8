"""Files of text -> documents -> pieces, each known by the hash of its content."""

import gzip
import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bench.errors import UserError

CORPUS = Path(__file__).parent / "corpus"
PIECE_CHARACTERS = 10_000
TEXT_SUFFIXES = (".txt", ".md", "")
PACKED_SUFFIXES = (".gz", ".xz", ".zst")
_TWO_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n){2,}")
_BORDERS = ("\n\n", "\n", " ")
_HASHES_IN_SET = 1 << 20


def find_files(paths: Sequence[str]) -> list[Path]:
    """Every file named, and of every folder named those ending in .txt or .md, plain or packed, sorted; each once."""
    found: dict[Path, None] = {}
    for name in paths:
        # Not resolved: a link's own name tells how the file is packed, its target's may not.
        path = Path(os.path.abspath(Path(name).expanduser()))
        if path.is_dir():
            inside = [Path(folder, file) for folder, _, files in os.walk(path) for file in files]
            texts = sorted(file for file in inside if _is_text(file))
            if not texts:
                raise UserError(f"no text in {name}: a folder is searched for .txt and .md, plain, .gz, .xz or .zst")
            found.update(dict.fromkeys(texts))
        elif path.exists():
            found[path] = None
        else:
            raise UserError(f"no such file or folder: {name} (in data.paths)")
    return list(found)


def _is_text(file: Path) -> bool:
    if file.suffix in PACKED_SUFFIXES:
        return Path(file.stem).suffix in TEXT_SUFFIXES
    return file.suffix in TEXT_SUFFIXES[:2]


def read_text(file: Path) -> str:
    """The text of one file, unpacked. Raises UserError naming the file when it is not UTF-8 or cannot be unpacked."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    try:
        data = _unpack(data, file.suffix)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"cannot unpack {file}: it is damaged or cut short ({error})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start:,}): convert it first") from error
    return text.replace("\r\n", "\n")


def _unpack(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.decompress(data)
    if suffix == ".xz":
        return lzma.decompress(data)
    if suffix == ".zst":
        return _unpack_zstandard(data)
    return data


def _unpack_zstandard(data: bytes) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise UserError("reading .zst needs the package zstandard: pip install -e .[data]") from error
    unpacked = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            unpacked.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise EOFError(error) from error
        if not frame.eof:
            raise EOFError("the last frame has no end")
        data = frame.unused_data
    return b"".join(unpacked)


def split_documents(text: str) -> Iterator[str]:
    """Documents of a text, parted by two or more blank lines; those of white space only are left out."""
    for document in _TWO_BLANK_LINES.split(text):
        document = document.strip("\n")
        if document and not document.isspace():
            yield document


def cut_document(document: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Pieces of at most `limit` characters, cut at the last border between paragraphs, else lines, else words."""
    start = 0
    while len(document) - start > limit:
        end = _last_border(document, start, start + limit)
        yield document[start:end]
        start = end
        while start < len(document) and document[start] == "\n":
            start += 1
    if start < len(document):
        yield document[start:]


def _last_border(document: str, start: int, end: int) -> int:
    for border in _BORDERS:
        # A border in the first half would leave crumbs.
        found = document.rfind(border, start + (end - start) // 2, end)
        if found > start:
            return found
    return end


def content_key(piece: str) -> int:
    """64-bit hash of a piece's content: decides its split and its place, wherever it was read from."""
    return int.from_bytes(hashlib.blake2b(piece.encode(), digest_size=8).digest(), "little")


def validation_keys(fraction: float) -> int:
    """Pieces whose `content_key` lies below this number are validation text."""
    return int(fraction * 2**64)


def unique_pieces(pieces: Iterable[str], counts: dict[str, int]) -> Iterator[tuple[int, str]]:
    """(content_key, piece) of every piece not seen before; counts "pieces" and "duplicates"."""
    seen = _SeenKeys()
    for piece in pieces:
        key = content_key(piece)
        if seen.add(key):
            counts["pieces"] += 1
            yield key, piece
        else:
            counts["duplicates"] += 1


class _SeenKeys:
    """A growing set of 64-bit keys at eight bytes a key: a web corpus has tens of millions of pieces."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def add(self, key: int) -> bool:
        """True when the key is new."""
        if key in self._recent:
            return False
        if len(self._sorted):
            place = np.searchsorted(self._sorted, np.uint64(key))
            if place < len(self._sorted) and self._sorted[place] == key:
                return False
        self._recent.add(key)
        if len(self._recent) == _HASHES_IN_SET:
            recent = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()
        return True
