"""The rank of this process among those that torchrun started. A process on its own is rank 0 of 1."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from headinfer.errors import UsageError

__all__ = ["Ranks"]


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and the number of processes.

    Attributes:
        rank: the rank among all processes, from 0.
        world: number of processes on all hosts.
        local_rank: the rank among the processes on this host, from 0.
        local_world: number of processes on this host.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """Read the environment variables that torchrun sets: RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

        Args:
            environment: the environment variables.

        Raises:
            UsageError: WORLD_SIZE names several processes, and another variable is missing or is not a number.
        """
        if environment.get("WORLD_SIZE", "1") == "1":
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in environment]
        numbers = [environment.get(name, "") for name in names[:4]]
        if missing or not all(number.isdecimal() for number in numbers):
            raise UsageError(
                f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {missing[0] if missing else 'a rank'} is not set as "
                "torchrun sets it: start with `torchrun --nproc-per-node N -m headinfer ...`, or unset WORLD_SIZE"
            )
        return cls(*map(int, numbers))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the output of all ranks."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"
