"""Plain implementations to test the package against, and tiny policies.

The forward pass here computes one text at a time from Hugging Face's tensors and config.json: no scan, no cache, no shared prompt,
full logits. `tests/models/test_goldens.py` compares it with the stored results of transformers, so it can be an oracle.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import compiler
from recurrent_oracles import RECURRENT, recurrent_logits

from goldens.folders import HERE, build_model_folder, model_tensors
from grpo_jax.config import LoraConfig
from grpo_jax.policy import Policy
from grpo_jax.types import Params

STOPS = (2, 5)
"""Stop ids of the tiny models, as their generation_config.json lists them."""

LORA = LoraConfig(rank=4, alpha=8.0)


QUICK_OPTIONS = (("xla_cpu_use_fusion_emitters", False), ("xla_cpu_parallel_codegen_split_count", 1))
"""Without the MLIR emitters and with one module of LLVM, XLA compiles a tiny update in 1.2 seconds instead of 4."""


@functools.cache
def xla_knows_quick_options() -> bool:
    """Tells whether this version of XLA has the options."""
    try:
        jax.jit(lambda: jnp.int32(0)).lower().compile(compiler_options=dict(QUICK_OPTIONS))
    except jax.errors.JaxRuntimeError:
        return False
    return True


@contextlib.contextmanager
def quick_compiling() -> Iterator[None]:
    """Compiles for CPUs with few optimisations: a quarter of the time for tiny programs that run once, and the same results.

    JAX takes XLA's options per program or per process only, so its function that collects them is replaced.
    """
    inner, before = compiler.get_compile_options, jax.config.read("jax_disable_most_optimizations")

    def with_quick_options(*arguments: Any, **named: Any) -> Any:
        options = inner(*arguments, **named)
        on_cpu = getattr(named.get("backend"), "platform", "") == "cpu"
        if on_cpu and jax.config.read("jax_disable_most_optimizations"):
            options.env_option_overrides = [*QUICK_OPTIONS, *options.env_option_overrides]
        return options

    compiler.get_compile_options = with_quick_options if xla_knows_quick_options() else inner
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        compiler.get_compile_options = inner
        jax.config.update("jax_disable_most_optimizations", before)


def golden_config(family: str) -> dict[str, Any]:
    """Returns config.json of a tiny model, as transformers 5 writes it."""
    return json.loads((HERE / family / "config.json").read_text())


@functools.cache
def tiny_policy(family: str, lora: LoraConfig | None = None, dtype: str = "float32") -> Policy:
    """Makes the tiny model of a family, with random adapters where `lora` is given; its folder is deleted."""
    with tempfile.TemporaryDirectory() as folder:
        policy = Policy.from_pretrained(build_model_folder(Path(folder), family), lora=lora, dtype=dtype)
    return policy if lora is None else with_random_adapters(policy)


def with_random_adapters(policy: Policy, seed: int = 7, size: float = 0.1) -> Policy:
    """Returns the policy with noise added to every adapter weight; at the start B is zero."""
    import dataclasses

    assert policy.adapters is not None
    return dataclasses.replace(policy, adapters=moved(policy.adapters, seed, size))


def moved(tree: Params, seed: int, size: float) -> Params:
    """Adds normal noise of deviation `size` to every leaf of a tree."""
    leaves, shape = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    new = [leaf + jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(shape, new)


def layer_kinds(config: dict[str, Any]) -> list[tuple[int | None, dict[str, Any]]]:
    """Returns (window, rotary parameters) of each layer."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    windowed = window and (config["model_type"] in ("mistral", "mixtral") or config.get("use_sliding_window"))
    default = ["sliding_attention" if windowed else "full_attention"] * layers
    rope = config["rope_parameters"]
    return [
        (window if kind == "sliding_attention" else None, rope.get(kind, rope)) for kind in config.get("layer_types") or default
    ]


def angles(rope: dict[str, Any], half: int, length: int) -> np.ndarray:
    """Computes rotary angles [T, Dh/2] in radians; Llama 3's scaling by wavelength, as in its code."""
    frequencies = rope["rope_theta"] ** (-np.arange(half) / half)
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    elif rope["rope_type"] == "llama3":
        wavelength, old = 2 * np.pi / frequencies, rope["original_max_position_embeddings"]
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        smooth = np.clip((old / wavelength - low) / (high - low), 0, 1)
        frequencies = frequencies * (smooth + (1 - smooth) / factor)
    return np.arange(length)[:, None] * frequencies[None, :]


def int8_steps(x: Any) -> Any:
    """Rounds values to 255 steps of the largest magnitude along the last axis. Steps are bfloat16."""
    step = (jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True), 1e-30) / 127).astype(jnp.bfloat16).astype(jnp.float32)
    return jnp.round(x / step) * step


def int4_steps(x: Any) -> Any:
    """Rounds each 32 values along the last axis to 16 steps; the value of largest magnitude is -8 of them. Steps are bfloat16."""
    parts = []
    for start in range(0, x.shape[-1], 32):
        part = x[..., start : start + 32]
        largest = jnp.take_along_axis(part, jnp.abs(part).argmax(axis=-1, keepdims=True), axis=-1)
        step = (largest / -8).astype(jnp.bfloat16).astype(jnp.float32)
        steps = jnp.clip(jnp.round(part / jnp.where(step == 0, 1.0, step)), -8, 7)
        parts.append(steps * step)
    return jnp.concatenate(parts, axis=-1)


def plain_experts(config: dict[str, Any], x: Any, router: Any, expert: Callable[[Any, int], Any]) -> Any:
    """Computes [T, D]: every expert computes all tokens, and a token sums its most probable experts, by their probabilities.

    Args:
        router: [E, D].
        expert: (x, number) → that expert's feed-forward of all tokens.
    """
    experts, chosen = router.shape[0], config["num_experts_per_tok"]
    p = jax.nn.softmax(x @ router.T, axis=-1)
    share = jnp.where(p >= jnp.sort(p, axis=-1)[:, experts - chosen, None], p, 0.0)
    if config["model_type"] == "mixtral" or config["norm_topk_prob"]:
        share = share / share.sum(axis=-1, keepdims=True)
    return sum(share[:, number, None] * expert(x, number) for number in range(experts))


def plain_logits(
    config: dict[str, Any],
    weights: Params,
    ids: Any,
    adapter: Params | None = None,
    scale: float = 0.0,
    rounded_from: Any = None,
    steps: Callable[[Any], Any] = int8_steps,
) -> Any:
    """Computes logits [T, V] of one text.

    Args:
        config: config.json, as transformers 5 writes it.
        weights: Hugging Face's tensors by name.
        ids: [T].
        adapter: the `lora` collection, [L, in, r] and [L, r, out] a target; of experts [L, E, ...].
        scale: factor of the adapters' product.
        rounded_from: the first token that sees all keys and values rounded, as decoding from an int8 or int4 cache does.
        steps: rounds keys or values.
    """
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        gemma, length = config["model_type"].startswith("gemma"), ids.shape[0]
        heads, kv_heads, width = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
        head_dim = config.get("head_dim") or width // heads
        query_scale = (config["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5
        distance = np.arange(length)[:, None] - np.arange(length)[None, :]

        def norm(x: Any, name: str) -> Any:
            weight = weights[f"{name}.weight"] + (1.0 if gemma else 0.0)
            return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config["rms_norm_eps"]) * weight

        def cap(x: Any, limit: float | None) -> Any:
            return x if limit is None else limit * jnp.tanh(x / limit)

        x = weights["model.embed_tokens.weight"][ids] * (width**0.5 if gemma else 1.0)
        for number, (window, rope) in enumerate(layer_kinds(config)):
            at = f"model.layers.{number}"

            def linear(x: Any, path: str, target: str, expert: tuple[int, ...] = (), at: str = at, number: int = number) -> Any:
                y = x @ weights[f"{at}.{path}.weight"].T + weights.get(f"{at}.{path}.bias", 0.0)
                if adapter is None or target not in adapter["layers"]:
                    return y
                a, b = (adapter["layers"][target][leaf][(number, *expert)] for leaf in ("a", "b"))
                return y + scale * (x @ a @ b)

            def feed(x: Any, names: list[str], *expert: int, linear: Any = linear) -> Any:
                gate, up = linear(x, names[0], "gate_proj", expert), linear(x, names[1], "up_proj", expert)
                act = jax.nn.gelu(gate, approximate=True) if gemma else gate * jax.nn.sigmoid(gate)
                return linear(act * up, names[2], "down_proj", expert)

            h = norm(x, f"{at}.input_layernorm")
            q = linear(h, "self_attn.q_proj", "q_proj").reshape(length, heads, head_dim)
            k = linear(h, "self_attn.k_proj", "k_proj").reshape(length, kv_heads, head_dim)
            v = linear(h, "self_attn.v_proj", "v_proj").reshape(length, kv_heads, head_dim)
            if f"{at}.self_attn.q_norm.weight" in weights:
                q, k = norm(q, f"{at}.self_attn.q_norm"), norm(k, f"{at}.self_attn.k_norm")
            turn = np.exp(1j * angles(rope, head_dim // 2, length)).astype(np.complex64)[:, None, :]
            rotated = [(x[..., : head_dim // 2] + 1j * x[..., head_dim // 2 :]) * turn for x in (q, k)]
            q, k = (jnp.concatenate([z.real, z.imag], axis=-1) for z in rotated)
            k, v = (jnp.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
            sees = (distance >= 0) & (distance < (window or length))

            def mix(k: Any, v: Any, q: Any = q, sees: Any = sees) -> Any:
                scores = cap(jnp.einsum("thd,shd->hts", q, k) * query_scale, config.get("attn_logit_softcapping"))
                return jnp.einsum("hts,shd->thd", jax.nn.softmax(jnp.where(sees, scores, -1e30), axis=-1), v)

            mixed = mix(k, v)
            if rounded_from is not None:
                mixed = jnp.where((jnp.arange(length) < rounded_from)[:, None, None], mixed, mix(steps(k), steps(v)))
            y = linear(mixed.reshape(length, heads * head_dim), "self_attn.o_proj", "o_proj")
            x = x + (norm(y, f"{at}.post_attention_layernorm") if gemma else y)
            h = norm(x, f"{at}.pre_feedforward_layernorm" if gemma else f"{at}.post_attention_layernorm")
            if "num_experts_per_tok" in config:
                path, names = "mlp", ["gate_proj", "up_proj", "down_proj"]
                if config["model_type"] == "mixtral":
                    path, names = "block_sparse_moe", ["w1", "w3", "w2"]

                def expert(x: Any, e: int, path: str = path, names: Any = names, feed: Any = feed) -> Any:
                    return feed(x, [f"{path}.experts.{e}.{name}" for name in names], e)

                y = plain_experts(config, h, weights[f"{at}.{path}.gate.weight"], expert)
            else:
                y = feed(h, ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"])
            x = x + (norm(y, f"{at}.post_feedforward_layernorm") if gemma else y)
        head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
        return cap(norm(x, "model.norm") @ head.T, config.get("final_logit_softcapping"))


@functools.cache
def plain_model(family: str, scale: float = 0.0, steps: Callable[[Any], Any] = int8_steps) -> Callable[..., Any]:
    """Returns a jitted (ids [N, T], adapter or None, rounded_from [N] or None) → logits [N, T, V] of a tiny model."""
    config = golden_config(family)
    weights = {name: jnp.asarray(array) for name, array in model_tensors(family).items()}

    @jax.jit
    def run(ids: Any, adapter: Params | None = None, rounded_from: Any = None) -> Any:
        def one(row: Any, start: Any) -> Any:
            if config["model_type"] in RECURRENT:
                assert start is None, "keys and values are not rounded there"
                return recurrent_logits(config, weights, row, adapter, scale)
            return plain_logits(config, weights, row, adapter, scale, start, steps)

        return jax.vmap(one, in_axes=(0, None if rounded_from is None else 0))(ids, rounded_from)

    return run


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Computes log-softmax over the last axis in float64."""
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def staying_tokens(logits: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """Returns which of [V] tokens stay, by sorting: top-k with ties, then top-p of the rest with ties, then min-p."""
    logits = np.asarray(logits, np.float64)
    stay = np.ones(logits.shape, bool)
    falling = np.sort(logits)[::-1]
    if top_k > 0:
        stay &= logits >= falling[min(top_k, len(logits)) - 1]
    if top_p < 1:
        p = np.exp(log_softmax(np.where(stay, logits, -np.inf)))
        order = np.argsort(-p, kind="stable")
        needed = int(np.searchsorted(np.cumsum(p[order]), top_p))
        stay &= logits >= logits[order[min(needed, len(order) - 1)]]
    if min_p > 0:
        stay &= np.exp(logits - logits.max()) >= min_p
    return stay


def array_sizes(jaxpr: Any) -> int:
    """Returns the number of elements of the largest array that a traced program computes, inner programs included."""
    largest = 0
    for equation in jaxpr.eqns:
        shapes = [getattr(v.aval, "shape", ()) for v in equation.outvars]
        largest = max([largest, *(int(np.prod(shape)) for shape in shapes)])
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                largest = max(largest, array_sizes(inner))
    return largest
