"""A run's folder: the files of one trajectory, written so that a kill at any moment loses nothing that counts."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bench.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is either absent, as before, or complete."""
    beside = path.with_name(path.name + ".partial")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a .jsonl file; a last line that was cut short is not one."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


class RowFile:
    """A .jsonl file that grows a row at a time and can be cut back to where a checkpoint was taken."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    @property
    def size(self) -> int:
        """Bytes; the file is on the disk when this returns."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def truncate(self, size: int) -> None:
        """Drops what was written after the first `size` bytes.

        Raises:
            UserError: the file is shorter than that.
        """
        if self.size < size:
            raise UserError(
                f"{self.path} lost rows since its checkpoint was written: delete the run's folder to retrain"
            )
        if self.path.exists():
            os.truncate(self.path, size)


def _claim(lock: IO[str]) -> bool:
    """Takes the lock unless another process holds it; whoever only looks holds it for a moment, so it tries again."""
    for _ in range(5):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
    return False


class RunFolder:
    """Names and states of the files that DESIGN calls what a run leaves."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = RowFile(path / "metrics.jsonl")
        self.results = RowFile(path / "results.jsonl")
        self.checkpoints = path / "checkpoints"

    @property
    def state(self) -> str:
        """done | failed | running | unfinished | absent; running is known for processes of this machine."""
        if not (self.path / "DONE").exists() and self._is_claimed():
            return "running"
        for name, state in (("DONE", "done"), ("FAILED", "failed"), ("run.json", "unfinished")):
            if (self.path / name).exists():
                return state
        return "absent"

    def _is_claimed(self) -> bool:
        try:
            with (self.path / ".lock").open("r+") as lock:
                return not _claim(lock)
        except OSError:  # no claim yet, or a folder that this process may only read
            return False

    @contextmanager
    def claimed(self, *, wait: bool = False) -> Iterator[None]:
        """Held while a process trains here; the claim dies with the process.

        Args:
            wait: until another process on this machine has let go of it.
        Raises:
            UserError: the folder cannot be written, or another process on this machine holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; choose another paths.runs") from None
        with lock:
            if wait:
                fcntl.flock(lock, fcntl.LOCK_EX)
            elif not _claim(lock):
                raise UserError(f"another process is training {self.path}: wait for it or stop it")
            yield

    @property
    def described(self) -> bool:
        return (self.path / "run.json").exists()

    def describe(self, config_yaml: str, run: dict[str, Any]) -> None:
        """Writes config.yaml and run.json, which are as old as the trajectory: a resumed one keeps them."""
        if not self.described:
            write_whole(self.path / "config.yaml", config_yaml)
            write_whole(self.path / "run.json", json.dumps(run, indent=2, allow_nan=False) + "\n")

    def run(self) -> dict[str, Any]:
        return json.loads((self.path / "run.json").read_text())

    def begin(self) -> None:
        """Forgets an earlier failure: the trajectory is tried again."""
        (self.path / "FAILED").unlink(missing_ok=True)

    def finish(self) -> None:
        write_whole(self.path / "DONE", "")

    def fail(self, account: str) -> None:
        write_whole(self.path / "FAILED", account)

    @property
    def failure(self) -> str:
        """The last line of FAILED: the error itself."""
        lines = (self.path / "FAILED").read_text().strip().splitlines()
        return lines[-1] if lines else ""
