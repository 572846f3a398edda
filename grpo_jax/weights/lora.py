"""LoRA adapters: initial values, and reading and writing PEFT's folders (`adapter_config.json`, `adapter_model.safetensors`).

Adapters are the `lora` collection, float32, [L, in, r] and [L, r, out] per target. Dropout, biases, ranks that differ by layer and
DoRA are not supported, and refused where a folder has them.

In a mixture of experts every expert has its adapters, [L, E, in, r] and [L, E, r, out], all of one rank; `all-linear` is attention
and experts, never the router. A folder has one pair of tensors per expert, as PEFT wrote them when each expert was a module. vLLM
and PEFT read these, and PEFT joins them for today's transformers, where all experts are one parameter. PEFT's own training of
experts (`target_parameters`) shares one A between gate_proj and up_proj, and is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import LoraConfig
from grpo_jax.config.checks import require, show
from grpo_jax.config.sections import LINEAR_TARGETS
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.models.config_values import checked_flag, checked_number, whole_number
from grpo_jax.models.linear import JOINED
from grpo_jax.models.spec import EXPERT_LINEARS, ModelError, ModelSpec, ParamSpec, flatten, lora_specs, nest
from grpo_jax.runtime.digests import DIGESTS, DamagedError, verify_digests, write_digests
from grpo_jax.runtime.files import replacing
from grpo_jax.types import Params
from grpo_jax.weights.fused_adapters import check_parts, file_shape, joined_pairs, part_of, patterns, stacked
from grpo_jax.weights.hf import find_folder, open_shard, read_json, require_finite, shape_of
from grpo_jax.weights.names import fused_name, held_stack, module_path, module_paths, root

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings of a PEFT config that are not supported, with the values that mean "not used".
NOT_USED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
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


def check_targets(spec: ModelSpec, lora: LoraConfig) -> None:
    """Refuses adapters of experts that PEFT would load as something else.

    PEFT joins the experts' gate_proj and up_proj at twice the rank and alpha, because transformers has them in one tensor.

    Raises:
        ConfigError: a linear layer that the model does not have; one of the two without the other; or both with `rslora`, whose
            scale would change by √2; or experts that the files have in one tensor.
    """
    missing = [] if isinstance(lora.targets, str) else [name for name in lora.targets if name not in spec.linear_shapes()]
    own = [name for name in LINEAR_TARGETS if name in spec.linear_shapes()]
    fix = f"a {spec.family} model has no {', '.join(missing)}: choose from {', '.join(own)}"
    require(not missing, "lora.targets", lora.targets, fix)
    experts = [
        name for name in EXPERT_LINEARS if held_stack(spec, name) and name in lora.target_names and lora.targets != "all-linear"
    ]
    fix = "this model's files have all experts of a layer in one tensor, which is not adapted: name others, or use all-linear"
    require(not experts, "lora.targets", lora.targets, fix)
    pair = [name for name in ("gate_proj", "up_proj") if name in adapted_linears(spec, lora)]
    if not spec.experts or not pair:
        return
    fix = "PEFT adapts the experts' gate_proj and up_proj together, as transformers keeps them in one tensor: name both or neither"
    require(len(pair) == 2, "lora.targets", lora.targets, fix)
    fix = "PEFT loads the experts' gate_proj and up_proj at twice the rank, where this scale would be another: use false"
    require(not lora.rslora, "lora.rslora", lora.rslora, fix)


def adapted_linears(spec: ModelSpec, lora: LoraConfig) -> tuple[str, ...]:
    """The linear layers with adapters: with `all-linear` all but experts that are one tensor, as in PEFT."""
    return tuple(name for name in lora.target_names if name in spec.linear_shapes() and not held_stack(spec, name))


def init_lora(spec: ModelSpec, lora: LoraConfig, key: jax.Array) -> Params:
    """Initial adapters, as PEFT's: A uniform within ±1/√in, B zero, so that the policy starts as the base.

    Raises:
        ConfigError: see `check_targets` and `fused_adapters.check_parts`.
    """
    check_targets(spec, lora)
    check_parts(spec, lora)
    leaves: dict[tuple[str, ...], jax.Array] = {}
    for number, (path, p) in enumerate(lora_specs(spec, lora.rank, adapted_linears(spec, lora)).items()):
        if path[-1] == "a":
            bound = p.shape[-2] ** -0.5
            leaves[path] = jax.random.uniform(jax.random.fold_in(key, number), p.shape, jnp.float32, -bound, bound)
        else:
            leaves[path] = jnp.zeros(p.shape, jnp.float32)
    return nest(leaves)


def adapter_names(spec: ModelSpec, target: str, leaf: str) -> list[str]:
    """PEFT's tensor names of one adapter matrix, layer by layer and, within a layer, expert by expert."""
    return [f"base_model.model.{module}.lora_{leaf.upper()}.weight" for module in module_paths(spec, target)]


def peft_target(spec: ModelSpec, target: str) -> str:
    """Name of a linear layer in PEFT's `target_modules`: `gate_proj` is `w1` in Mixtral."""
    return module_path(spec, target).rsplit(".", 1)[-1]


def peft_targets(spec: ModelSpec, names: list[str]) -> list[str] | str:
    """PEFT's `target_modules`: names of modules; where others have these names too, a pattern of their paths.

    Others are modules of a vision tower, and linear layers without adapters: LFM2 has two `out_proj`.
    """
    targets = sorted({peft_target(spec, name) for name in names})
    others = {
        peft_target(spec, name)
        for name in LINEAR_TARGETS
        if name in spec.linear_shapes() and name not in names and not fused_name(spec, name)
    }
    if root(spec) == "model" and not others.intersection(targets):
        return targets
    paths = sorted({re.escape(module_path(spec, name)) for name in names} if root(spec) == "model" else targets)
    return rf"{re.escape(root(spec))}\.layers\..*\.({'|'.join(paths)})"


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
    split = tuple(name for name in JOINED if isinstance(config.get("rank_pattern"), dict) and name in config["rank_pattern"])
    for name, allowed in NOT_USED.items():
        if config.get(name) not in allowed and not (split and name.endswith("_pattern")):
            raise ModelError(f"{where}: {name} = {show(config[name])} is not supported; train or merge that adapter with PEFT")
    # These initialisations change the base weights too, so the adapter belongs to a base that is not available.
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ModelError(
            f"{where}: init_lora_weights = {show(start)} changed the base too; convert or merge that adapter with PEFT"
        )
    lora = LoraConfig(
        rank=whole_number(where, "r", config.get("r")),
        alpha=checked_number(where, "lora_alpha", config.get("lora_alpha")),
        rslora=checked_flag(where, "use_rslora", config.get("use_rslora") or False),
        adapter=str(folder),
    )
    for name, expected in patterns(list(split), lora).items():
        if split and config.get(name) != expected:
            raise ModelError(f"{where}: {name} = {show(config.get(name))} is not supported; train or merge that adapter with PEFT")
    return lora, split


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
        leaves = {path: read_leaf(folder, shard, spec, path, p.shape, lora.rank) for path, p in specs.items()}
    targets = list(dict.fromkeys(path[1] for path in specs))
    return nest(leaves), LoraConfig(rank=lora.rank, alpha=lora.alpha, rslora=lora.rslora, targets=targets, adapter=str(source))


def check_adapter(
    folder: Path, shapes: dict[str, tuple[int, ...]], spec: ModelSpec, lora: LoraConfig, split: tuple[str, ...]
) -> dict[tuple[str, ...], ParamSpec]:
    """Checks the names and shapes in an adapter's header, before any value is read.

    Returns:
        The matrices that the adapter has, by their path.

    Raises:
        ModelError: a tensor is missing, too many, or has another shape.
    """
    found = {name.removesuffix(f".lora_{leaf}.weight") for name in shapes for leaf in "AB"}
    own = {t: {f"base_model.model.{path}" for path in module_paths(spec, t)} for t in LINEAR_TARGETS if t in spec.linear_shapes()}
    targets = [t for t, modules in own.items() if not modules.isdisjoint(found)]
    specs, unused = lora_specs(spec, lora.rank, tuple(targets)), set(shapes)
    for path, p in specs.items():
        expected = file_shape(spec, path[1], path[2], p.shape, split=fused_name(spec, path[1]) in split)
        for name in adapter_names(spec, path[1], path[2]):
            if name not in shapes:
                raise ModelError(
                    f"{folder}: tensor {name} is missing: the adapter does not cover every layer of this {spec.layers}-layer model"
                )
            unused.discard(name)
            if shapes[name] != expected:
                raise ModelError(
                    f"{folder}: tensor {name} has shape {shapes[name]}; this model and rank {lora.rank} ask for {expected}"
                )
    if unused:
        raise ModelError(
            f"{folder}: {len(unused)} tensors do not belong to this {spec.family} model: {', '.join(sorted(unused)[:3])}"
        )
    if not specs:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} holds no adapter")
    return specs


def read_leaf(folder: Path, shard: Any, spec: ModelSpec, path: tuple[str, ...], shape: tuple[int, ...], rank: int) -> jax.Array:
    """Reads one stack of adapter matrices in this model's (in, out) order, float32; ModelError where a value is not finite."""
    parts, where = [], folder / ADAPTER_WEIGHTS
    for name in adapter_names(spec, path[1], path[2]):
        tensor = shard.get_tensor(name)
        require_finite(where, name, tensor)
        parts.append(part_of(spec, path[1], path[2], tensor, rank, where))
    return stacked(parts, shape)


def verify_export(folder: Path) -> None:
    """Raises ModelError where a folder has digests, as those that this package writes, and the adapter differs from them."""
    if not (folder / DIGESTS).exists():
        return
    try:
        verify_digests(folder, only=(ADAPTER_CONFIG, ADAPTER_WEIGHTS))  # the others are not read, nor downloaded
    except DamagedError as error:
        raise ModelError(f"{error}; export it again, or remove {folder / DIGESTS} where the change was intended") from error


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

    tensors: dict[str, np.ndarray] = {}
    pairs = joined_pairs(spec, adapters)
    for path, leaf in flatten(pairs):
        matrices = np.asarray(jax.device_get(leaf), np.float32).reshape(-1, *leaf.shape[-2:])
        for name, matrix in zip(adapter_names(spec, *path), matrices, strict=True):
            tensors[name] = np.ascontiguousarray(matrix.T)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DIGESTS).unlink(missing_ok=True)  # those of files that are about to be replaced
    with replacing(folder / ADAPTER_WEIGHTS) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "target_modules": peft_targets(spec, list(pairs)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    if any(name in JOINED for name in pairs):
        config |= patterns(list(pairs), lora)
    with replacing(folder / ADAPTER_CONFIG) as unfinished:
        unfinished.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_digests(folder, [ADAPTER_CONFIG, ADAPTER_WEIGHTS, *([] if tokenizer is None else tokenizer.save(folder))])
