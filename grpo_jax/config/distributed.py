"""The settings section `distributed`: how the processes of one run find each other."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_jax.config.checks import check_types, require


@dataclass(frozen=True)
class DistributedConfig:
    """Joins several processes to one run, usually one per host. With the defaults JAX asks the cluster that it runs in.

    Args:
        detect: Look for a cluster (SLURM, Open MPI, Kubernetes, Cloud TPU) and join its processes; false trains alone, unless the
            three settings below are given.
        coordinator_address: HOST:PORT of process 0, the same for all processes; set num_processes and process_id too.
        num_processes: Number of processes.
        process_id: Number of this process, from 0.
        local_device_ids: Devices of this host that this process uses; null takes what the cluster says, or all of them.
        heartbeat_timeout_seconds: A process without a sign of life for this long counts as dead, and all others end.
        initialization_timeout_seconds: How long the processes wait for each other at the start.
    """

    detect: bool = True
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: list[int] | None = None
    heartbeat_timeout_seconds: int = 30
    initialization_timeout_seconds: int = 300

    def __post_init__(self) -> None:
        check_types(self, "distributed")
        given = {
            "coordinator_address": self.coordinator_address,
            "num_processes": self.num_processes,
            "process_id": self.process_id,
        }
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            require(False, f"distributed.{missing[0]}", None, f"give all of {', '.join(given)}, or none of them")
        if self.coordinator_address is not None:
            port = self.coordinator_address.rpartition(":")[2]
            proper = ":" in self.coordinator_address and port.isdigit() and 0 < int(port) < 2**16
            require(proper, "distributed.coordinator_address", self.coordinator_address, "write HOST:PORT, such as 10.0.0.1:8476")
        if self.num_processes is not None and self.process_id is not None:
            require(self.num_processes >= 1, "distributed.num_processes", self.num_processes, "use at least 1")
            last = self.num_processes - 1
            require(0 <= self.process_id <= last, "distributed.process_id", self.process_id, f"use 0 to num_processes - 1 ({last})")
        for name in ("heartbeat_timeout_seconds", "initialization_timeout_seconds"):
            seconds = self.__dict__[name]
            require(seconds >= 5, f"distributed.{name}", seconds, "use at least 5 seconds")
        ids = self.local_device_ids
        require(
            ids is None or (bool(ids) and min(ids) >= 0), "distributed.local_device_ids", ids, "name devices from 0, or use null"
        )

    @property
    def explicit(self) -> bool:
        """Whether the processes are named in the settings instead of by a cluster."""
        return self.coordinator_address is not None
