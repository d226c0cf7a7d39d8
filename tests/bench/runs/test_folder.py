import os
import threading

import pytest

from bench.errors import UserError
from bench.runs.folder import RowFile, RunFolder, read_rows, write_whole


def test_rows_go_out_and_come_back(tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    written = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": None}]
    for row in written:
        rows.append(row)
    assert read_rows(rows.path) == written


def test_a_row_that_was_cut_short_is_no_row(tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    rows.append({"step": 1})
    with rows.path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_rows(rows.path) == [{"step": 1}]


def test_rows_go_back_to_a_checkpoint(tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    assert rows.size == 0
    rows.truncate(0)
    rows.append({"step": 1})
    size = rows.size
    rows.append({"step": 2})
    rows.truncate(size)
    assert read_rows(rows.path) == [{"step": 1}]
    with pytest.raises(UserError, match="lost rows"):
        rows.truncate(size + 1)


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        RowFile(tmp_path / "rows.jsonl").append({"loss": float("nan")})


def test_states(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.state == "absent"
    folder.path.mkdir()
    folder.describe("seed: 0\n", {"variant": "baseline"})
    assert folder.state == "unfinished"
    folder.fail("Traceback\n  File\nDiverged: step 3: loss nan\n")
    assert (folder.state, folder.failure) == ("failed", "Diverged: step 3: loss nan")
    folder.begin()
    assert folder.state == "unfinished"
    folder.finish()
    assert folder.state == "done"


def test_a_resumed_run_keeps_its_description(tmp_path):
    folder = RunFolder(tmp_path)
    folder.describe("a: 1\n", {"started": "then"})
    folder.describe("a: 2\n", {"started": "now"})
    assert folder.run() == {"started": "then"}
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


def test_one_process_at_a_time(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with first.claimed():
        assert second.state == "running"
        with pytest.raises(UserError, match="another process is training"), second.claimed():
            pass
    with second.claimed():
        pass
    assert first.state == "absent"


def test_a_process_may_wait_for_its_turn(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    order = []

    def take_turn():
        with second.claimed(wait=True):
            order.append("second")

    thread = threading.Thread(target=take_turn)
    with first.claimed():
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_claim_dies_with_its_process(tmp_path):
    folder = RunFolder(tmp_path / "run")
    child = os.fork()
    if child == 0:
        folder.claimed().__enter__()
        os._exit(9)
    os.waitpid(child, 0)
    with folder.claimed():
        pass


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot write .* choose another paths\.runs"),
        RunFolder(tmp_path / "file" / "run").claimed(),
    ):
        pass


def test_a_file_is_whole_or_as_before(tmp_path, monkeypatch):
    target = tmp_path / "gains.json"
    write_whole(target, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(target, "new")
    assert target.read_text() == "old"
