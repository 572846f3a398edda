"""What of an adapter's start follows from the weights: their largest part (PiSSA), and the magnitudes of DoRA.

PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948, equations 2 and 3): of W = U S Vᵀ with inputs as rows,
A = U_r (S_r / s)^½ and B = (S_r / s)^½ V_rᵀ with the scale s. The base stays W here, and A0 B0 is subtracted
(`models/adapters.py`). So a quantised base stays what it is and the model starts as it, while the paper quantises the residual,
with a smaller error; A0 and B0 are then those of the quantised W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import LoraConfig
from grpo_jax.config.checks import require
from grpo_jax.models.adapters import weight_norms
from grpo_jax.models.spec import ModelSpec
from grpo_jax.types import Params
from grpo_jax.weights.adapter_modules import ranks_of, ratios_of


def with_start(
    spec: ModelSpec, lora: LoraConfig, params: Params, adapters: Params, fetch: Callable[[Any], Any], seed: int = 0
) -> Params:
    """New adapters with what follows from the weights: PiSSA's matrices, and DoRA's magnitudes, which start as those of W.

    Args:
        fetch: copies arrays to the host, all shards of them; every process of a run makes this call.
        seed: of PiSSA's randomised method.

    Raises:
        ConfigError: the rank of a PiSSA start is larger than a matrix.
    """
    layers = adapters["layers"]
    if lora.pissa:
        layers = {name: principal_part(spec, lora, name, params, fetch, seed) for name in layers}
    if lora.use_dora:
        magnitudes = {name: start_magnitudes(spec, lora, name, params["layers"][name]["kernel"], fetch) for name in layers}
        layers = {name: pair | {"magnitude": magnitudes[name]} for name, pair in layers.items()}
    return {"layers": layers}


def start_magnitudes(spec: ModelSpec, lora: LoraConfig, name: str, kernel: Any, fetch: Callable[[Any], Any]) -> jax.Array:
    """The norms of each output's weights, [L, out]; 0 in layers without an adapter."""
    stack, rows, columns = kernel.shape
    norms = jax.jit(weight_norms, static_argnums=3)(kernel, jnp.zeros((stack, rows, 1)), jnp.zeros((stack, 1, columns)), lora.scale)
    adapted = ranks_of(spec, lora, name) > 0
    return jnp.asarray(np.where(adapted[:, None], np.asarray(fetch(norms)), np.float32(0)))


def principal_part(
    spec: ModelSpec, lora: LoraConfig, name: str, params: Params, fetch: Callable[[Any], Any], seed: int
) -> dict[str, jax.Array]:
    """The adapters of one linear layer as PiSSA starts them, with their copies `a0` and `b0`; computed on the host."""
    kernel, ranks = params["layers"][name]["kernel"], ranks_of(spec, lora, name)
    size, scales = int(ranks.max()), np.full(spec.layers, lora.scale)
    for target, ratios in ratios_of(spec, lora):
        scales = scales * np.array(ratios) if target == name else scales
    rows, columns = kernel.shape[-2:]
    fix = f"the matrices of {name} are {rows} x {columns}, which have no more singular values than that: use {min(rows, columns)}"
    require(size <= min(rows, columns), "lora.rank", size, fix)
    a, b = np.zeros((spec.layers, rows, size), np.float32), np.zeros((spec.layers, size, columns), np.float32)
    for layer in np.flatnonzero(ranks):
        w = np.asarray(fetch(jax.tree.map(lambda leaf, at=int(layer): leaf[at], kernel).astype(jnp.float32)))
        rank, rng = int(ranks[layer]), np.random.default_rng([seed, list(spec.linear_shapes()).index(name), int(layer)])
        u, s, vt = largest_singular(w, rank, lora.init, rng)
        root = np.sqrt(s / scales[layer]).astype(np.float32)
        a[layer, :, :rank], b[layer, :rank] = u * root, root[:, None] * vt
    return {"a": jnp.asarray(a), "b": jnp.asarray(b), "a0": jnp.asarray(a), "b0": jnp.asarray(b)}


def largest_singular(w: np.ndarray, rank: int, method: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `rank` largest singular values of a matrix with their vectors: U [I, r], S [r], Vᵀ [r, O].

    Args:
        method: `pissa` is exact; `pissa_niter_N` takes N iterations of a random subspace (Halko et al. 2011,
            https://arxiv.org/abs/0909.4061, algorithm 4.4).
        rng: of the subspace's start.
    """
    if method == "pissa":
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    basis, _ = np.linalg.qr(w @ rng.standard_normal((w.shape[1], rank)).astype(w.dtype))
    for _ in range(int(method.rsplit("_", 1)[1])):
        basis, _ = np.linalg.qr(w.T @ basis)
        basis, _ = np.linalg.qr(w @ basis)
    u, s, vt = np.linalg.svd(basis.T @ w, full_matrices=False)
    return basis @ u, s, vt


def starts_as_base(adapters: Params, fetch: Callable[[Any], Any]) -> bool:
    """Whether a policy with these adapters is the base alone: every B is 0, or with PiSSA every pair is its start."""

    def alike(pair: dict[str, Any]) -> bool:
        if "a0" in pair:
            return all(np.array_equal(fetch(pair[leaf]), fetch(pair[f"{leaf}0"])) for leaf in ("a", "b"))
        return not np.any(fetch(pair["b"]))

    return all(alike(pair) for pair in adapters["layers"].values())
