"""Measures loading onto eight CPU devices. A separate program: JAX creates devices once per process.

`python tests/support/sharded_loading.py large FOLDER` prints anonymous memory and bytes read during one loading.
`python tests/support/sharded_loading.py small FOLDER...` prints, per folder, mesh and format, the parameters that differ from one
device's. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from grpo_jax.config import MeshConfig
from grpo_jax.models.families import read_spec
from grpo_jax.models.parameters import param_specs
from grpo_jax.runtime.memory import proc_bytes
from grpo_jax.runtime.mesh import make_layout
from grpo_jax.runtime.sharding import Layout
from grpo_jax.weights.axes import model_axes
from grpo_jax.weights.hf import INDEX, TensorFiles, read_folder_spec, tensor_names
from grpo_jax.weights.loading import load_params

MESHES = {"1x8x1": MeshConfig(1, 8, 1), "2x2x2": MeshConfig(2, 2, 2), "1x1x4": MeshConfig(1, 1, 4), "8x1x1": MeshConfig(8, 1, 1)}
CASES = {
    "dense": (("2x2x2", "none"), ("1x1x4", "none"), ("1x8x1", "int4")),
    "experts": (("1x8x1", "none"), ("2x2x2", "int8"), ("2x2x2", "nf4")),
}
"""Meshes and formats, by the folder's name."""


def random_folder(folder: Path, config: dict[str, Any], shard_bytes: float, dtype: Any = np.float32) -> int:
    """Writes a model of random weights in several files with an index; returns the bytes of the largest file."""
    spec = read_spec(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    numbers, specs = np.random.default_rng(0), param_specs(spec)
    shapes = {}
    for path, source in tensor_names(spec).items():
        inner = specs[path].shape[len(source.stack) :]
        shapes |= dict.fromkeys(source.names, inner[::-1] if source.transposed else inner)
    files: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    count, largest = 0, 0

    def write() -> None:
        nonlocal count, largest
        count += 1
        name = f"model-{count:05d}.safetensors"
        save_file(shard, folder / name)
        largest = max(largest, sum(tensor.nbytes for tensor in shard.values()))
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    # Layer by layer, as in checkpoints.
    for name in sorted(shapes, key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")[2:3]]):
        tensor = numbers.standard_normal(shapes[name], np.float32).astype(dtype)
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            write()
        shard[name] = tensor
    write()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return largest


def anonymous() -> int:
    """Bytes of this process's memory that are not mapped from files."""
    size = proc_bytes("/proc/self/status", "RssAnon:")
    assert size is not None
    return size


@contextmanager
def peak_of() -> Iterator[Callable[[], int]]:
    """Peak of anonymous memory while the block runs, sampled every millisecond."""
    seen, stop = [anonymous()], threading.Event()

    def sample() -> None:
        while not stop.is_set():
            seen[0] = max(seen[0], anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield lambda: seen[0]
    finally:
        stop.set()
        thread.join()


def counted_reads() -> list[int]:
    """Records the bytes of every read of a tensor from now on."""
    sizes: list[int] = []
    read = TensorFiles.read

    def counting(self: TensorFiles, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        part = read(self, name, index)
        sizes.append(part.nbytes)
        return part

    TensorFiles.read = counting
    return sizes


def device_bytes(params: Any) -> int:
    """Bytes of the parameters on all devices of this process."""
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)


def large(folder: Path) -> dict[str, Any]:
    """Measures one loading of a folder, after loading a small model, so that JAX's own caches exist."""
    spec = read_folder_spec(folder)
    layout = make_layout(MeshConfig(1, 4, 2))
    warm = folder.parent / "warm"
    random_folder(warm, json.loads((folder / "config.json").read_text()) | SMALL, 1e9)
    load_params(warm, read_folder_spec(warm), jnp.float32, layout=layout)
    sizes, before = counted_reads(), anonymous()
    started = time.perf_counter()
    with peak_of() as peak:
        params = load_params(folder, spec, jnp.float32, layout=layout)
    seconds = time.perf_counter() - started
    return {
        "grown": peak() - before,
        "devices": device_bytes(params),
        "read": sum(sizes),
        "files": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "seconds": seconds,
    }


SMALL = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 8, "vocab_size": 64, "num_hidden_layers": 2}


def differing(layout: Layout, folder: Path, quantization: str, dtype: Any) -> list[str]:
    """Paths of parameters with other values than on one device, or another sharding than their rule gives."""
    spec = read_folder_spec(folder)
    expected = load_params(folder, spec, dtype, quantization=quantization)
    got = load_params(folder, spec, dtype, quantization=quantization, layout=layout)
    shardings = layout.tree(got, model_axes(spec))
    wrong: list[str] = []

    def compare(path: Any, one: Any, other: Any, sharding: Any) -> None:
        same = one.dtype == other.dtype and np.array_equal(np.asarray(one), np.asarray(other))
        if not same or not other.sharding.is_equivalent_to(sharding, other.ndim):
            wrong.append(jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, expected, got, shardings)
    return wrong


def small(folders: list[Path]) -> dict[str, Any]:
    """Runs every case of every folder."""
    found: dict[str, Any] = {}
    for folder in folders:
        for mesh, quantization in CASES[folder.name]:
            layout = make_layout(MESHES[mesh], jax.devices()[:4] if mesh == "1x1x4" else None)
            assert layout is not None
            dtype = jnp.bfloat16 if mesh == "1x1x4" else jnp.float32
            found[f"{folder.name} {mesh} {quantization}"] = differing(layout, folder, quantization, dtype)
    return found


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    what, *names = sys.argv[1:]
    print(json.dumps(large(Path(names[0])) if what == "large" else small([Path(name) for name in names])))
