"""Where the ranks of a model find each other: the variables that torchrun sets, or those of a
Kubernetes LeaderWorkerSet in their place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from services.engine.core.errors import StartupError

LOOPBACK = "127.0.0.1"
_TOKEN = "MESHSERVE_RANKS_TOKEN"


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where rank 0 listens.

    Attributes:
        address, port: of rank 0; port 0 on rank 0 itself is any that is free.
        local_ranks: how many ranks there are on each machine.
        token: what a rank says to be let in.
    """

    address: str
    port: int
    local_ranks: int
    token: str

    @classmethod
    def of_leader(
        cls, num_ranks: int, token: str, environment: Mapping[str, str] = os.environ
    ) -> Meeting:
        """Where rank 0 is to listen: on this machine alone, unless there are others.

        Raises:
            StartupError: the variables contradict the number of ranks.
        """
        local_ranks = _integer(environment, "LOCAL_WORLD_SIZE", num_ranks)
        if not 1 <= local_ranks <= num_ranks or num_ranks % local_ranks:
            raise StartupError(
                f"LOCAL_WORLD_SIZE is {local_ranks}: machines cannot have so many each of "
                f"{num_ranks} ranks"
            )
        if local_ranks == num_ranks:
            return cls(LOOPBACK, 0, num_ranks, token)
        address = _first(environment, "MASTER_ADDR", "LWS_LEADER_ADDRESS")
        if not (address and "MASTER_PORT" in environment):
            raise StartupError(
                f"there are {num_ranks} ranks, of which {local_ranks} are on this machine: set "
                "MASTER_ADDR and MASTER_PORT to where the others reach it"
            )
        port = _integer(environment, "MASTER_PORT", 0)
        return cls(address, port, local_ranks, environment.get(_TOKEN, ""))

    @classmethod
    def of_worker(cls, environment: Mapping[str, str] = os.environ) -> Meeting:
        """Where another rank finds rank 0; raises StartupError where it is not told."""
        address = _first(environment, "MASTER_ADDR", "LWS_LEADER_ADDRESS")
        missing = [] if address else ["MASTER_ADDR"]
        missing += [each for each in ("MASTER_PORT", "LOCAL_WORLD_SIZE") if each not in environment]
        if missing:
            raise StartupError(f"{', '.join(missing)} must be set, as on the machine of rank 0")
        return cls(
            address,
            _integer(environment, "MASTER_PORT", 0),
            _integer(environment, "LOCAL_WORLD_SIZE", 1),
            environment.get(_TOKEN, ""),
        )

    @property
    def was_started_by_leader(self) -> bool:
        """Whether this rank is a child of rank 0, and ends with it."""
        return bool(self.token)

    def variables(self, rank: int) -> dict[str, str]:
        """What a rank of this machine is to find in its environment."""
        return {
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % self.local_ranks),
            "LOCAL_WORLD_SIZE": str(self.local_ranks),
            _TOKEN: self.token,
        }


def rank_of_worker(environment: Mapping[str, str] = os.environ) -> int:
    """The rank of this process; raises StartupError where there is none."""
    if "RANK" not in environment:
        raise StartupError("RANK must be set: it comes from torchrun, or from whoever starts ranks")
    return _integer(environment, "RANK", 0)


def ranks_of_machine(meeting: Meeting, environment: Mapping[str, str] = os.environ) -> range:
    """The ranks of this machine, by its number; raises StartupError where it has none."""
    number = _first(environment, "GROUP_RANK", "LWS_WORKER_INDEX")
    if not number:
        raise StartupError(
            "GROUP_RANK must be set: the number of this machine, from 0 for rank 0's"
        )
    first = _integer({"GROUP_RANK": number}, "GROUP_RANK", 0) * meeting.local_ranks
    return range(first, first + meeting.local_ranks)


def _first(environment: Mapping[str, str], *names: str) -> str:
    return next((environment[name] for name in names if environment.get(name)), "")


def _integer(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "")
    try:
        return int(value) if value else default
    except ValueError:
        raise StartupError(f"{name} is {value!r}, and should be a number") from None
