import multiprocessing
import sys

import pytest

from bench.errors import UserError
from bench.training import progress
from bench.training.progress import Bar, Lines, Silent, describe, open_progress

NUMBERS = {"loss": 2.34567, "tokens_per_second": 81_234.0, "flops_per_second": 5.6e10, "mfu": None}


def test_what_is_shown():
    assert describe(NUMBERS) == "loss 2.3457  81.2 ktok/s  56.0 GFLOP/s"
    assert describe({**NUMBERS, "flops_per_second": 4.5e14, "mfu": 0.4551}).endswith("450.0 TFLOP/s  MFU 45.5%")
    assert "12.0 tok/s" in describe({**NUMBERS, "tokens_per_second": 12.0})


def test_lines_come_at_intervals_and_say_what_is_left(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = Lines("tiny/rope", 100, 20)
    for second in range(1, 22):
        now = float(second)
        lines.update(20 + second, NUMBERS)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert printed[0].startswith("tiny/rope: step 30/100  loss 2.3457")
    assert printed[0].endswith("70 s left")


def test_a_terminal_gets_a_bar_and_a_pipe_lines(monkeypatch):
    assert isinstance(open_progress("auto", "t", 10), Lines)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    bar = open_progress("auto", "t", 10)
    assert isinstance(bar, Bar)
    bar.update(5, NUMBERS)
    bar.say("[bold] is text here")
    bar.close()


def test_workers_share_a_terminal_in_lines(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    assert isinstance(open_progress("auto", "t", 10), Lines)


def test_silence(capsys):
    display = open_progress("none", "t", 10)
    assert isinstance(display, Silent)
    display.update(5, NUMBERS)
    display.say("nothing")
    display.close()
    assert capsys.readouterr().out == ""


def test_an_unknown_kind():
    with pytest.raises(UserError, match="choose auto, bar, lines or none"):
        open_progress("loud", "t", 10)
