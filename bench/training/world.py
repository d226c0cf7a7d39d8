"""The processes that train one trajectory together, and what they tell each other.

torchrun says in the environment which of them this one is; under `srun` with several tasks, SLURM does. Where neither
does, a process is alone, and everything here is free.
"""

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bench.errors import UserError

Result = TypeVar("Result")

# As long as the others may have to wait for the first, which may prepare data. What dies is noticed at once by who
# started the processes: torchrun, a job's own workers, or `srun --kill-on-bad-exit=1`.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class World:
    """This process among those that train a trajectory together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those on this machine
    machines: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes the run's files."""
        return self.rank == 0

    def first(self, work: Callable[[], Result]) -> Result:
        """Does `work` in the first process alone; every process gets what it returns or raises (both are pickled)."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None]
        if self.leads:
            try:
                outcome = [(work(), None)]
            except Exception as error:
                outcome = [(None, error)]
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes; `value` itself is overwritten."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether any process raises it."""
        if self.size == 1:
            return flags
        return tuple(count > 0 for count in self.total(torch.tensor(flags, dtype=torch.int32)).tolist())

    def concatenate(self, part: Tensor) -> Tensor:
        """The parts of all processes, which have one shape and lie on the CPU, along the first dimension."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def merge(self, part: dict[str, Any]) -> dict[str, Any]:
        """The entries of all processes."""
        if self.size == 1:
            return part
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, part)
        return {key: value for part in parts for key, value in part.items()}


ALONE = World()


def find_world(environment: Mapping[str, str] = os.environ) -> World:
    """Where the environment places this process: by torchrun, by srun, or alone.

    Raises:
        UserError: it says something that nobody can mean.
    """

    def number(name: str, default: int = 0) -> int:
        return _number(environment, name, default)

    if (size := number("WORLD_SIZE", 1)) > 1:
        if "MASTER_ADDR" not in environment:
            raise UserError(f"WORLD_SIZE={size}, but MASTER_ADDR is not set: start it with torchrun, or unset both")
        return World(number("RANK"), size, number("LOCAL_RANK"), -(-size // number("LOCAL_WORLD_SIZE", size)))
    if (tasks := tasks_of_step(environment)) > 1:
        return World(number("SLURM_PROCID"), tasks, number("SLURM_LOCALID"), number("SLURM_STEP_NUM_NODES", 1))
    return ALONE


def tasks_of_step(environment: Mapping[str, str] = os.environ) -> int:
    """How many tasks `srun` started together with this one; 1 outside `srun`, and in the script of a batch job."""
    return _number(environment, "SLURM_STEP_NUM_TASKS", 1)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"the environment's {name}={text} is no number: unset it")
    return int(text)


def step_address(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port where the tasks of a SLURM step meet: the same in all of them, different for every step.

    Raises:
        UserError: SLURM does not say which hosts the step has.
    """
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    try:
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        host = hosts.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(f"cannot find the first host of this SLURM step in {nodes!r}: use torchrun instead") from None
    step = 1009 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return host, 20000 + step % 20000


@contextmanager
def joined(world: World) -> Iterator[None]:
    """Connects this process with the others of its world: NCCL for what lies on GPUs, gloo for the rest."""
    if world.size == 1:
        yield
        return
    if "MASTER_ADDR" in os.environ:
        address = "env://"
    else:
        host, port = step_address()
        address = f"tcp://{host}:{port}"
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=address, rank=world.rank, world_size=world.size, timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # not after an error: it may wait for processes that are gone
