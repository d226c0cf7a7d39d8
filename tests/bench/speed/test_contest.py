"""Contests: what happens to a contestant that fails while it is timed, and what counts as right."""

import itertools

import pytest
import torch

from bench.speed.contest import WrongResult, compare, excess, results, time_steps


def test_a_peer_that_fails_while_it_is_timed_leaves_the_others_their_times() -> None:
    calls = itertools.count()

    def failing() -> None:
        if next(calls) == 2:
            raise RuntimeError("out of memory")

    left_out: dict[str, str] = {}
    times = time_steps({"good": lambda: None, "bad": failing}, lambda step: step() or 1.0, left_out)
    assert set(times) == {"good"}
    assert set(times["good"]) == {1.0}
    assert left_out == {"bad": "RuntimeError: out of memory"}


def test_a_gpu_that_breaks_while_timing_leaves_everyone_out() -> None:
    def broken(step) -> float:
        raise RuntimeError("illegal memory access")

    left_out: dict[str, str] = {}
    assert time_steps({"a": lambda: None, "b": lambda: None}, broken, left_out) == {}
    assert left_out == dict.fromkeys("ab", "RuntimeError: illegal memory access")


def test_results_are_outputs_and_then_the_gradients_of_the_inputs() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    one, two = torch.tensor([1.0]), torch.tensor([10.0])
    assert results(lambda x: x * x, [x], [one]) == [9.0, 6.0]
    assert results(lambda x: (x * x, 2 * x), [x], [one, two]) == [9.0, 6.0, 26.0]


def test_a_part_of_the_truth_will_do_but_it_must_be_right() -> None:
    found = [torch.tensor([[1.0, 2.0], [9.0, 9.0]])]
    compare(found, {"out": torch.tensor([[1.0, 2.0]])})
    for wrong in ([[1.0, 2.2]], [[float("nan"), 2.0]]):
        with pytest.raises(WrongResult, match="its out is wrong"):
            compare(found, {"out": torch.tensor(wrong)})


@pytest.mark.parametrize(("error", "right"), [(0.25, True), (0.45, True), (0.55, False), (float("nan"), False)])
def test_twice_the_error_of_plain_pytorch_and_a_few_ulp_are_allowed(error, right) -> None:
    truth = torch.tensor([8.0], dtype=torch.float64)
    problem = excess([truth + error], [truth - 0.2], {"out": truth}, epsilon=0.1 / 32)
    assert bool(problem) != right
    assert right or problem.startswith("out is off by")
    assert not excess([truth + error], [truth - 0.2], {"out": truth}, 0.1 / 32, 0.1) or error != 0.55
