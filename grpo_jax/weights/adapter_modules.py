"""Which modules of a model have adapters, with which rank and scale: targets, layers and patterns resolved.

What PEFT would load as something else, or what is not computed here, is refused.
"""

from __future__ import annotations

import numpy as np

from grpo_jax.config import LoraConfig
from grpo_jax.config.checks import require
from grpo_jax.config.sections import LINEAR_TARGETS
from grpo_jax.models.adapters import Ratios
from grpo_jax.models.layer_kinds import DENSE, plain_part
from grpo_jax.models.parameters import ParamSpec, lora_specs
from grpo_jax.models.spec import EXPERT_LINEARS, ModelSpec
from grpo_jax.weights.fused_adapters import check_parts
from grpo_jax.weights.names import FUSED, held_stack, module_paths

JOINED_IN_PEFT = ("qwen3_5_moe_text", "qwen3_5_moe")
"""Families whose experts are one tensor in PEFT though their files may have one for each."""


def check_adapters(spec: ModelSpec, lora: LoraConfig) -> None:
    """Checks settings of adapters against the model.

    Raises:
        ConfigError: see `check_targets`, `check_names`, `check_experts` and `fused_adapters.check_parts`.
    """
    check_targets(spec, lora)
    check_parts(spec, lora)
    check_names(spec, lora)
    check_experts(spec, lora)


def check_targets(spec: ModelSpec, lora: LoraConfig) -> None:
    """Refuses adapters of experts that PEFT would load as something else.

    PEFT joins the experts' gate_proj and up_proj at twice the rank and alpha, because transformers has them in one tensor.

    Raises:
        ConfigError: a linear layer that the model does not have; one of the two without the other; or both with `rslora`, whose
            scale would change by √2; or experts that the files have in one tensor.
    """
    missing = [] if isinstance(lora.targets, str) else [name for name in lora.targets if not parts_of_target(spec, name)]
    known = [name for name in LINEAR_TARGETS if parts_of_target(spec, name)]
    fix = f"a {spec.family} model has no {', '.join(missing)}: choose from {', '.join(known)}"
    require(not missing, "lora.targets", lora.targets, fix)
    experts = [
        name
        for name in EXPERT_LINEARS
        if not is_adapted(spec, name) and not spec.dense_and_experts and name in lora.target_names and lora.targets != "all-linear"
    ]
    fix = "this model has all experts of a layer in one tensor, which is not adapted: name others, or use all-linear"
    require(not experts, "lora.targets", lora.targets, fix)
    pair = [name for name in ("gate_proj", "up_proj") if name in adapted_linears(spec, lora)]
    if not spec.experts or not pair:
        return
    fix = "PEFT adapts the experts' gate_proj and up_proj together, as transformers keeps them in one tensor: name both or neither"
    require(len(pair) == 2, "lora.targets", lora.targets, fix)
    fix = "PEFT loads the experts' gate_proj and up_proj at twice the rank, where this scale would be another: use false"
    require(not lora.rslora, "lora.rslora", lora.rslora, fix)


def check_names(spec: ModelSpec, lora: LoraConfig) -> None:
    """Raises ConfigError where no module is what a layer's number or a pattern names, or where there can be no pattern."""
    numbers = lora.layers_to_transform
    fix = f"this model has the layers 0 to {spec.layers - 1}"
    require(numbers is None or max(numbers) < spec.layers, "lora.layers_to_transform", numbers, fix)
    paths = [path for name in adapted_linears(spec, lora) for path in module_paths(spec, name)]
    for name, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for key, value in (pattern or {}).items():
            alone = LoraConfig(rank_pattern={key: 2}, rank=1)
            fix = f"no adapted module has such a path; the first one is {paths[0]}"
            require(any(alone.module_rank(path) == 2 for path in paths), f"lora.{name}.{key}", value, fix)
        fix = f"the files of {spec.family} have several linear layers in one tensor, whose patterns say how: leave it out"
        require(not pattern or spec.family not in FUSED, f"lora.{name}", pattern, fix)


def check_experts(spec: ModelSpec, lora: LoraConfig) -> None:
    """Raises ConfigError where experts have adapters with a setting that theirs cannot have."""
    experts = [name for name in adapted_linears(spec, lora) if spec.experts and name in EXPERT_LINEARS]
    if not experts:
        return
    fix = f"use {{}}, which experts ({', '.join(experts)}) can have; or name the attention's layers alone in lora.targets"
    require(not lora.use_dora, "lora.use_dora", lora.use_dora, fix.format("false"))
    require(lora.dropout == 0, "lora.dropout", lora.dropout, fix.format("0"))
    require(not lora.pissa, "lora.init", lora.init, fix.format("default"))
    own = [path for name in experts for path in module_paths(spec, name)]
    alike = {(lora.module_rank(path), lora.module_scale(path)) for path in own} == {(lora.rank, lora.scale)}
    fix = "experts have lora.rank and lora.alpha: use patterns that fit none of them"
    require(alike, "lora.rank_pattern" if lora.rank_pattern else "lora.alpha_pattern", lora.rank_pattern or lora.alpha_pattern, fix)


def adapted_linears(spec: ModelSpec, lora: LoraConfig) -> tuple[str, ...]:
    """The linear layers with adapters; see `is_adapted`."""
    return tuple(part for name in lora.target_names for part in parts_of_target(spec, name) if is_adapted(spec, part))


def is_adapted(spec: ModelSpec, part: str) -> bool:
    """Whether a linear layer can have adapters: not experts that are one tensor for PEFT, which ignores adapters of each."""
    return not held_stack(spec, part) and not (spec.family in JOINED_IN_PEFT and spec.experts > 0 and part in EXPERT_LINEARS)


def parts_of_target(spec: ModelSpec, target: str) -> list[str]:
    """The linear layers of a name, of which some layers may have one of another shape (`layer_kinds.GLOBAL`).

    Feed-forwards without experts are not among them where experts have adapters: PEFT takes the name for that of the experts.
    """
    dense = not is_adapted(spec, target)
    return [name for name in spec.linear_shapes() if plain_part(name) == target and (dense or not name.startswith(DENSE))]


def ranks_of(spec: ModelSpec, lora: LoraConfig, name: str) -> np.ndarray:
    """The rank of each module of a linear layer, in the shape of its stack: [L], or [L, E] for experts; 0 has no adapter."""
    stack = spec.stack_dims(name)[0]
    ranks = np.array([lora.module_rank(path) for path in module_paths(spec, name)], np.int32).reshape(stack)
    if lora.layers_to_transform is not None:
        ranks[~np.isin(spec.layers_with(name), lora.layers_to_transform)] = 0
    return ranks


def ratios_of(spec: ModelSpec, lora: LoraConfig) -> Ratios:
    """The targets whose scale is not `lora.scale` in every layer, with the layers' ratios to it."""
    if not (lora.rank_pattern or lora.alpha_pattern):
        return ()
    found = []
    for name in adapted_linears(spec, lora):
        scales = np.array([lora.module_scale(path) for path in module_paths(spec, name)]).reshape(spec.stack_dims(name)[0][0], -1)[
            :, 0
        ]
        if np.any(scales != lora.scale):
            found.append((name, tuple((scales / lora.scale).tolist())))
    return tuple(found)


def specs_of(spec: ModelSpec, lora: LoraConfig, names: tuple[str, ...] | None = None) -> dict[tuple[str, ...], ParamSpec]:
    """Every trained array of the adapters; the rank of a stack is the largest of its modules.

    Args:
        names: of the linear layers; None is all that have adapters.
    """
    names = adapted_linears(spec, lora) if names is None else names
    ranks = {name: int(ranks_of(spec, lora, name).max(initial=0)) for name in names}
    names = tuple(name for name in names if ranks[name])
    return lora_specs(spec, ranks, names, dora=lora.use_dora, pissa=lora.pissa)
