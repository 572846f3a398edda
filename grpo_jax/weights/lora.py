"""LoRA adapters: initial values, and reading and writing PEFT's folders (`adapter_config.json`, `adapter_model.safetensors`).

Adapters are the `lora` collection, float32, [L, in, r] and [L, r, out] per target (`models/adapters.py` says what else there may
be). A folder has each module's own rank, and nothing for modules without an adapter. PiSSA is written as PEFT converts it: the
difference to the start, A and A0 next to each other, at twice the rank. Biases and whole modules are not trained, and refused.

In a mixture of experts every expert has its adapters, [L, E, in, r] and [L, E, r, out], all of one rank; `all-linear` is attention
and experts, never the router. A folder has one pair of tensors per expert, as PEFT wrote them when each expert was a module. vLLM
and PEFT read these, and PEFT joins them for today's transformers, where all experts are one parameter. PEFT's own training of
experts (`target_parameters`) shares one A between gate_proj and up_proj, and is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import ConfigError, LoraConfig
from grpo_jax.config.checks import show
from grpo_jax.config.sections import LINEAR_TARGETS
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.models.config_values import checked_flag, checked_number, whole_number
from grpo_jax.models.layer_kinds import plain_part
from grpo_jax.models.linear import JOINED
from grpo_jax.models.parameters import ParamSpec, flatten, nest
from grpo_jax.models.spec import ModelError, ModelSpec
from grpo_jax.runtime.digests import DIGESTS, DamagedError, verify_digests, write_digests
from grpo_jax.runtime.files import explains_write_errors, replacing
from grpo_jax.types import Params
from grpo_jax.weights.adapter_modules import check_adapters, is_adapted, parts_of_target, ranks_of, specs_of
from grpo_jax.weights.fused_adapters import file_shape, joined_pairs, part_of, patterns
from grpo_jax.weights.hf import find_folder, open_shard, read_json, require_finite, shape_of
from grpo_jax.weights.names import fused_name, module_path, module_paths, root

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings of a PEFT config that are not supported, with the values that mean "not used".
NOT_USED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_qalora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "megatron_config": (None,),
}


WHOLE_MODULES = "whole modules are not trained next to adapters: the base is frozen, and the reference computes with it"
"""Why `modules_to_save` is refused."""

LAYERS_PATTERNS = (None, [], "", "layers", ["layers"])
"""Values of `layers_pattern` that mean the list of layers of every family here."""

LEAVES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""Ending of a tensor's name in PEFT's files, by the leaf."""


def init_lora(spec: ModelSpec, lora: LoraConfig, key: jax.Array) -> Params:
    """Adapters before the weights are known, as PEFT's: A uniform within ±1/√in, B zero, so that the policy starts as the base.

    What follows from the weights is zero; `lora_start.with_start` computes it.

    Raises:
        ConfigError: see `check_adapters`.
    """
    check_adapters(spec, lora)
    leaves: dict[tuple[str, ...], jax.Array] = {}
    for number, (path, p) in enumerate(specs_of(spec, lora).items()):
        if path[-1] == "a" and not lora.pissa:
            bound = p.shape[-2] ** -0.5
            drawn = jax.random.uniform(jax.random.fold_in(key, number), p.shape, jnp.float32, -bound, bound)
            leaves[path] = drawn * within_rank(ranks_of(spec, lora, path[1]), p.shape[-1])[..., None, :]
        else:
            leaves[path] = jnp.zeros(p.shape, jnp.float32)
    return nest(leaves)


def within_rank(ranks: np.ndarray, size: int) -> np.ndarray:
    """[..., size], 1 for what a module of that rank has of the stack's rank, else 0; float32."""
    return (np.arange(size) < ranks[..., None]).astype(np.float32)


def adapter_names(spec: ModelSpec, target: str, leaf: str) -> list[str]:
    """PEFT's tensor names of one adapter matrix, layer by layer and, within a layer, expert by expert."""
    return [f"base_model.model.{module}.{LEAVES[leaf]}" for module in module_paths(spec, target)]


def peft_target(spec: ModelSpec, target: str) -> str:
    """Name of a linear layer in PEFT's `target_modules`: `gate_proj` is `w1` in Mixtral."""
    return module_path(spec, target).rsplit(".", 1)[-1]


def peft_targets(spec: ModelSpec, names: list[str], layers: list[int] | None = None) -> list[str] | str:
    """PEFT's `target_modules`: names of modules; where others have these names too, a pattern of their paths.

    Others are modules of a vision tower, and linear layers without adapters: LFM2 has two `out_proj`.

    Args:
        layers: those that have adapters, for the pattern; None is all.
    """
    targets = sorted({peft_target(spec, name) for name in names})
    others = {
        peft_target(spec, name)
        for target in LINEAR_TARGETS
        for name in parts_of_target(spec, target)
        if name not in names and not fused_name(spec, name) and is_adapted(spec, name)
    }
    if root(spec) == "model" and not others.intersection(targets):
        return targets
    numbers = "" if layers is None else rf"({'|'.join(map(str, layers))})\."
    paths = sorted({re.escape(module_path(spec, name)) for name in names} if root(spec) == "model" else targets)
    return rf"{re.escape(root(spec))}\.layers\.{numbers}.*\.({'|'.join(paths)})"


def read_adapter_config(folder: Path) -> tuple[LoraConfig, tuple[str, ...]]:
    """Reads the settings of a PEFT folder.

    Returns:
        The settings without targets, which follow from the tensors; and the joined linear layers whose pair has a block for each
        part (`fused_adapters`).
    """
    config = read_json(folder / ADAPTER_CONFIG)
    where = folder / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{where}: peft_type {show(config.get('peft_type'))} is not supported; supported: 'LORA'")
    for name, allowed in NOT_USED.items():
        if config.get(name) not in allowed:
            raise ModelError(f"{where}: {name} = {show(config[name])} is not supported; train or merge that adapter with PEFT")
    if config.get("modules_to_save") not in (None, []):
        raise ModelError(f"{where}: modules_to_save = {show(config['modules_to_save'])}: {WHOLE_MODULES}; merge it with PEFT")
    if config.get("layers_pattern") not in LAYERS_PATTERNS:
        pattern = show(config["layers_pattern"])
        raise ModelError(f"{where}: layers_pattern = {pattern} is not supported; the list of layers is 'layers' here")
    # These initialisations change the base weights too, so the adapter belongs to a base that is not available.
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ModelError(
            f"{where}: init_lora_weights = {show(start)} changed the base too; convert or merge that adapter with PEFT"
        )
    split = tuple(name for name in JOINED if isinstance(config.get("rank_pattern"), dict) and name in config["rank_pattern"])
    layers = config.get("layers_to_transform")
    given: dict[str, Any] = {
        "rank": whole_number(where, "r", config.get("r")),
        "alpha": checked_number(where, "lora_alpha", config.get("lora_alpha")),
        "rslora": checked_flag(where, "use_rslora", config.get("use_rslora") or False),
        "use_dora": checked_flag(where, "use_dora", config.get("use_dora") or False),
        "layers_to_transform": [layers] if isinstance(layers, int) and not isinstance(layers, bool) else layers or None,
        "adapter": str(folder),
    }
    try:
        plain = LoraConfig(**given)
        if not split:
            return replace(plain, **{name: config.get(name) or None for name in ("rank_pattern", "alpha_pattern")}), ()
    except ConfigError as error:
        raise ModelError(f"{where}: {error}") from error
    for name, expected in patterns(list(split), plain).items():
        if config.get(name) != expected:
            raise ModelError(f"{where}: {name} = {show(config.get(name))} is not supported; train or merge that adapter with PEFT")
    return plain, split


def load_adapter(source: str | Path, spec: ModelSpec) -> tuple[Params, LoraConfig]:
    """Reads a PEFT adapter.

    Args:
        source: a folder, or a hub id `owner/name`.
        spec: the model that it is for.

    Returns:
        The `lora` collection in float32, and the settings of the adapter with `adapter` = source.

    Raises:
        ModelError: there is no such folder or repository; it is damaged, uses a setting that is not supported, or is for another
            model.
    """
    from safetensors import safe_open

    folder = find_folder(str(source), "lora.adapter", [ADAPTER_CONFIG, ADAPTER_WEIGHTS, DIGESTS])
    verify_export(folder)
    lora, split = read_adapter_config(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} is missing; a PEFT folder needs it")
    with open_shard(folder / ADAPTER_WEIGHTS, safe_open) as shard:
        shapes = {name: shape_of(folder / ADAPTER_WEIGHTS, shard, name) for name in shard.keys()}  # noqa: SIM118  (not a dict)
        specs = check_adapter(folder, shapes, spec, lora, split)
        leaves = {path: read_leaf(folder, shard, spec, path, p.shape, lora) for path, p in specs.items()}
    targets = list(dict.fromkeys(plain_part(path[1]) for path in specs))
    return nest(leaves), replace(lora, targets=targets, adapter=str(source))


def check_adapter(
    folder: Path, shapes: dict[str, tuple[int, ...]], spec: ModelSpec, lora: LoraConfig, split: tuple[str, ...]
) -> dict[tuple[str, ...], ParamSpec]:
    """Checks the names and shapes in an adapter's header, before any value is read.

    Returns:
        The stacks that the adapter has, by their path.

    Raises:
        ModelError: a tensor is missing, too many, or has another shape.
    """
    found = {name.removesuffix(f".lora_{leaf}.weight") for name in shapes for leaf in "AB"}
    parts = [part for target in LINEAR_TARGETS for part in parts_of_target(spec, target)]
    own = {part: {f"base_model.model.{path}" for path in module_paths(spec, part)} for part in parts}
    targets = tuple(part for part, modules in own.items() if not modules.isdisjoint(found))
    specs, unused = specs_of(spec, lora, targets), set(shapes)
    for path, p in specs.items():
        for name, rank in zip(adapter_names(spec, path[1], path[2]), ranks_of(spec, lora, path[1]).ravel().tolist(), strict=True):
            if rank == 0:
                continue
            own = {"a": (p.shape[-2], rank), "b": (rank, p.shape[-1])}.get(path[2], p.shape[-1:])
            expected = file_shape(spec, path[1], path[2], own, split=fused_name(spec, path[1]) in split)
            if name not in shapes:
                raise ModelError(
                    f"{folder}: tensor {name} is missing: the adapter does not cover every layer of this {spec.layers}-layer model"
                )
            unused.discard(name)
            if shapes[name] != expected:
                raise ModelError(f"{folder}: tensor {name} has shape {shapes[name]}; this model and rank {rank} ask for {expected}")
    if unused:
        raise ModelError(
            f"{folder}: {len(unused)} tensors do not belong to this {spec.family} model: {', '.join(sorted(unused)[:3])}"
        )
    if not specs:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} holds no adapter")
    return specs


def read_leaf(
    folder: Path, shard: Any, spec: ModelSpec, path: tuple[str, ...], shape: tuple[int, ...], lora: LoraConfig
) -> jax.Array:
    """Reads one stack in this model's (in, out) order, float32, with zeros for what a module has not.

    Raises:
        ModelError: a value is not finite.
    """
    where, (_, target, leaf) = folder / ADAPTER_WEIGHTS, path
    stack = np.zeros(shape, np.float32)
    for index, name in zip(np.ndindex(spec.stack_dims(target)[0]), adapter_names(spec, target, leaf), strict=True):
        rank = int(ranks_of(spec, lora, target)[index])
        if rank == 0:
            continue
        tensor = shard.get_tensor(name)
        require_finite(where, name, tensor)
        own = part_of(spec, target, leaf, tensor, rank, where).astype(np.float32).T
        stack[(*index, *(slice(size) for size in own.shape))] = own
    return jnp.asarray(stack)


def verify_export(folder: Path) -> None:
    """Raises ModelError where a folder has digests, as those that this package writes, and the adapter differs from them."""
    if not (folder / DIGESTS).exists():
        return
    try:
        verify_digests(folder, only=(ADAPTER_CONFIG, ADAPTER_WEIGHTS))  # the others are not read, nor downloaded
    except DamagedError as error:
        raise ModelError(f"{error}; export it again, or remove {folder / DIGESTS} where the change was intended") from error


@explains_write_errors
def save_adapter(
    folder: Path, spec: ModelSpec, adapters: Params, lora: LoraConfig, base_name: str, tokenizer: Tokenizer | None = None
) -> None:
    """Writes a folder that PEFT, transformers and vLLM load, with the digests of its files.

    Args:
        folder: created where it does not exist.
        adapters: the `lora` collection.
        base_name: what PEFT shows as the base model: the path or hub id that the run started from.
        tokenizer: written next to the adapter, with its chat template.
    """
    from safetensors.numpy import save_file

    pairs = joined_pairs(spec, plain_adapters(adapters))
    tensors = adapter_tensors(spec, lora, pairs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DIGESTS).unlink(missing_ok=True)  # those of files that are about to be replaced
    with replacing(folder / ADAPTER_WEIGHTS) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    content = json.dumps(adapter_config(spec, lora, list(pairs), base_name), indent=2) + "\n"
    with replacing(folder / ADAPTER_CONFIG) as unfinished:
        unfinished.write_text(content, encoding="utf-8")
    write_digests(folder, [ADAPTER_CONFIG, ADAPTER_WEIGHTS, *([] if tokenizer is None else tokenizer.save(folder))])


def plain_adapters(adapters: Params) -> Params:
    """The adapters, on the host, without a start to subtract: with PiSSA those of A B − A0 B0, at twice the rank."""
    layers = {}
    for name, pair in adapters["layers"].items():
        own = {leaf: np.asarray(jax.device_get(values), np.float32) for leaf, values in pair.items()}
        if "a0" in own:
            start = own.pop("a0"), own.pop("b0")
            own["a"] = np.concatenate([own["a"], start[0]], axis=-1)
            own["b"] = np.concatenate([own["b"], -start[1]], axis=-2)
        layers[name] = own
    return {"layers": layers}


def adapter_tensors(spec: ModelSpec, lora: LoraConfig, pairs: Params) -> dict[str, np.ndarray]:
    """PEFT's tensors of adapters, by name: of every module that has an adapter, at its own rank.

    Args:
        pairs: of `joined_pairs`.
    """
    tensors: dict[str, np.ndarray] = {}
    for (target, leaf), stack in flatten(pairs):
        part = JOINED[target][0] if target in JOINED else target
        ranks = ranks_of(spec, lora, part)
        for index, name in zip(np.ndindex(ranks.shape), adapter_names(spec, target, leaf), strict=True):
            if ranks[index] == 0:
                continue
            own = np.asarray(stack[index], np.float32).T
            if leaf != "magnitude":
                axis = 0 if leaf == "a" else 1
                own = own.compress(np.arange(own.shape[axis]) % int(ranks.max()) < ranks[index], axis)
            tensors[name] = np.ascontiguousarray(own)
    return tensors


def adapter_config(spec: ModelSpec, lora: LoraConfig, names: list[str], base_name: str) -> dict[str, Any]:
    """PEFT's settings of adapters of the linear layers `names`, joined ones among them."""
    if lora.pissa:
        more = 2**0.5 if lora.rslora else 2
        alphas = {key: more * alpha for key, alpha in (lora.alpha_pattern or {}).items()} or None
        ranks = {key: 2 * rank for key, rank in (lora.rank_pattern or {}).items()} or None
        doubled = {"rank": 2 * lora.rank, "alpha": more * lora.alpha, "rank_pattern": ranks, "alpha_pattern": alphas}
        lora = replace(lora, init="default", **doubled)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": peft_targets(spec, names, lora.layers_to_transform),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    if lora.use_dora:
        config["use_dora"] = True
    if lora.layers_to_transform is not None and isinstance(config["target_modules"], list):
        config["layers_to_transform"] = lora.layers_to_transform
    for name, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        config |= {name: pattern} if pattern else {}
    return config | (patterns(names, lora) if any(name in JOINED for name in names) else {})
