"""What every test runs under: CPU, strict JAX, checked shapes, no network, and the shared data where it is there."""

from __future__ import annotations

import gc
import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu is installed for compiling only: no lock against a second process, no question to a cloud machine's metadata server.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Most of the suite's time is compiling, often the same programs: workers and later runs share them (a quarter of the time).
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding
from jaxtyping import install_import_hook

# Stays for the whole run: modules of ours are checked against their shapes whenever a test imports them.
install_import_hook(["grpo_jax", "grpo_kernels"], "typechecking.functions_only")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

REPOSITORY = Path(__file__).resolve().parent.parent


MANY_MAPPINGS = 20_000
"""Memory mappings above which compiled programs are let go: Linux allows a process 65,530, and without more XLA's compiler dies."""


def mappings() -> int:
    """How many memory mappings this process has; 0 where the system does not say."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


def let_programs_go(module: ModuleType) -> None:
    """Compiled programs that JAX keeps, and those in a file's own `functools.cache`."""
    for value in vars(module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _few_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Lets compiled programs go once they are many. They are not counted, which takes 10 ms, after a test that compiled little."""
    start = time.monotonic()
    yield
    if time.monotonic() - start > 0.1 and mappings() > MANY_MAPPINGS:
        from shared_programs import KNOWN  # not above: it imports modules that the hook below is to check

        KNOWN.clear()
        let_programs_go(request.module)


@pytest.fixture(autouse=True, scope="module")
def _own_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """No file runs another's programs: JAX keeps them whatever the settings of the compiler were, which round in their own ways."""
    yield
    let_programs_go(request.module)


def pytest_collection_finish() -> None:
    """Before the first test: lets go what files compiled while they were imported, and freezes modules and tests.

    They stay until the end. Garbage is collected after every file, and would look at all of them each time. Traces make many
    objects that live for a while, so whole collections in between are rarer: after 40 of the middle generation, not 10.
    """
    jax.clear_caches()
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 40)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with GSM8K and the 260K-parameter story model; lies beside the checkout, never in it."""
    for folder in (REPOSITORY.parent / "shared" / "data", REPOSITORY / "shared" / "data"):
        if folder.is_dir():
            return folder
    pytest.skip("needs the data folder shared/data beside the checkout")


class Chips(dict[str, SingleDeviceSharding]):
    """One device of each generation of TPUs, by name; it is described when it is first used."""

    def __missing__(self, name: str) -> SingleDeviceSharding:
        from jax.experimental import topologies

        topology = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}[name]
        options = {"chip_config_name": "megacore"} if name == "v4" else {}
        self[name] = SingleDeviceSharding(topologies.get_topology_desc(topology, "tpu", **options).devices[0])
        return self[name]


@pytest.fixture(scope="module")
def chips() -> Iterator[dict[str, SingleDeviceSharding]]:
    """TPUs that are absent, by generation: XLA's compiler for them needs the libtpu wheel alone.

    Programs for them can be written to the cache on disk, but not read without one. All optimisations are on, so that memory is
    what users get.
    """
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the libtpu wheel, which is for Linux on x86-64")
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield Chips()
    jax.config.update("jax_disable_most_optimizations", before)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
