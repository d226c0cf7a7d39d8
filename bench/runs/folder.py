"""A run's folder: the files of one trajectory, written so that a kill at any moment loses nothing that counts."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.errors import UserError
from bench.runs.claim import Claim, holding_host, take_claim

# The cost columns of a row that are measured, and null where nothing measures them; the others follow from its step.
MEASURED = ("seconds", "joules", "dollars", "grams_co2e")


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is either absent, as before, or complete."""
    beside = path.with_name(path.name + ".partial")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a .jsonl file; a last line that was cut short is not one.

    Raises:
        UserError: another line is no row, which no kill of a process leaves behind.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            advice = "delete the run's folder and train it again"
            raise UserError(f"{path} is not valid JSON: {advice} (line {number})") from None
    return rows


class RowFile:
    """A .jsonl file that grows a row at a time and can be cut back to where a checkpoint was taken."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row, or on a full disk, where it raises OSError, none of it."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:  # a buffer would write the rest of a failed row when it closes
            size = os.fstat(file.fileno()).st_size
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(size)
                raise

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


class RunFolder:
    """Names and states of the files that DESIGN calls what a run leaves."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = RowFile(path / "metrics.jsonl")
        self.results = RowFile(path / "results.jsonl")
        self.checkpoints = path / "checkpoints"
        self._claim: Claim | None = None

    @property
    def state(self) -> str:
        """done | failed | running | unfinished | absent."""
        if not (self.path / "DONE").exists() and self.host is not None:
            return "running"
        for name, state in (("DONE", "done"), ("FAILED", "failed"), ("run.json", "unfinished")):
            if (self.path / name).exists():
                return state
        return "absent"

    @property
    def host(self) -> str | None:
        """The machine that trains here now; None where none does, or where the folder cannot be read."""
        try:
            return holding_host(self.path)
        except OSError:
            return None

    @contextmanager
    def claimed(self) -> Iterator[Claim]:
        """Held while a process trains here; the claim dies with the process.

        Raises:
            UserError: the folder cannot be written, or another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim = claim = take_claim(self.path)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; choose another paths.runs") from None
        try:
            yield claim
        finally:
            self._claim = None
            claim.release()

    def check(self) -> None:
        """Call it before anything is written that another process could be writing too.

        Raises:
            ClaimLost: this process claimed the folder, and no longer holds it.
        """
        if self._claim:
            self._claim.check()

    @property
    def described(self) -> bool:
        return (self.path / "run.json").exists()

    def describe(self, config_yaml: str, run: dict[str, Any]) -> None:
        """Writes config.yaml and run.json, which are as old as the trajectory: a resumed one keeps them."""
        if not self.described:
            write_whole(self.path / "config.yaml", config_yaml)
            write_whole(self.path / "run.json", json.dumps(run, indent=2, allow_nan=False) + "\n")

    def run(self) -> dict[str, Any]:
        """What `describe` wrote to run.json.

        Raises:
            UserError: it is damaged.
        """
        path = self.path / "run.json"
        try:
            run = json.loads(path.read_text())
        except ValueError:
            run = None
        if not run or not isinstance(run, dict):
            raise UserError(f"{path} is damaged: delete the run's folder and train it again")
        return run

    def begin(self) -> None:
        """Forgets an earlier failure: the trajectory is tried again."""
        (self.path / "FAILED").unlink(missing_ok=True)

    def finish(self) -> None:
        """Says that the trajectory is done.

        Raises:
            ClaimLost: that is another process's to say.
        """
        self.check()
        write_whole(self.path / "DONE", "")

    def fail(self, account: str) -> None:
        """Leaves an account of what went wrong, where the disk has room and the folder is still this process's."""
        with suppress(OSError):  # the failure itself is what the user must see, not that it could not be noted
            if self._claim and self._claim.lost:
                return
            write_whole(self.path / "FAILED", account)

    @property
    def failure(self) -> str:
        """The last line of FAILED: the error itself."""
        try:
            lines = (self.path / "FAILED").read_text().strip().splitlines()
        except FileNotFoundError:  # tried again since
            lines = []
        return lines[-1] if lines else ""
