"""Several processes that train as one: how they find each other, what they tell each other, and how they end together.

Enters: the section `distributed`, or what the cluster says (JAX's own detection). Leaves: `jax.distributed` initialised, and a few
    exchanges between host programs. Every process runs the same host program (SPMD) and has to reach every exchange; process 0
    alone writes and talks. Arrays on devices are `sharding.py`'s. With one process nothing here does anything.

A process that dies: on CPUs and GPUs the others' collectives fail at once, or hang; in either case JAX's coordination service, on
process 0, misses its heartbeat and ends all others with an abort that names it. `joined` makes sure that a process that fails for
a reason of its own ends at once too, rather than wait at JAX's shutdown barrier for others that wait for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

from grpo_jax.config import ConfigError, DistributedConfig

GRACE_SECONDS = 3.0
"""Process 0 ends this much later than the others where all have the same error: its end cuts theirs short."""

SMALLEST_MESSAGE = 1024
"""Bytes. Messages are padded to powers of two from here on, so that few sizes are compiled."""

PEER_SIGNS = ("gloo", "nccl", "by peer", "heartbeat", "coordination service", "unavailable", "deadline_exceeded", "barrier")
"""Words of an error that another process's end leaves in this one."""

Describe = Callable[[BaseException], tuple[str, int]]
"""An error → what to say of it, and the exit status."""


def start(settings: DistributedConfig) -> bool:
    """Joins the other processes of the run; to be called before anything that asks JAX for devices.

    Where nothing is given and no cluster is found, and where this was done before, nothing happens.

    Returns:
        Whether there are others.

    Raises:
        ConfigError: the cluster does not say enough.
    """
    cluster = detected(os.environ) if settings.detect and not settings.explicit else None
    if jax.distributed.is_initialized() or (not settings.explicit and cluster is None):
        return several()
    place = settings.coordinator_address or f"the address that {cluster} gives"
    print(f"waiting up to {settings.initialization_timeout_seconds} s for all processes at {place}", file=sys.stderr, flush=True)
    # With it SIGTERM would be caught and a cluster's polite stop would go unheard.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address=settings.coordinator_address,
            num_processes=settings.num_processes,
            process_id=settings.process_id,
            local_device_ids=settings.local_device_ids,
            # A cluster would else give a process that is started by hand one device of its host.
            cluster_detection_method="deactivate" if settings.explicit else None,
            initialization_timeout=settings.initialization_timeout_seconds,
            heartbeat_timeout_seconds=settings.heartbeat_timeout_seconds,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"distributed.detect: true; {cluster or 'JAX'} was found, and joining its processes failed ({error}). Give "
            "distributed.coordinator_address, num_processes and process_id, or set distributed.detect to false to train alone"
        ) from error
    # Makes the devices known now, when all processes are here: this waits for them too.
    own, count = jax.process_index(), jax.process_count()
    print(
        f"process {own} of {count} ({cluster or 'as given'}): {jax.local_device_count()} of {jax.device_count()} devices; "
        f"one that is not heard of for {settings.heartbeat_timeout_seconds} s ends the others",
        file=sys.stderr,
        flush=True,
    )
    return count > 1


def detected(environment: Mapping[str, str]) -> str | None:
    """The cluster that started this process as one of several, by the variables that it sets; None where it did not.

    JAX looks again, and finds the same; this only says whether to ask it, as it has no answer for a lone process.
    """
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and all(name in environment for name in slurm):
        return "SLURM"
    slices, hosts = environment.get("MEGASCALE_NUM_SLICES", "1"), environment.get("TPU_WORKER_HOSTNAMES", "")
    if int(slices or 1) > 1 or "," in hosts:
        return "Cloud TPU on Kubernetes"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return "Cloud TPU" if on_tpu_machine(environment) and not hosts else None


def on_tpu_machine(environment: Mapping[str, str]) -> bool:
    """Whether TPUs are attached and will be used; whether there are other hosts, the cloud's metadata server knows."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if "TPU_SKIP_MDS_QUERY" in environment or (platforms and "tpu" not in platforms):
        return False
    return importlib.util.find_spec("libtpu") is not None and any(Path("/dev").glob("accel[0-9]*"))


@contextlib.contextmanager
def joined(settings: DistributedConfig, describe: Describe) -> Iterator[None]:
    """`start`; and where the block fails in one of several processes, says why and ends this one at once, so that all end.

    The process's exit handlers do not run then: at JAX's, it would wait for the others.

    Args:
        describe: of an error that ends the process.

    Example:
        with joined(config.distributed, lambda error: (repr(error), 1)):
            train(config)
    """
    start(settings)
    try:
        yield
    except BaseException as error:
        if not several():
            raise
        text, status = describe(error)
        if is_lost_peer(error):
            text = (
                "error: another process of this run has ended, or cannot be reached: its log says why. What was saved last is "
                f"kept; start all processes again, with --resume\n       ({str(error).splitlines()[0]})"
            )
        print(f"process {jax.process_index()} of {jax.process_count()} ends:\n{text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if is_main() and not is_lost_peer(error):
            time.sleep(GRACE_SECONDS)
        os._exit(status or 1)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error looks like the end of another process."""
    said = str(error).lower()
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in said for sign in PEER_SIGNS)


def several() -> bool:
    """Whether there is more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Whether this is the process that writes and talks."""
    return not several() or jax.process_index() == 0


def own_block(count: int) -> tuple[list[int], slice]:
    """Shares `count` things out: how many each process has, and which are this one's. Contiguous, and in the processes' order."""
    processes, own = (jax.process_count(), jax.process_index()) if several() else (1, 0)
    sizes = [(count * (i + 1)) // processes - (count * i) // processes for i in range(processes)]
    first = sum(sizes[:own])
    return sizes, slice(first, first + sizes[own])


def gather_rows(own: Float[np.ndarray, "n K"], sizes: list[int]) -> Float[np.ndarray, "N K"]:
    """Rows of all processes, in order, in every process. A column of ones marks the rows that are no padding.

    Args:
        own: this process's rows; NaN is kept.
        sizes: rows of each process.
    """
    if not several():
        return own
    padded = np.zeros((max(sizes), own.shape[1] + 1), np.float32)
    padded[: len(own), :-1], padded[: len(own), -1] = own, 1
    blocks = multihost_utils.process_allgather(padded)
    table = blocks.reshape(-1, padded.shape[1])
    rows = table[table[:, -1] == 1, :-1]
    if len(rows) != sum(sizes):
        raise ValueError(f"{len(rows)} rows came together instead of {sum(sizes)}: the processes do not run the same program")
    return rows


def gather_values(own: Any) -> list[Any]:
    """A value of every process, in their order, in every process.

    Args:
        own: what JSON can hold; tuples come back as lists.
    """
    if not several():
        return [json.loads(json.dumps(own))]
    message = np.frombuffer(json.dumps(own).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(message)], np.int32)).reshape(-1)
    size = SMALLEST_MESSAGE
    while size < lengths.max():
        size *= 2
    padded = np.zeros(size, np.uint8)
    padded[: len(message)] = message
    messages = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(one[:length])) for one, length in zip(messages, lengths, strict=True)]


def from_main(own: Any) -> Any:
    """Process 0's value, in every process: for what is read from files, which processes may see differently for a moment."""
    return gather_values(own if is_main() else None)[0]


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if several():
        multihost_utils.sync_global_devices(name)


def check_shared(folder: Path) -> None:
    """Whether all processes see the folder that process 0 writes to.

    Raises:
        ConfigError: one does not.
    """
    if not several():
        return
    mark = folder / ".seen-by-all"
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    barrier("run folder made")
    blind = [number for number, sees in enumerate(gather_values(mark.exists())) if not sees]
    if is_main():
        mark.unlink()
    if blind:
        raise ConfigError(
            f"train.run_dir: {str(folder)!r} is not there for process {', '.join(map(str, blind))}, though process 0 has made it; "
            "use a folder on storage that all hosts share"
        )
