"""Measures which share of a save its digests take: `python tests/tools/digest_share.py FOLDER [--megabytes 100] [--rounds 6]`.

Saves the same arrays alternately as now and with all files hashed at the end, and prints shares and seconds of each save.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from grpo_jax.run import checkpoint
from grpo_jax.run.checkpoint import Checkpointer

ARRAYS = 42


def main() -> None:
    """Prints one line for each way of hashing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="written to and removed")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    size = int(arguments.megabytes * 1e6 / 4 / ARRAYS)
    state = {f"x{i}": jax.random.normal(jax.random.key(i), (size,)) for i in range(ARRAYS)}
    jax.block_until_ready(state)
    now: dict[str, Any] = {"data_files": checkpoint.data_files, "data_file_bytes": checkpoint.data_file_bytes}
    ways = {"all at the end": {"data_files": lambda *_: [], "data_file_bytes": lambda _: 2**31}, "now": now}
    spent, write = [], Checkpointer._write_digests

    def timed(self: Checkpointer) -> None:
        started = time.perf_counter()
        write(self)  # waits for the file that is being hashed, hashes the others, and writes the list
        spent.append(time.perf_counter() - started)

    Checkpointer._write_digests = timed
    results: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(arguments.rounds + 1):
        for way, functions in ways.items():
            for name, function in functions.items():
                setattr(checkpoint, name, function)
            shutil.rmtree(arguments.folder, ignore_errors=True)
            with Checkpointer(arguments.folder, keep=1) as checkpoints:
                started = time.perf_counter()
                checkpoints.save(1, state, {}, wait=True)
                seconds = time.perf_counter() - started
            if number:  # the first save of a process takes longer
                results[way].append((spent[-1] / seconds, seconds))
    shutil.rmtree(arguments.folder, ignore_errors=True)
    for way, pairs in results.items():
        shares, seconds = zip(*pairs, strict=True)
        listed = "  ".join(f"{share:.1%} of {second:.2f} s" for share, second in pairs)
        print(f"{way}: median {statistics.median(shares):.1%} of {statistics.median(seconds):.2f} s  ({listed})")


if __name__ == "__main__":
    main()
