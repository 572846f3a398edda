"""Joins several processes to one run, exchanges host values between them, and ends them together.

Every process runs the same host program (SPMD) and must call every exchange; process 0 alone writes files and prints. `sharding.py`
handles arrays on devices. With one process, nothing here does anything.

When a process dies, the others' collectives fail at once or hang, on CPUs and GPUs. `peers.py` finds out which process it was and
ends the others with its number and host; where the process takes JAX's coordination service with it, JAX ends them at once, and
`witness.py` names it. A process that fails with an error of its own would wait at JAX's shutdown barrier for the others, which wait
for it; `joined_processes` makes it end at once.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from os import _exit  # a reward that runs in this process cannot take it away
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

from grpo_jax.config import ConfigError, DistributedConfig
from grpo_jax.runtime.peers import Peers, first_line
from grpo_jax.runtime.witness import Witness

GRACE_SECONDS = 3.0
"""Delay of process 0's end: where all processes have the same error, its end would interrupt their messages."""

JAX_LATER_SECONDS = 9
"""JAX's own heartbeat ends the processes, without a host's name, at least this much later than `peers.py`. It expects a beat in
every half of its timeout, so that it may find a process dead that much earlier."""

SMALLEST_MESSAGE_BYTES = 1024
"""Messages are padded to powers of two from this size on, so that few sizes are compiled."""

LOST_PEER_WORDS = ("gloo", "nccl", "by peer", "heartbeat", "coordination service", "unavailable", "deadline_exceeded", "barrier")
"""Words in the errors that this process gets when another one has ended."""

Describe = Callable[[BaseException], tuple[str, int]]
"""Maps an error to the message to print and the exit status."""

PEERS: list[Peers] = []
"""The other processes; empty where there are none, and after this one has said that it ends."""

WITNESS: list[Witness] = []
"""Tells why this process ended where JAX ends it; empty in process 0 and where there are no others."""

LAST_CHECKPOINT = "The last checkpoint is kept; start all processes again, with --resume"


def start(settings: DistributedConfig) -> bool:
    """Initialises `jax.distributed`, as the settings or the cluster say; call it before anything that asks JAX for devices.

    Nothing happens where no processes are given and no cluster is found, or where this was done before.

    Returns:
        Whether the run has more than one process.

    Raises:
        ConfigError: A cluster was found, but joining its processes failed.
    """
    cluster = detected_cluster(os.environ) if settings.detect and not settings.explicit else None
    if jax.distributed.is_initialized() or (not settings.explicit and cluster is None):
        return is_multiprocess()
    address = settings.coordinator_address or f"the address that {cluster} gives"
    print(f"waiting up to {settings.initialization_timeout_seconds} s for all processes at {address}", file=sys.stderr, flush=True)
    # The preemption service would catch SIGTERM, and a cluster's request to stop would have no effect.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address=settings.coordinator_address,
            num_processes=settings.num_processes,
            process_id=settings.process_id,
            local_device_ids=settings.local_device_ids,
            # A detected cluster would give a process that is started by hand only one device of its host.
            cluster_detection_method="deactivate" if settings.explicit else None,
            initialization_timeout=settings.initialization_timeout_seconds,
            heartbeat_timeout_seconds=2 * (settings.heartbeat_timeout_seconds + JAX_LATER_SECONDS),
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"distributed.detect: true; {cluster or 'JAX'} was found, and joining its processes failed ({error}). Give "
            "distributed.coordinator_address, num_processes and process_id, or set distributed.detect to false to train alone"
        ) from error
    # Asking for the process count initialises the devices, which waits for all processes; do it while all are present.
    own, count = jax.process_index(), jax.process_count()
    hosts = gather_values(socket.gethostname())
    if count > 1:
        watch_peers(float(settings.heartbeat_timeout_seconds), hosts[0])
    print(
        f"process {own} of {count} on {hosts[own]} ({cluster or 'as given'}): {jax.local_device_count()} of {jax.device_count()} "
        f"devices; a process without a sign of life for {settings.heartbeat_timeout_seconds} s ends the others",
        file=sys.stderr,
        flush=True,
    )
    return count > 1


def watch_peers(timeout_seconds: float, first_host: str) -> None:
    """Watches the other processes from now on, until this one ends; process 0 is on `first_host`."""
    from jax._src.distributed import global_state  # the only way to the store

    assert global_state.client is not None
    peers = Peers(global_state.client, jax.process_index(), jax.process_count(), timeout_seconds, end_for_lost_peer)
    PEERS[:] = [peers]
    if jax.process_index() != 0 and global_state.coordinator_address is not None:
        own, count = jax.process_index(), jax.process_count()
        address = global_state.coordinator_address
        line = (
            f"process {own} of {count} was ended by JAX:\nerror: process 0 of {count} on {first_host} has ended, or cannot be "
            f"reached at {address}; its log may say why. {LAST_CHECKPOINT}"
        )
        WITNESS[:] = [Witness(address, line)]
    atexit.register(leave_peers)
    peers.start()


def leave_peers() -> None:
    """Tells the other processes that this one ends in good order."""
    for peers in PEERS:
        peers.stop()
    PEERS.clear()
    leave_witness()


def leave_witness() -> None:
    """Tells the witness that this process ends in good order, or has said why it ends."""
    for witness in WITNESS:
        witness.leave()
    WITNESS.clear()


def end_for_lost_peer(line: str) -> None:
    """Ends this process because another one is dead; any thread may call it."""
    print_end(f"error: {line}. {LAST_CHECKPOINT}")
    leave_witness()
    _exit(1)


def print_end(text: str) -> None:
    """Prints why this process ends."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads
        print(f"process {jax.process_index()} of {jax.process_count()} ends:\n{text}", file=sys.stderr, flush=True)
        sys.stdout.flush()


def detected_cluster(environment: Mapping[str, str]) -> str | None:
    """Names the cluster that started this process as one of several, from its environment variables; None for a single process.

    JAX repeats the detection; this only decides whether to ask it, because it raises an error for a single process.
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
    """Whether TPUs are attached and will be used; the cloud's metadata server then knows whether there are other hosts."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if "TPU_SKIP_MDS_QUERY" in environment or (platforms and "tpu" not in platforms):
        return False
    return importlib.util.find_spec("libtpu") is not None and any(Path("/dev").glob("accel[0-9]*"))


@contextlib.contextmanager
def joined_processes(settings: DistributedConfig, describe: Describe) -> Iterator[None]:
    """Calls `start`; if the block fails in one of several processes, prints the error and ends this process, so that all end.

    The process then skips its exit handlers, because JAX's would wait for the other processes.

    Args:
        settings: The settings of the section `distributed`.
        describe: Maps the error to a message and an exit status.

    Example:
        with joined_processes(config.distributed, lambda error: (repr(error), 1)):
            train(config)
    """
    start(settings)
    try:
        yield
    except BaseException as error:
        if not is_multiprocess():
            raise
        text, status = describe(error)
        if is_lost_peer(error):
            for peers in PEERS:
                lost = peers.find_lost(float(settings.heartbeat_timeout_seconds))
                text = peers.lost_line(lost) if lost else "another process of this run has ended, or cannot be reached"
                end_for_lost_peer(f"{text} ({first_line(error)})")
        print_end(text)
        if is_main():
            time.sleep(GRACE_SECONDS)
        leave_witness()
        _exit(status or 1)
    leave_peers()


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error was probably caused by the end of another process."""
    # A compiled function may raise its status, such as "UNKNOWN: Gloo AllGather failed", as a ValueError.
    status = isinstance(error, ValueError) and re.match("[A-Z_]+: ", str(error)) is not None
    found = status or isinstance(error, jax.errors.JaxRuntimeError)
    return found and any(word in str(error).lower() for word in LOST_PEER_WORDS)


def is_multiprocess() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return not is_multiprocess() or jax.process_index() == 0


def own_block(count: int) -> tuple[list[int], slice]:
    """Splits `count` items into contiguous blocks, in the order of the processes.

    Returns:
        The block size of each process, and the slice of this process.
    """
    processes, own = (jax.process_count(), jax.process_index()) if is_multiprocess() else (1, 0)
    sizes = [(count * (i + 1)) // processes - (count * i) // processes for i in range(processes)]
    first = sum(sizes[:own])
    return sizes, slice(first, first + sizes[own])


def gather_rows(own: Float[np.ndarray, "n K"], sizes: list[int]) -> Float[np.ndarray, "N K"]:
    """Gathers the rows of all processes, in order, into every process.

    Args:
        own: This process's rows, float32; NaN is allowed.
        sizes: Number of rows of each process.

    Returns:
        The N = sum(sizes) rows.
    """
    if not is_multiprocess():
        return own
    # A column of ones marks the rows that are not padding.
    padded = np.zeros((max(sizes), own.shape[1] + 1), np.float32)
    padded[: len(own), :-1], padded[: len(own), -1] = own, 1
    with exchange():
        blocks = multihost_utils.process_allgather(padded)
    table = blocks.reshape(-1, padded.shape[1])
    rows = table[table[:, -1] == 1, :-1]
    if len(rows) != sum(sizes):
        raise ValueError(f"gathered {len(rows)} rows instead of {sum(sizes)}: the processes do not run the same program")
    return rows


def gather_values(own: Any) -> list[Any]:
    """Gathers one value from every process, in their order, into every process.

    Args:
        own: This process's value, which JSON must be able to hold; tuples come back as lists.
    """
    if not is_multiprocess():
        return [json.loads(json.dumps(own))]
    message = np.frombuffer(json.dumps(own).encode(), np.uint8)
    with exchange():
        lengths = multihost_utils.process_allgather(np.array([len(message)], np.int32)).reshape(-1)
        size = SMALLEST_MESSAGE_BYTES
        while size < lengths.max():
            size *= 2
        padded = np.zeros(size, np.uint8)
        padded[: len(message)] = message
        messages = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(one[:length])) for one, length in zip(messages, lengths, strict=True)]


def broadcast_from_main(own: Any) -> Any:
    """Returns process 0's value in every process: for data read from files, which processes may see differently for a moment."""
    return gather_values(own if is_main() else None)[0]


def barrier(name: str) -> None:
    """Waits until every process has called this."""
    if is_multiprocess():
        with exchange():
            multihost_utils.sync_global_devices(name)


def exchange() -> contextlib.AbstractContextManager[None]:
    """Surrounds what waits for all processes."""
    return PEERS[0].exchange() if PEERS else contextlib.nullcontext()


def check_shared(folder: Path) -> None:
    """Checks that all processes see the folder that process 0 writes to.

    Raises:
        ConfigError: A process does not see it.
    """
    if not is_multiprocess():
        return
    marker = folder / ".seen-by-all"
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    barrier("run folder made")
    blind = [number for number, sees in enumerate(gather_values(marker.exists())) if not sees]
    if is_main():
        marker.unlink()
    if blind:
        raise ConfigError(
            f"train.run_dir: {str(folder)!r} is missing for process {', '.join(map(str, blind))}, though process 0 has made it; "
            "use a folder on storage that all hosts share"
        )
