"""Static settings of `grpo_loss`: which loss, its clip range and its KL term."""

from __future__ import annotations

import math
from dataclasses import dataclass

CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo", "geo_mean", "clip_cov")
LOSSES = ("reinforce", "gpg", *CLIPPED_LOSSES, "kl_cov", "cispo", "sapo", "vespo", "dppo_tv", "dppo_kl")
IMPORTANCE_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_TERMS = (*KL_ESTIMATORS, "k3_corrected")


@dataclass(frozen=True)
class LossSettings:
    """Settings that `grpo_loss` is compiled for; `grpo_loss.reference` has the formulas.

    Attributes:
        loss: one of `LOSSES`. `grpo`, `bnpo`, `dr_grpo` and `dapo` differ only in the weights, which are an argument.
        beta: weight of the KL term; 0 leaves it out, and a reference is then used for the KL sum alone.
        kl: the KL term of the loss, one of `KL_TERMS`.
        epsilon, epsilon_high: clip range of the ratio, below and above 1.
        epsilon_max: `cispo`'s upper bound on the ratio.
        delta: upper bound on the ratio where the advantage is negative; None is off.
        importance_mode: one of `IMPORTANCE_MODES`: the weight π_old/π_sampler of the token or of its sequence, bounded (truncate)
            or set to 0 out of its bounds (mask).
        importance_floor, importance_cap: bounds of the weight; None is no bound, and without either there is no weight.
        off_policy_threshold: of off-policy sequence masking, nats a token; None is off.

    Raises:
        ValueError: an unknown choice, or a number out of its range.
    """

    loss: str = "dapo"
    beta: float = 0.0
    kl: str = "k3_corrected"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    epsilon_max: float = 5.0
    delta: float | None = None
    importance_mode: str = "token_truncate"
    importance_floor: float | None = None
    importance_cap: float | None = None
    off_policy_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}: choose from {', '.join(LOSSES)}")
        if self.kl not in KL_TERMS:
            raise ValueError(f"kl is {self.kl!r}: choose from {', '.join(KL_TERMS)}")
        if self.importance_mode not in IMPORTANCE_MODES:
            raise ValueError(f"importance_mode is {self.importance_mode!r}: choose from {', '.join(IMPORTANCE_MODES)}")
        bound = 1 + self.epsilon_high
        checks = {
            "beta": (self.beta >= 0, "use 0 (no KL term) or a small positive number such as 0.04"),
            "epsilon": (0 <= self.epsilon < 1, "use a number from 0 up to 1, such as 0.2"),
            "epsilon_high": (self.epsilon_high >= 0, "use 0 or a positive number such as 0.28"),
            "epsilon_max": (self.epsilon_max > 0, "use a positive cap such as 5"),
            "delta": (self.delta is None or self.delta > bound, f"use more than 1 + epsilon_high = {bound:g}, or None"),
            "importance_cap": (self.importance_cap is None or self.importance_cap > 0, "use a positive cap such as 2, or None"),
            "importance_floor": (
                self.importance_floor is None or 0 < self.importance_floor < (self.importance_cap or math.inf),
                "use a positive number below importance_cap, such as 0.5, or None",
            ),
            "off_policy_threshold": (
                self.off_policy_threshold is None or self.off_policy_threshold > 0,
                "use a positive number of nats such as 0.5, or None",
            ),
        }
        for name, (right, fix) in checks.items():
            if not right:
                raise ValueError(f"{name} is {self.__dict__[name]:g}: {fix}")

    @property
    def has_importance(self) -> bool:
        """Whether the policy term has an importance weight."""
        return self.importance_cap is not None or self.importance_floor is not None

    @property
    def needs_sampler(self) -> bool:
        """Whether the log-probabilities that the sampler computed are needed."""
        return self.has_importance or self.off_policy_threshold is not None
