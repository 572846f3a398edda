"""Static settings of `grpo_loss`: which loss, its clip range and its KL term."""

from __future__ import annotations

from dataclasses import dataclass

LOSSES = ("reinforce", "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo")
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
        importance_cap: cap of the weight π_old/π_sampler; None applies none.

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
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}: choose from {', '.join(LOSSES)}")
        if self.kl not in KL_TERMS:
            raise ValueError(f"kl is {self.kl!r}: choose from {', '.join(KL_TERMS)}")
        bound = 1 + self.epsilon_high
        checks = {
            "beta": (self.beta >= 0, "use 0 (no KL term) or a small positive number such as 0.04"),
            "epsilon": (0 <= self.epsilon < 1, "use a number from 0 up to 1, such as 0.2"),
            "epsilon_high": (self.epsilon_high >= 0, "use 0 or a positive number such as 0.28"),
            "epsilon_max": (self.epsilon_max > 0, "use a positive cap such as 5"),
            "delta": (self.delta is None or self.delta > bound, f"use more than 1 + epsilon_high = {bound:g}, or None"),
            "importance_cap": (self.importance_cap is None or self.importance_cap > 0, "use a positive cap such as 2, or None"),
        }
        for name, (right, fix) in checks.items():
            if not right:
                raise ValueError(f"{name} is {self.__dict__[name]:g}: {fix}")
