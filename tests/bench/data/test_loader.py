"""The loader against rules that hold for every corpus, seed and position."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.data import Loader, Tokens, evaluation_batch
from bench.errors import UserError

FROZEN_SEED_0 = [24, 16, 8, 64, 48, 0, 56, 32, 40, 72]
FROZEN_SEED_7_EPOCH_1 = [8, 24, 16, 56, 64, 32, 40, 72, 0, 48]


def numbered(*lengths):
    """A corpus in which every token is its own place, so that a batch shows where it was read."""
    assert sum(lengths) <= 65536
    return Tokens(np.split(np.arange(sum(lengths), dtype=np.uint16), np.cumsum(lengths)[:-1]))


corpora = st.builds(
    lambda lengths, context: (numbered(context + 1, *lengths), context),
    st.lists(st.integers(0, 60), max_size=4),
    st.integers(1, 12),
)
seeds = st.integers(0, 2**31)


@given(corpora, seeds, st.integers(0, 500), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_any_split_of_a_batch_is_the_same_stream(corpus, seed, position, sizes):
    tokens, context = corpus
    whole = Loader(tokens, context, seed).batch(position, sum(sizes))
    loader, parts, start = Loader(tokens, context, seed), [], position
    for size in sizes:
        parts.append(loader.batch(start, size))
        start += size * context
    for side in (0, 1):
        assert np.array_equal(whole[side], np.concatenate([part[side] for part in parts]))


@given(corpora, seeds, st.integers(0, 400), st.integers(1, 4))
def test_a_batch_is_the_stream_from_any_position(corpus, seed, position, sequences):
    """Also in mid-window: position p gives what lies p tokens into the stream from 0."""
    tokens, context = corpus
    loader = Loader(tokens, context, seed)
    windows = position // context + sequences + 1
    for side, got in enumerate(loader.batch(position, sequences)):
        stream = loader.batch(0, windows)[side].reshape(-1)
        assert np.array_equal(got.reshape(-1), stream[position : position + sequences * context])


@given(corpora, seeds, st.integers(0, 3))
def test_one_epoch_visits_every_window_once(corpus, seed, epoch):
    tokens, context = corpus
    loader = Loader(tokens, context, seed)
    expected = []
    for shard in tokens.shards:
        expected += [int(shard[start]) for start in range(0, len(shard) - context, context)]
    assert len(loader.windows) == len(expected)
    inputs, targets = loader.batch(epoch * len(expected) * context, len(expected))
    assert sorted(inputs[:, 0].tolist()) == sorted(expected)
    assert np.array_equal(targets, inputs + 1), "the target is the corpus's next token"
    assert np.array_equal(inputs, inputs[:, :1] + np.arange(context)), "a window is read in order"


@given(corpora, seeds, st.integers(0, 300))
def test_no_target_lies_in_another_shard(corpus, seed, position):
    tokens, context = corpus
    inputs, targets = Loader(tokens, context, seed).batch(position, 3)
    ends = {int(shard[-1]) for shard in tokens.shards if len(shard)}
    assert ends.isdisjoint(inputs.reshape(-1).tolist())
    assert np.array_equal(targets, inputs + 1)


def test_shapes_dtypes_and_own_memory():
    tokens = numbered(1000)
    for position in (0, 3):
        inputs, targets = Loader(tokens, 8, 0).batch(position, 5)
        for array in (inputs, targets):
            assert array.shape == (5, 8)
            assert array.dtype == np.int64
            assert array.flags.c_contiguous
            array += 1
    assert tokens.shards[0][0] == 0


def test_seeds_and_epochs_differ():
    loader = Loader(numbered(10_001), 10, 1)
    epoch = 1000 * 10
    assert not np.array_equal(loader.batch(0, 1000)[0], Loader(numbered(10_001), 10, 2).batch(0, 1000)[0])
    assert not np.array_equal(loader.batch(0, 1000)[0], loader.batch(epoch, 1000)[0])
    assert np.array_equal(loader.batch(epoch - 50, 10)[0][5:], loader.batch(epoch, 5)[0])


def test_the_order_is_frozen():
    """Finished runs are compared with later ones: the order of a seed must never change."""
    assert Loader(numbered(81), 8, 0).batch(0, 10)[0][:, 0].tolist() == FROZEN_SEED_0
    assert Loader(numbered(81), 8, 7).batch(80, 10)[0][:, 0].tolist() == FROZEN_SEED_7_EPOCH_1


def test_a_far_position_costs_no_more():
    loader = Loader(numbered(81), 8, 0)
    assert loader.batch(10**15, 4)[0].shape == (4, 8)


def test_too_small_a_corpus():
    with pytest.raises(UserError, match="the training split has 8 tokens, less than one window of 8 and its target"):
        Loader(numbered(8), 8, 0)
    assert len(Loader(numbered(9), 8, 0).windows) == 1
    with pytest.raises(UserError, match="the training split has 0 tokens"):
        Loader(Tokens([]), 8, 0)


def test_arguments():
    with pytest.raises(UserError, match="seed=-1 must not be negative"):
        Loader(numbered(9), 8, -1)
    with pytest.raises(ValueError, match="context=0"):
        Loader(numbered(9), 0, 0)
    with pytest.raises(ValueError, match="position=-1"):
        Loader(numbered(9), 8, 0).batch(-1, 1)
    with pytest.raises(ValueError, match="sequences=0"):
        Loader(numbered(9), 8, 0).batch(0, 0)


@given(corpora, st.data())
def test_evaluation_windows_are_disjoint_and_spread(corpus, data):
    tokens, context = corpus
    available = len(Loader(tokens, context, 0).windows)
    sequences = data.draw(st.integers(1, available))
    inputs, targets = evaluation_batch(tokens, context, sequences)
    assert inputs.shape == targets.shape == (sequences, context)
    assert inputs.dtype == targets.dtype == np.int64
    assert len(set(inputs.reshape(-1).tolist())) == inputs.size
    assert np.array_equal(targets, inputs + 1)
    again = evaluation_batch(tokens, context, sequences)
    assert np.array_equal(inputs, again[0])


def test_evaluation_is_evenly_spaced():
    inputs, _ = evaluation_batch(numbered(1001), 10, 4)
    assert inputs[:, 0].tolist() == [0, 250, 500, 750]


@pytest.mark.parametrize("sequences", [0, 11])
def test_too_many_evaluation_sequences(sequences):
    with pytest.raises(UserError, match=rf"{sequences} evaluation sequences of 8 tokens asked for, .* has 10"):
        evaluation_batch(numbered(81), 8, sequences)


def test_a_batch_is_quick():
    loader = Loader(numbered(60_000), 128, 0)
    loader.batch(0, 16)
    times = []
    for step in range(200):
        start = time.perf_counter()
        loader.batch(step * 2048, 16)
        times.append(time.perf_counter() - start)
    assert sorted(times)[50] < 2e-4, "well under a training step; about 30 microseconds on an idle core"
