"""Named sets of objective settings, as a paper or another trainer uses them.

A preset holds only what its source says about the objective. Learning rate, lengths and group size stay the user's, and a setting
that the user gives wins over the preset.
"""

from __future__ import annotations

from typing import Any, Literal

PresetName = Literal["deepseekmath", "dr_grpo", "dapo", "gspo", "gmpo", "gpg", "cispo", "trl", "unsloth", "plain"]

OBJECTIVE_DEFAULTS: dict[str, Any] = {
    "loss": "dapo",
    "beta": 0.04,
    "kl": "k3_corrected",
    "kl_in_reward": False,
    "epsilon": 0.2,
    "epsilon_high": None,
    "epsilon_max": 5.0,
    "advantage_eps": 1e-4,
    "scale_rewards": "group",
    "num_iterations": 1,
    "mask_truncated": False,
}
"""Value of each objective setting that neither the user nor the preset gives; `epsilon_high` None means the same as epsilon."""

PRESETS: dict[str, dict[str, Any]] = {
    # Shao et al. 2024, DeepSeekMath, https://arxiv.org/abs/2402.03300: equation 3 (mean over each output's tokens, then over
    # outputs), equation 4 (k3), section 4.2 (KL coefficient 0.04, one update per batch). Its epsilon is not printed; 0.2 is PPO's.
    "deepseekmath": {"loss": "grpo", "kl": "k3", "beta": 0.04, "epsilon": 0.2, "scale_rewards": "group", "num_iterations": 1},
    # Liu et al. 2025, Understanding R1-Zero-Like Training, https://arxiv.org/abs/2503.20783, section 3: neither the division by
    # the output's length nor the one by the group's deviation, and no KL term.
    "dr_grpo": {"loss": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "epsilon": 0.2},
    # Yu et al. 2025, DAPO, https://arxiv.org/abs/2503.14476: section 3.1 (clip-higher, 0.2 and 0.28), 3.3 (token-level loss),
    # 3.4 (truncated samples masked), 2.3 (no KL term). Its dynamic sampling and soft over-long penalty are not objective settings.
    "dapo": {"loss": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0, "scale_rewards": "group", "mask_truncated": True},
    # Zheng et al. 2025, GSPO, https://arxiv.org/abs/2507.18071: section 4.1 (sequence ratio), 5.1 (clip ranges 3e-4 and 4e-4).
    "gspo": {"loss": "gspo", "epsilon": 3e-4, "epsilon_high": 4e-4, "beta": 0.0, "scale_rewards": "group"},
    # Zhao et al. 2025, GMPO, https://arxiv.org/abs/2507.20673: geometric mean of token ratios, each within exp(-0.4) to exp(0.4).
    "gmpo": {"loss": "geo_mean", "epsilon": 0.4, "epsilon_high": 0.4, "beta": 0.0, "scale_rewards": "group"},
    # Chu et al. 2025, GPG, https://arxiv.org/abs/2504.02546: no ratio, no clipping, no KL term, no division by the deviation.
    "gpg": {"loss": "gpg", "beta": 0.0, "scale_rewards": "none"},
    # MiniMax 2025, MiniMax-M1, https://arxiv.org/abs/2506.13585, section 3.1 (clipped importance weight, no KL term, group
    # deviation). The paper tunes the upper bound without printing it; 5 is ScaleRL's, https://arxiv.org/abs/2510.13786.
    "cispo": {"loss": "cispo", "epsilon_max": 5.0, "beta": 0.0, "scale_rewards": "group"},
    # Defaults of TRL 1.16's GRPOConfig, https://huggingface.co/docs/trl/grpo_trainer.
    "trl": {
        "loss": "dapo",
        "beta": 0.0,
        "kl": "k3_corrected",
        "epsilon": 0.2,
        "advantage_eps": 1e-4,
        "scale_rewards": "group",
        "num_iterations": 1,
        "mask_truncated": False,
    },
    # Defaults of the GRPOConfig that Unsloth puts instead of TRL's (its generated trainer, https://github.com/unslothai/unsloth).
    "unsloth": {
        "loss": "bnpo",
        "beta": 0.001,
        "kl": "k3",
        "epsilon": 0.2,
        "advantage_eps": 1e-4,
        "scale_rewards": "group",
        "num_iterations": 1,
        "mask_truncated": False,
    },
    # The simplest form of the formulas: advantage (r - mean) / (std + 1e-8) with ddof 1, loss -mean(A·logπ) + β·KL, where KL is
    # the sum over a completion's tokens of logπ - logπ_ref (k1, http://joschu.net/blog/kl-approx.html).
    "plain": {"loss": "reinforce", "kl": "k1", "beta": 0.04, "advantage_eps": 1e-8, "scale_rewards": "group", "num_iterations": 1},
}
"""Preset name → the objective settings in which it differs from `OBJECTIVE_DEFAULTS`, or that its source names."""
