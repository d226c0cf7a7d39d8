import errno
import json
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable

import pytest

from bench.errors import TrajectoryFailed, UserError
from bench.runs import claim
from bench.runs.claim import ClaimLost, holding_host, look, take_claim

NEVER = 10**9


@pytest.fixture(autouse=True)
def _nothing_happens_by_itself(monkeypatch):
    """No heartbeat, and silence never counts as death, but where a test says otherwise."""
    monkeypatch.setattr(claim, "BEAT", NEVER)
    monkeypatch.setattr(claim, "LOOK", 0.001)
    monkeypatch.setattr(claim, "LOOKS", NEVER)


@pytest.fixture
def elsewhere(monkeypatch):
    """From here on, this process is on another machine, which does not see the first one's locks."""

    def move() -> None:
        monkeypatch.setattr(claim, "boot_id", lambda: "another boot")
        monkeypatch.setattr(claim, "_is_locked", lambda descriptor: False)

    return move


def in_child(work: Callable[[], None]) -> int:
    """Starts a process that does the work and ends with status 0, or 1 where it raised; returns its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


def claims_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_claim_names_its_holder_and_keeps_others_out(tmp_path):
    held = take_claim(tmp_path)
    held.check()
    assert holding_host(tmp_path) == os.uname().nodename
    with pytest.raises(UserError, match=rf"training {tmp_path} \(process {os.getpid()} on {os.uname().nodename}\)"):
        take_claim(tmp_path)
    held.release()
    assert holding_host(tmp_path) is None


def test_turns_leave_one_file(tmp_path):
    for _ in range(3):
        take_claim(tmp_path).release()
    assert claims_in(tmp_path) == [".claim-000003"]


def test_nobody_claims_a_folder_that_is_not_there(tmp_path):
    assert holding_host(tmp_path / "run") is None
    with pytest.raises(OSError, match="No such file"):
        take_claim(tmp_path / "run")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_is_followed_at_once(tmp_path, end):
    child = in_child(lambda: (take_claim(tmp_path), signal.pause()))
    wait_until(lambda: bool(look(tmp_path).account))
    os.kill(child, end)
    assert status_of(child) == -end
    assert holding_host(tmp_path) is None
    take_claim(tmp_path).release()


def test_a_suspended_process_of_this_machine_keeps_its_claim(tmp_path, monkeypatch):
    child = in_child(lambda: (take_claim(tmp_path), signal.pause()))
    wait_until(lambda: bool(look(tmp_path).account))
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    monkeypatch.setattr(claim, "LOOKS", 3)
    with pytest.raises(UserError, match=f"process {child} on"):
        take_claim(tmp_path)
    os.kill(child, signal.SIGKILL)
    assert status_of(child) == -signal.SIGKILL


def test_a_suspended_process_of_another_machine_is_overtaken_and_told(tmp_path, monkeypatch, elsewhere):
    def train_until_overtaken() -> None:
        claim.BEAT = 0.01
        held = take_claim(tmp_path)
        wait_until(lambda: held.lost)
        with pytest.raises(ClaimLost):
            held.check()
        held.release()

    child = in_child(train_until_overtaken)
    wait_until(lambda: bool(look(tmp_path).account))
    elsewhere()
    with pytest.raises(UserError, match=f"process {child} on"):
        take_claim(tmp_path)
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    monkeypatch.setattr(claim, "LOOKS", 3)
    ours = take_claim(tmp_path)
    os.kill(child, signal.SIGCONT)
    assert status_of(child) == 0
    ours.check()
    assert not look(tmp_path).account["released"], "the overtaken process released a claim that is not its own"
    ours.release()


def test_who_was_overtaken_says_by_whom(tmp_path, monkeypatch, elsewhere):
    silent = take_claim(tmp_path)
    elsewhere()
    monkeypatch.setattr(claim, "LOOKS", 3)
    ours = take_claim(tmp_path)
    with pytest.raises(ClaimLost, match=rf"process {os.getpid()} on \S+ has taken over {tmp_path}") as lost:
        silent.check()
    assert isinstance(lost.value, TrajectoryFailed)
    silent.release()
    ours.check()
    ours.release()


def test_a_heart_that_beats_keeps_another_machine_out(tmp_path, monkeypatch, elsewhere, capsys):
    monkeypatch.setattr(claim, "BEAT", 0.01)
    held = take_claim(tmp_path)
    elsewhere()
    with pytest.raises(UserError, match="another process is training"):
        take_claim(tmp_path)
    assert capsys.readouterr().err.count("watching whether that still lives") == 1
    held.release()
    take_claim(tmp_path).release()


def test_a_heartbeat_needs_no_room_and_shows_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "BEAT", 0.0001)
    held = take_claim(tmp_path)
    path = tmp_path / claims_in(tmp_path)[0]
    seen = set()

    def beats() -> bool:
        content = path.read_bytes()
        assert len(content) == claim.SIZE
        seen.add(json.loads(content)["beat"])
        return len(seen) > 20

    wait_until(beats)
    held.release()


def test_of_many_that_start_at_once_one_trains(tmp_path):
    """Eight times, six processes; each winner holds on until all have tried."""
    for turn in range(8):
        folder = tmp_path / str(turn)
        folder.mkdir()
        start, tried = folder.with_suffix(".start"), folder.with_suffix(".tried")
        tried.mkdir()

        def attempt(folder=folder, start=start, tried=tried) -> None:
            while not start.exists():
                time.sleep(0.0001)
            try:
                take_claim(folder)
                (tried / f"{os.getpid()} won").touch()
            except UserError:
                (tried / f"{os.getpid()} lost").touch()
            wait_until(lambda: len(list(tried.iterdir())) == 6)

        children = [in_child(attempt) for _ in range(6)]
        start.touch()
        assert [status_of(child) for child in children] == [0] * 6
        assert len(list(tried.glob("* won"))) == 1


def test_of_many_that_judge_a_holder_dead_one_follows(tmp_path):
    for turn in range(50):
        number = look(tmp_path).number
        barrier, taken = threading.Barrier(6), []

        def attempt(number=number, barrier=barrier, taken=taken) -> None:
            barrier.wait()
            taken.append(claim._create(tmp_path, number + 1))

        threads = [threading.Thread(target=attempt) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = filter(None, taken)
        assert (winner.number, len(taken)) == (turn + 1, 6)
        winner.check()
        winner.release()


def take_turn(folder):
    while True:
        try:
            return take_claim(folder)
        except UserError:
            time.sleep(0.001)


def test_processes_that_take_turns_never_train_together(tmp_path):
    """A count that is read, and written back later, comes out right only if nobody comes between."""
    folder, count = tmp_path / "run", tmp_path / "count"
    folder.mkdir()
    count.write_text("0")

    def work() -> None:
        for _ in range(10):
            held = take_turn(folder)
            before = int(count.read_text())
            time.sleep(0.001)
            held.check()
            count.write_text(str(before + 1))
            held.release()

    children = [in_child(work) for _ in range(4)]
    assert [status_of(child) for child in children] == [0] * 4
    assert count.read_text() == "40"


def test_a_number_that_was_used_before_is_not_used_again(tmp_path):
    """A process that looked when claim 0 was the newest, and creates claim 1 only after claim 2 was taken."""
    take_claim(tmp_path).release()
    held = take_claim(tmp_path)
    assert claims_in(tmp_path) == [".claim-000002"]
    assert claim._create(tmp_path, 1) is None
    held.check()
    held.release()
    take_claim(tmp_path).release()
    assert claims_in(tmp_path) == [".claim-000003"]


def test_a_folder_that_was_removed_is_not_written_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    held = take_claim(folder)
    shutil.rmtree(folder)
    with pytest.raises(ClaimLost, match=f"{folder} was removed"):
        held.check()
    held.release()
    assert not folder.exists()


def test_a_process_killed_before_it_wrote_its_name(tmp_path, monkeypatch):
    (tmp_path / ".claim-000007").touch()
    with monkeypatch.context() as patch:
        patch.setattr(claim, "LOOK", 1.0)
        assert holding_host(tmp_path) == "?"
    monkeypatch.setattr(claim, "LOOKS", 3)
    held = take_claim(tmp_path)
    assert held.number == 8
    held.release()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(claim, "BEAT", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(claim.fcntl, "flock", refuse)
        held = take_claim(tmp_path)
        with pytest.raises(UserError, match="another process is training"):
            take_claim(tmp_path)
    # The locks came back, and the holder has none: that is no sign of its death.
    with pytest.raises(UserError, match="another process is training"):
        take_claim(tmp_path)
    held.release()
    take_claim(tmp_path).release()


@pytest.mark.parametrize("why", [errno.ENOENT, errno.ESTALE])
def test_a_claim_that_is_overtaken_while_it_is_looked_at(tmp_path, monkeypatch, why):
    """ESTALE is what NFS says of an open file that another machine has deleted."""
    take_claim(tmp_path).release()

    def vanish(*_):
        raise OSError(why, os.strerror(why))

    with monkeypatch.context() as patch:
        patch.setattr(claim.os, "fstat", vanish)
        assert look(tmp_path).free is None
    with monkeypatch.context() as patch:
        patch.setattr(claim.os, "fstat", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            look(tmp_path)


def test_a_full_disk_leaves_no_claim(tmp_path, monkeypatch):
    take_claim(tmp_path).release()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(claim.os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            take_claim(tmp_path)
    assert claims_in(tmp_path) == [".claim-000001"]
    take_claim(tmp_path).release()


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(("age", "alive"), [(0, True), (-3600, False), (3600, False)])
def test_what_one_look_tells_of_another_machine(tmp_path, monkeypatch, elsewhere, read_only, age, alive):
    held = take_claim(tmp_path)
    elsewhere()
    monkeypatch.setattr(claim, "LOOK", 1.0)
    monkeypatch.setattr(claim, "LOOKS", 600)
    if read_only:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: (_ for _ in ()).throw(PermissionError("read-only")))
    else:
        monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock that was set back does not count
    path = tmp_path / claims_in(tmp_path)[0]
    modified = path.stat().st_mtime + age
    os.utime(path, (modified, modified))
    assert holding_host(tmp_path) == (os.uname().nodename if alive else None)
    held.release()
