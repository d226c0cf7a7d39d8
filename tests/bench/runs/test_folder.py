import errno
import os
import resource

import pytest

from bench.errors import UserError
from bench.runs import claim
from bench.runs.claim import ClaimLost
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


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "", "\x00" * 40, "\xff"])
def test_a_damaged_row_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{path} is not valid JSON: delete the run's folder.* \(line 2\)"):
        read_rows(path)


def on_a_disk_of(size: int, work) -> int:
    """The status of a process that works where no file can outgrow `size` bytes; 0 where it raised nothing."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            work()
            status = 0
        except OSError as error:
            status = error.errno
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_row_that_the_disk_has_no_room_for_leaves_nothing(tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    rows.append({"step": 1})
    before = rows.path.read_bytes()
    assert on_a_disk_of(len(before) + 5, lambda: rows.append({"step": 2})) == errno.EFBIG
    assert rows.path.read_bytes() == before
    rows.append({"step": 2})
    assert read_rows(rows.path) == [{"step": 1}, {"step": 2}]


def test_a_file_that_the_disk_has_no_room_for_leaves_nothing(tmp_path):
    target = tmp_path / "run.json"
    write_whole(target, "old")
    assert on_a_disk_of(5, lambda: write_whole(target, "new and longer")) == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert target.read_text() == "old"


def test_a_failure_that_cannot_be_noted_hides_nothing(tmp_path):
    folder = RunFolder(tmp_path)
    assert on_a_disk_of(5, lambda: folder.fail("Diverged: step 3: loss nan")) == 0
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("content", [b"", b'{"device": "a', b"[]", b"{}", b"\xff\xfe"])
def test_a_damaged_description_says_what_to_do(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json is damaged: delete the run's folder and train it again"):
        RunFolder(tmp_path).run()


def test_one_process_at_a_time(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with first.claimed():
        assert (second.state, second.host) == ("running", os.uname().nodename)
        with pytest.raises(UserError, match="another process is training"), second.claimed():
            pass
    with second.claimed():
        pass
    assert first.state == "absent"


def test_a_claim_dies_with_its_process(tmp_path):
    folder = RunFolder(tmp_path / "run")
    child = os.fork()
    if child == 0:
        folder.claimed().__enter__()
        os._exit(9)
    os.waitpid(child, 0)
    with folder.claimed():
        pass


@pytest.fixture
def overtaken(tmp_path, monkeypatch):
    """A folder whose holder was silent, and its successor on another machine; both believe to hold it."""
    silent, follower = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    monkeypatch.setattr(claim, "BEAT", 10**9)
    monkeypatch.setattr(claim, "LOOK", 0.001)
    monkeypatch.setattr(claim, "LOOKS", 3)
    with silent.claimed():
        monkeypatch.setattr(claim, "boot_id", lambda: "another boot")
        monkeypatch.setattr(claim, "_is_locked", lambda descriptor: False)
        with follower.claimed():
            yield silent, follower


def test_who_was_overtaken_says_neither_done_nor_failed(overtaken):
    silent, follower = overtaken
    silent.fail("FileNotFoundError: the other process has deleted an old checkpoint")
    with pytest.raises(ClaimLost):
        silent.finish()
    assert not {"DONE", "FAILED"} & {path.name for path in silent.path.iterdir()}
    follower.fail("Diverged: step 3")
    assert follower.failure == "Diverged: step 3"
    follower.finish()
    assert silent.state == "done"


def test_a_failure_that_is_being_tried_again_has_no_account(tmp_path):
    assert RunFolder(tmp_path).failure == ""


def test_locks_of_earlier_versions_are_nobodys_claim(tmp_path):
    (tmp_path / ".lock").touch()
    folder = RunFolder(tmp_path)
    assert (folder.state, folder.host) == ("absent", None)


def test_a_disk_too_full_to_claim_is_a_user_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(UserError, match=r"cannot write .*: No space left on device; choose another paths\.runs"),
        RunFolder(tmp_path / "run").claimed(),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_a_user_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot write .*: Permission denied"), RunFolder(tmp_path).claimed():
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
