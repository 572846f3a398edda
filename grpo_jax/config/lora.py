"""The settings section `lora`: the adapters, which may differ from layer to layer, and how they start and are trained.

The names are those of PEFT's `LoraConfig` where it has them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

from grpo_jax.config.checks import check_types, require
from grpo_jax.config.sections import LINEAR_TARGETS

Number = TypeVar("Number", int, float)

LARGEST_RANK, LARGEST_ALPHA = 2**16, 1e6
LONGEST_KEY = 200
MOST_REPETITIONS = 3
"""What a key of a pattern may have, and no group that is repeated: matching takes little time whoever wrote the key."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685): W x + scale · B A x, with W frozen.

    Args:
        rank: Rank r of the adapters; 0 trains every weight of the model instead (full fine-tuning).
        alpha: The scale is alpha / rank, or alpha / sqrt(rank) with rslora.
        targets: Names of the linear layers that get adapters, or `all-linear`. In a mixture of experts gate_proj, up_proj and
            down_proj are those of every expert; the attention layers alone are far fewer. The router never gets an adapter.
            Recurrent layers have in_proj or in_proj_qkv, in_proj_z, ..., and out_proj. An expert that all tokens share never gets
            an adapter.
        rslora: Rank-stabilised scale (https://arxiv.org/abs/2312.03732).
        adapter: Folder or hub id of a PEFT adapter to start from; a frozen copy of it is the reference. rank, alpha, targets,
            rslora, use_dora, layers_to_transform and the patterns are then read from the adapter; dropout and plus_ratio are not.
        dropout: Share of the elements of x that B A x leaves out, in updates alone: completions, evaluations, the old and the
            reference's log-probabilities are computed without. Fixed by train.seed, the update, and each token's place in its text,
            so that neither micro-batches nor a resume change it. The update's policy then differs from the one that sampled by
            this noise (in ratio/*), which clipping sees; sampling/logp_difference does not have it. Costs a forward pass.
        use_dora: Train a magnitude for every output too: m · (W + scale · B A) / ‖W + scale · B A‖ (DoRA,
            https://arxiv.org/abs/2402.09353). Not for experts.
        plus_ratio: Learning rate of B as a multiple of optim.learning_rate, which A has (LoRA+, https://arxiv.org/abs/2402.12354,
            which uses 16 or so).
        init: Where adapters start: `default` is A random and B 0. `pissa` is the r largest singular values and vectors of W
            (https://arxiv.org/abs/2404.02948), with what is left of W next to them; `pissa_niter_N` finds these by N iterations
            of a randomised method, which is quicker. The model starts unchanged. An export has twice the rank, as PEFT's.
        layers_to_transform: Numbers of the layers that get adapters, from 0; null is all of them.
        rank_pattern: Ranks of modules that have another one, such as {v_proj: 8, layers.0.mlp.down_proj: 4}. A name is the end of a
            module's path, or a regular expression of it; the first that fits counts.
        alpha_pattern: The same of alpha.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | list[str] = "all-linear"
    rslora: bool = False
    adapter: str | None = None
    dropout: float = 0.0
    use_dora: bool = False
    plus_ratio: float = 1.0
    init: str = "default"
    layers_to_transform: list[int] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None

    def __post_init__(self) -> None:
        check_types(self, "lora")
        require(
            0 <= self.rank <= LARGEST_RANK,
            "lora.rank",
            self.rank,
            "use 8, 16, 32, ..., or 0 to train every weight; at most 65,536",
        )
        fix = "use a positive number, often twice the rank; at most 1,000,000"
        require(0 < self.alpha <= LARGEST_ALPHA, "lora.alpha", self.alpha, fix)
        names = [] if isinstance(self.targets, str) else self.targets
        for name in names:
            require(name in LINEAR_TARGETS, "lora.targets", name, f"choose from {', '.join(LINEAR_TARGETS)}")
        if isinstance(self.targets, str):
            fix = f"use all-linear, or a list of names from {', '.join(LINEAR_TARGETS)}"
            require(self.targets == "all-linear", "lora.targets", self.targets, fix)
        else:
            require(bool(self.targets), "lora.targets", self.targets, "name at least one linear layer, or use all-linear")
        self._check_training()
        self._check_modules()
        if self.rank == 0 and self.adapter is None:
            unused = {"dropout": 0.0, "use_dora": False, "plus_ratio": 1.0, "init": "default"}
            unused |= dict.fromkeys(("layers_to_transform", "rank_pattern", "alpha_pattern"))
            for name, default in unused.items():
                value = getattr(self, name)
                require(value == default, f"lora.{name}", value, "with lora.rank 0 there are no adapters: leave it out")

    def _check_training(self) -> None:
        """Checks dropout, LoRA+ and the start."""
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "use a share from 0 (none) up to 1, such as 0.05")
        fix = "use 1 (the learning rate of A) or more, such as 16"
        require(1 <= self.plus_ratio <= LARGEST_ALPHA, "lora.plus_ratio", self.plus_ratio, fix)
        known = self.init in ("default", "pissa") or re.fullmatch(r"pissa_niter_[1-9]\d{0,2}", self.init) is not None
        require(known, "lora.init", self.init, "use default, pissa, or pissa_niter_ with a number of iterations, as pissa_niter_16")
        fix = "an adapter that is read has its own values: use default, or leave out lora.adapter"
        require(self.adapter is None or not self.pissa, "lora.init", self.init, fix)
        fix = "use 0 with lora.init pissa: the adapter holds the largest part of the weights, which dropout would take away"
        require(self.dropout == 0 or not self.pissa, "lora.dropout", self.dropout, fix)

    def _check_modules(self) -> None:
        """Checks what differs from module to module."""
        layers = self.layers_to_transform
        if layers is not None:
            fix = "use different numbers of layers, from 0, or null for all"
            require(bool(layers) and min(layers) >= 0 and len(set(layers)) == len(layers), "lora.layers_to_transform", layers, fix)
        for name, pattern, largest in (
            ("rank_pattern", self.rank_pattern, LARGEST_RANK),
            ("alpha_pattern", self.alpha_pattern, LARGEST_ALPHA),
        ):
            for key, value in (pattern or {}).items():
                fix = "name the end of a module's path, such as v_proj or layers.0.mlp.down_proj, or a simple regular expression"
                require(valid_key(key), f"lora.{name}", key, fix)
                low = 1 if name == "rank_pattern" else 0
                fix = (
                    f"use a number of at least 1, at most {largest:,}" if low else f"use a positive number, at most {largest:,.0f}"
                )
                require(value >= low and 0 < value <= largest, f"lora.{name}.{key}", value, fix)

    @property
    def pissa(self) -> bool:
        """Whether adapters start as the largest part of the weights."""
        return self.init != "default"

    @property
    def scale(self) -> float:
        """The factor that B A x is multiplied by, where no pattern says otherwise."""
        return scale_of(self.rank, self.alpha, self.rslora)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The names of the target layers, `all-linear` resolved."""
        return LINEAR_TARGETS if isinstance(self.targets, str) else tuple(self.targets)

    def module_rank(self, module: str) -> int:
        """The rank of a module, by its path in the model, such as `model.layers.0.self_attn.q_proj`."""
        return first_match(self.rank_pattern, module, self.rank)

    def module_scale(self, module: str) -> float:
        """The scale of a module, by its path in the model."""
        return scale_of(self.module_rank(module), first_match(self.alpha_pattern, module, self.alpha), self.rslora)


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """The factor that B A x is multiplied by."""
    return alpha / (rank**0.5 if rslora else rank)


def first_match(pattern: dict[str, Number] | None, module: str, usual: Number) -> Number:
    """The value of the first key that is the end of a module's path, from a dot on, as a regular expression; else `usual`."""
    return next((value for key, value in (pattern or {}).items() if re.fullmatch(rf"(.*\.)?({key})", module)), usual)


def valid_key(key: str) -> bool:
    """Whether a key is a regular expression that is matched quickly."""
    repetitions = len(re.findall(r"[+*?{]", key))
    if not key or len(key) > LONGEST_KEY or repetitions > MOST_REPETITIONS or re.search(r"\)[+*?{]", key):
        return False
    try:
        re.compile(key)
    except (re.error, OverflowError, RecursionError):
        return False
    return True
