"""Who trains in a run's folder: at most one process at a time, of all the machines that see the folder.

- The file `.claim-NNNNNN` with the highest number is the claim. Taking it over is creating the next number, which the
  file system lets one process do only; that process then deletes the older files. The highest is never deleted.
- It holds its holder's host, boot and process, and a counter that a thread of the holder raises every `BEAT` seconds.
- The holder keeps it locked (flock). Who is refused the lock knows that the holder lives; on the holder's own machine,
  who gets it knows that the holder is gone, and follows at once. To let go is to write so into the file.
- Many file systems keep locks to each machine. From another one, a claim is dead when `LOOKS` looks found it unchanged:
  no clock is compared with another machine's, and time in which the looker itself was stopped does not count.
- A holder that was suspended until it was overtaken finds a higher number: `check` tells it before it writes. (Between
  that look and the write it may be suspended again; on one machine its lock guards that moment too.)
"""

import errno
import fcntl
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import TrajectoryFailed, UserError

BEAT = 5.0  # seconds between heartbeats
LOOK = 0.5  # seconds between looks at another process's claim
LOOKS = 60  # unchanged looks after which a holder on another machine counts as dead: 30 s
SIZE = 512  # bytes of every claim: a heartbeat overwrites the one before and needs no space, so a full disk allows it
BOOT = Path("/proc/sys/kernel/random/boot_id")


class FolderTaken(UserError):
    """A living process trains in the folder."""


class ClaimLost(TrajectoryFailed):
    """The folder is another process's now, or gone: this process must not write there any more."""


@dataclass(frozen=True)
class Sighting:
    """What one look at a folder shows of its claim."""

    number: int  # 0 = nobody has ever claimed it
    locked: bool | None = False  # None = the file system cannot say
    content: bytes = b""
    modified: float = 0.0  # seconds, by the file system's clock

    @property
    def account(self) -> dict[str, Any]:
        """What the holder wrote; empty where it has not come to that yet."""
        try:
            return json.loads(self.content)
        except ValueError:
            return {}

    @property
    def free(self) -> bool | None:
        """Whether the folder may be taken; None where one look cannot tell."""
        account = self.account
        if self.number == 0 or account.get("released"):
            return True
        if self.locked:
            return False
        same_boot = account.get("boot") is not None and account["boot"] == boot_id()
        return True if same_boot and self.locked is False else None  # a lock that cannot be asked for tells nothing

    @property
    def holder(self) -> str:
        account = self.account
        return f"process {account['pid']} on {account['host']}" if account else "a process that is just beginning"


def boot_id() -> str | None:
    """What tells this boot of this machine from any other; None where the system has no such thing."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return None


def claim_path(folder: Path, number: int) -> Path:
    return folder / f".claim-{number:06d}"


def claim_numbers(folder: Path) -> list[int]:
    """Of all claims in the folder, ascending."""
    try:
        found = [re.fullmatch(r"\.claim-(\d{6,})", name) for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for match in found if match)


def newest_number(folder: Path) -> int:
    return max(claim_numbers(folder), default=0)


def look(folder: Path) -> Sighting:
    number = newest_number(folder)
    try:
        with claim_path(folder, number).open("rb") as file:
            locked = None
            with suppress(OSError):  # a file system without locks
                locked = _is_locked(file.fileno())
            return Sighting(number, locked, file.read(), os.fstat(file.fileno()).st_mtime)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # no claim, or overtaken since it was listed
            raise
        return Sighting(number)


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def holding_host(folder: Path) -> str | None:
    """The host whose process trains in the folder, as far as one look can tell; None where none does.

    A claim of another machine is judged by its file's age, on the file system's clock.
    """
    seen = look(folder)
    alive = not seen.free if seen.free is not None else abs(_present(folder) - seen.modified) < LOOK * LOOKS
    return seen.account.get("host", "?") if alive else None


def _present(folder: Path) -> float:
    """What time it is on the folder's file system, or by this machine's clock where the folder is read-only."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


class Claim:
    """A claim that this process holds; `take_claim` makes one."""

    def __init__(self, folder: Path, number: int, descriptor: int) -> None:
        self.folder, self.number, self._descriptor = folder, number, descriptor
        try:  # no looker keeps its lock for longer than a look, so this waits for a moment at most
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            boot = boot_id()
        except OSError:
            boot = None  # without a lock, nobody may conclude from its absence that this process is gone
        self._account = {"host": socket.gethostname(), "pid": os.getpid(), "boot": boot, "beat": 0, "released": False}
        self._write()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def _write(self) -> None:
        os.pwrite(self._descriptor, json.dumps(self._account).ljust(SIZE).encode(), 0)
        os.fsync(self._descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self._account["beat"] += 1
            with suppress(OSError):  # a file server that is away for a while
                self._write()

    @property
    def lost(self) -> bool:
        return newest_number(self.folder) != self.number

    def check(self) -> None:
        """Call it before anything is written that another process could be writing too.

        Raises:
            ClaimLost: this process no longer holds the folder.
        """
        if self.lost:
            seen = look(self.folder)
            what = f"{seen.holder} has taken over {self.folder}" if seen.number else f"{self.folder} was removed"
            raise ClaimLost(f"{what} while this process was suspended or cut off; what is on disk is left as it is")

    def release(self) -> None:
        self._ended.set()
        self._heart.join()
        self._account["released"] = True
        with suppress(OSError):  # then the lock, or silence, tells the next process
            self._write()
        os.close(self._descriptor)


def take_claim(folder: Path) -> Claim:
    """Takes the folder over, unless a living process trains in it.

    Where only time can tell whether the holder lives, it is watched for up to `LOOK` x `LOOKS` seconds.

    Raises:
        FolderTaken: a living process holds it.
        OSError: the folder cannot be written.
    """
    before, unchanged = Sighting(0), 0
    while True:
        seen = look(folder)
        same = seen.number == before.number
        beats = same and seen.content != before.content
        unchanged = unchanged + 1 if same else 0
        if seen.free or (seen.free is None and unchanged >= LOOKS):
            if claim := _create(folder, seen.number + 1):
                return claim
        elif seen.free is False or beats:
            raise FolderTaken(f"another process is training {folder} ({seen.holder}): wait for it or stop it")
        elif not same:
            print(f"{folder} is claimed by {seen.holder}: watching whether that still lives", file=sys.stderr)
        before = seen
        time.sleep(LOOK)


def _create(folder: Path, number: int) -> Claim | None:
    """The claim of that number, and the end of those before it; None where another process was quicker."""
    try:
        descriptor = os.open(claim_path(folder, number), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    try:
        claim = Claim(folder, number, descriptor)
    except OSError:  # a full disk: as if it had never been made
        claim_path(folder, number).unlink(missing_ok=True)
        os.close(descriptor)
        raise
    if claim.lost:  # the number was free only because it is old: its file was deleted since the look
        claim.release()
        return None
    for older in claim_numbers(folder)[:-1]:
        claim_path(folder, older).unlink(missing_ok=True)
    return claim
