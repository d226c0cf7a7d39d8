"""The embedded corpus, end to end, and what importing and opening may cost."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench.data import DataConfig, Loader, evaluation_batch, open_dataset, prepare
from bench.data.text import CORPUS, cut_document, read_text, split_documents

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare(DataConfig(), folder)
    return folder


def test_embedded_corpus(folder):
    data = open_dataset(DataConfig(), folder)
    assert data.vocabulary_size == 256
    assert len(data.train) > 16_000_000
    assert 600_000 < len(data.validation) < 1_100_000
    assert len(data.train.shards) == 1
    loader = Loader(data.train, 128, seed=0)
    inputs, targets = loader.batch(12_345, 16)
    assert inputs.shape == targets.shape == (16, 128)
    assert evaluation_batch(data.validation, 128, 1024)[0].shape == (1024, 128)


def test_no_piece_of_the_embedded_corpus_is_in_both_splits(folder):
    data = open_dataset(DataConfig(), folder)
    splits = [bytes(split.shards[0].astype(np.uint8)).decode() for split in (data.train, data.validation)]
    documents = (document for file in CORPUS.glob("*.xz") for document in split_documents(read_text(file)))
    pieces = {piece for document in documents for piece in cut_document(document)}
    long = [piece for piece in pieces if len(piece) > 200]
    assert len(long) > 2000
    for piece in long[::25]:
        assert sum(piece in split for split in splits) == 1
    assert sum(map(len, splits)) == sum(len(piece) + 1 for piece in pieces)


def test_opening_a_prepared_corpus_takes_milliseconds(folder):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        open_dataset(DataConfig(), folder)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05, "about 4 milliseconds on an idle core"


def test_importing_and_opening_load_numpy_only(folder):
    heavy = ("torch", "tiktoken", "tokenizers", "datasets", "zstandard", "wandb", "polars", "plotly")
    code = (
        "import sys; from bench.data import DataConfig, open_dataset; from pathlib import Path; "
        f"open_dataset(DataConfig(), Path({str(folder)!r})); print([name for name in {heavy!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"
