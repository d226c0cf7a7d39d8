"""The table of ops: which one runs, which is left out, and what the exit status says."""

import pytest

from bench import speed
from bench.__main__ import main
from bench.speed import CannotRunHere


def refusing(overrides) -> int:
    raise CannotRunHere("it needs a quantum computer")


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The ops that ran; `one` ends with status 0, `two` with 1, and `three` cannot run here."""
    calls: list[str] = []
    table = {"one": lambda overrides: calls.append("one") or 0, "two": lambda overrides: calls.append("two") or 1}
    monkeypatch.setattr(speed, "OPS", {"one": table["one"], "three": refusing, "two": table["two"]})
    return calls


def test_all_leaves_out_what_cannot_run_and_takes_the_worst_status(ran, capsys) -> None:
    assert main(["speed"]) == 1
    assert ran == ["one", "two"]
    assert capsys.readouterr().out == "left out: three: it needs a quantum computer\n"


def test_a_named_op_runs_alone(ran) -> None:
    assert main(["speed", "op=one"]) == 0
    assert ran == ["one"]


def test_a_named_op_that_cannot_run_is_a_mistake(ran, capsys) -> None:
    assert main(["speed", "op=three"]) == 2
    assert capsys.readouterr().err == "error: it needs a quantum computer\n"


def test_an_unknown_op_is_a_mistake(capsys) -> None:
    assert main(["speed", "op=nonsense"]) == 2
    assert "op=nonsense is unknown: choose all or attention, norm, rope, mlp" in capsys.readouterr().err


def test_an_unknown_setting_is_a_mistake(capsys) -> None:
    assert main(["speed", "op=attention", "speed.sequence=[1]"]) == 2
    assert "sequence" in capsys.readouterr().err
