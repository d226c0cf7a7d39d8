"""Which weights dropout keeps: the generator against another Philox, and the kernels against the generator."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import flash_attention
from kernels.attention.dropout import kept, philox, threshold
from tests.kernels.attention.exactness import DEVICE, SEED, kept_weights, running

# Random123's known answers for philox4x32 with 7 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
    ),
]
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["triton", "blocked"])


def philox_of_integers(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-7 as Salmon et al. 2011 write it down."""
    for _ in range(7):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [right >> 32 ^ counter[1] ^ key[0], right % 2**32, left >> 32 ^ counter[3] ^ key[1], left % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def weights(implementation: str, sequence: int, dropout_p: float, **options) -> torch.Tensor:
    """(B, H, S, S) attention weights after dropout, of equal scores: values are an identity matrix."""
    q = torch.zeros(2, 2, sequence, 16, device=DEVICE)
    v = torch.eye(sequence, device=DEVICE).expand(2, 2, -1, -1)
    with running(implementation):
        return flash_attention(q, q, v, causal=False, dropout_p=dropout_p, **options)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers_of_the_other_philox(counter, key, answer) -> None:
    assert philox_of_integers(counter, key) == answer


def test_known_answer() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox(zero, zero, zero, zero).item() == 0x5F6FB709


@given(st.integers(-(2**63), 2**63 - 1), *[st.integers(0, 2**32 - 1)] * 3)
def test_first_word(seed, c0, c1, c2) -> None:
    word = philox(torch.tensor([seed]), *(torch.tensor([word]) for word in (c0, c1, c2)))
    assert word.item() == philox_of_integers([c0, c1, c2, 0], [seed % 2**32, (seed >> 32) % 2**32])[0]


@pytest.mark.parametrize("dropout_p", [1e-3, 0.1, 0.5, 0.999])
def test_kept_is_a_threshold_on_the_upper_bits(dropout_p) -> None:
    seed, positions = torch.tensor([2**61 + 7]), torch.arange(6)
    found = kept(seed, torch.tensor(3), positions[:, None], positions, dropout_p)
    for query in range(6):
        for key in range(6):
            word = philox_of_integers([query, key, 3, 0], [7, 2**29])[0]
            assert found[query, key].item() == ((word >> 8) / 2**24 >= threshold(dropout_p) / 2**24)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_share_kept(dropout_p) -> None:
    """Within five standard deviations, over the whole and over every row, column and head."""
    mask = kept_weights(2, 4, 256, dropout_p).double()
    deviation = (dropout_p * (1 - dropout_p)) ** 0.5
    for dimensions in [(0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (2, 3)]:
        means = mask.mean(dimensions)
        allowed = 5 * deviation / (mask.numel() / means.numel()) ** 0.5
        assert (means - (1 - dropout_p)).abs().max() < allowed


@IMPLEMENTATIONS
@pytest.mark.parametrize("dropout_p", [0.1, 0.7])
def test_kernels_drop_what_the_generator_says(implementation, dropout_p) -> None:
    expected = kept_weights(2, 2, 70, dropout_p) / 70 / (1 - dropout_p)
    torch.manual_seed(SEED)
    torch.testing.assert_close(weights(implementation, 70, dropout_p), expected.float())


@IMPLEMENTATIONS
def test_forward_and_backward_drop_the_same(implementation) -> None:
    """The gradient of values is the transposed weights, dropped ones included."""
    q = torch.zeros(1, 2, 40, 16, device=DEVICE)
    v = torch.eye(40, device=DEVICE).expand(1, 2, -1, -1).contiguous().requires_grad_()
    with running(implementation):
        out = flash_attention(q, q, v, causal=False, dropout_p=0.4)
    (gradient,) = torch.autograd.grad(out, v, torch.eye(40, device=DEVICE).expand(1, 2, -1, -1))
    assert 0.3 < (out == 0).double().mean() < 0.5
    torch.testing.assert_close(gradient, out.mT)


@IMPLEMENTATIONS
def test_each_call_draws_anew_and_a_seed_repeats(implementation) -> None:
    torch.manual_seed(1)
    first, second = weights(implementation, 30, 0.5), weights(implementation, 30, 0.5)
    torch.manual_seed(1)
    again = weights(implementation, 30, 0.5)
    assert torch.equal(first, again)
    assert 0.4 < ((first == 0) != (second == 0)).double().mean() < 0.6
    # The heads differ as well.
    assert 0.4 < ((first[0, 0] == 0) != (first[1, 1] == 0)).double().mean() < 0.6


def test_no_dropout_draws_nothing() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    weights("blocked", 30, 0.0, window=3)
    assert torch.equal(torch.get_rng_state(), before)
