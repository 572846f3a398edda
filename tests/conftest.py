"""What every test runs under: CPU, strict JAX, checked shapes, no network, and the shared data where it is there."""

from __future__ import annotations

import os
from pathlib import Path

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
from jaxtyping import install_import_hook

# Stays for the whole run: modules of ours are checked against their shapes whenever a test imports them.
install_import_hook(["grpo_jax", "grpo_kernels"], "typechecking.functions_only")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

REPOSITORY = Path(__file__).resolve().parent.parent


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
