"""A plain forward pass of the families with recurrent layers: one text at a time, token by token, from Hugging Face's tensors.

Full logits, no cache, no chunks, no shared prompt. Adapters are those of this package, whose stacks have the layers of one kind.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.types import Params

RECURRENT = ("lfm2", "qwen3_5_text")
"""model_types that are computed here."""

FEED = {
    "lfm2": ("feed_forward", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    "qwen3_5_text": ("mlp", {name: name for name in ("gate_proj", "up_proj", "down_proj")}),
}


def recurrent_logits(config: dict[str, Any], weights: Params, ids: Any, adapter: Params | None = None, scale: float = 0.0) -> Any:
    """Computes logits [T, V] of one text; see `plain_oracles.plain_logits`."""
    lfm2, layers = config["model_type"] == "lfm2", config["layer_types"]
    eps, offset = (config["norm_eps"], 0.0) if lfm2 else (config["rms_norm_eps"], 1.0)
    before, behind = ("operator_norm", "ffn_norm") if lfm2 else ("input_layernorm", "post_attention_layernorm")

    def norm(x: Any, weight: Any) -> Any:
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight

    def layer(x: Any, number: int) -> Any:
        kind, at = layers[number], f"model.layers.{number}"

        def linear(x: Any, path: str, target: str, every: bool = False) -> Any:
            y = x @ weights[f"{at}.{path}.weight"].T + weights.get(f"{at}.{path}.bias", 0.0)
            if adapter is None or target not in adapter["layers"]:
                return y
            place = number if every else layers[:number].count(kind)
            return y + scale * (x @ adapter["layers"][target]["a"][place] @ adapter["layers"][target]["b"][place])

        def convolve(x: Any, path: str) -> Any:
            taps = weights[f"{at}.{path}.weight"][:, 0]
            padded = jnp.concatenate([jnp.zeros((taps.shape[1] - 1, x.shape[1])), x])
            y = sum(padded[j : j + len(x)] * taps[:, j] for j in range(taps.shape[1]))
            return y + weights.get(f"{at}.{path}.bias", 0.0)

        h = norm(x, weights[f"{at}.{before}.weight"] + offset)
        if kind == "conv":
            b, c, own = jnp.split(linear(h, "conv.in_proj", "in_proj"), 3, axis=-1)
            mixed = linear(c * convolve(b * own, "conv.conv"), "conv.out_proj", "out_proj")
        elif kind == "linear_attention":
            parts = {
                name: linear(h, f"linear_attn.{name}", name) for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
            }
            own = {name: weights[f"{at}.linear_attn.{name}"] for name in ("A_log", "dt_bias")}
            y = delta_rule(config, jax.nn.silu(convolve(parts["in_proj_qkv"], "linear_attn.conv1d")), parts, own)
            y = norm(y, weights[f"{at}.linear_attn.norm.weight"]).reshape(len(h), -1) * jax.nn.silu(parts["in_proj_z"])
            mixed = linear(y, "linear_attn.out_proj", "out_proj")
        else:
            names = {"o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"} if lfm2 else {}
            mixed = attention(
                config, h, linear, lambda y, n: norm(y, weights[f"{at}.self_attn.{names.get(n, n)}.weight"] + offset), names
            )
        x = x + mixed
        path, feed = FEED[config["model_type"]]
        h = norm(x, weights[f"{at}.{behind}.weight"] + offset)
        gate, up = (linear(h, f"{path}.{feed[name]}", name, every=True) for name in ("gate_proj", "up_proj"))
        return x + linear(jax.nn.silu(gate) * up, f"{path}.{feed['down_proj']}", "down_proj", every=True)

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        x = weights["model.embed_tokens.weight"][ids]
        for number in range(len(layers)):
            x = layer(x, number)
        head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
        return norm(x, weights["model.embedding_norm.weight" if lfm2 else "model.norm.weight"] + offset) @ head.T


def attention(config: dict[str, Any], h: Any, linear: Any, head_norm: Any, names: dict[str, str]) -> Any:
    """Attention with norms of queries and keys; gated in Qwen3.5."""
    heads, kv_heads, length = config["num_attention_heads"], config["num_key_value_heads"], len(h)
    dim = config.get("head_dim") or config["hidden_size"] // heads
    q, k, v = (linear(h, f"self_attn.{name}", name) for name in ("q_proj", "k_proj", "v_proj"))
    gate = None
    if q.shape[1] == 2 * heads * dim:
        q, gate = jnp.split(q.reshape(length, heads, 2 * dim), 2, axis=-1)
        gate = gate.reshape(length, -1)
    q, k, v = q.reshape(length, heads, dim), k.reshape(length, kv_heads, dim), v.reshape(length, kv_heads, dim)
    rope = config["rope_parameters"]
    turned = int(dim * rope.get("partial_rotary_factor", 1.0))
    frequencies = rope["rope_theta"] ** (-np.arange(turned // 2) / (turned // 2))
    turn = np.exp(1j * np.arange(length)[:, None] * frequencies).astype(np.complex64)[:, None, :]

    def rotated(x: Any) -> Any:
        z = (x[..., : turned // 2] + 1j * x[..., turned // 2 : turned]) * turn
        return jnp.concatenate([z.real, z.imag, x[..., turned:]], axis=-1)

    q, k = rotated(head_norm(q, "q_norm")), rotated(head_norm(k, "k_norm"))
    k, v = (jnp.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
    scores = jnp.where(np.tril(np.ones((length, length), bool)), jnp.einsum("thd,shd->hts", q, k) * dim**-0.5, -1e30)
    mixed = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores, axis=-1), v).reshape(length, -1)
    mixed = mixed if gate is None else mixed * jax.nn.sigmoid(gate)
    return linear(mixed, f"self_attn.{names.get('o_proj', 'o_proj')}", "o_proj")


def delta_rule(config: dict[str, Any], mixed: Any, parts: Params, own: Params) -> Any:
    """The recurrence of https://arxiv.org/abs/2412.06464, equation 10, with S transposed: [T, H, Dv]."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    dk, dv, length = config["linear_key_head_dim"], config["linear_value_head_dim"], len(mixed)
    q, k, v = jnp.split(mixed, [keys * dk, 2 * keys * dk], axis=-1)
    q, k = (x.reshape(length, keys, dk) for x in (q, k))
    q, k = (x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (jnp.repeat(x, values // keys, axis=1) for x in (q * dk**-0.5, k))
    decay = jnp.exp(-jnp.exp(own["A_log"]) * jax.nn.softplus(parts["in_proj_a"] + own["dt_bias"]))
    beta = jax.nn.sigmoid(parts["in_proj_b"])

    def step(state: Any, token: Any) -> Any:
        q, k, v, decay, beta = token
        state = state * decay[:, None, None]
        state = state + k[:, :, None] * (beta[:, None] * (v - jnp.einsum("hkd,hk->hd", state, k)))[:, None, :]
        return state, jnp.einsum("hkd,hk->hd", state, q)

    tokens = (q, k, v.reshape(length, values, dv), decay, beta)
    return jax.lax.scan(step, jnp.zeros((values, dk, dv)), tokens)[1]
