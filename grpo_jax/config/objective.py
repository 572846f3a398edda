"""The settings section `objective`: policy loss, advantages and KL term. `presets.py` holds the named sets of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from grpo_jax.config.checks import check_types, require, require_choice
from grpo_jax.config.presets import OBJECTIVE_DEFAULTS, PRESETS, PresetName

LossName = Literal[
    "reinforce",
    "gpg",
    "grpo",
    "bnpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "luspo",
    "geo_mean",
    "clip_cov",
    "kl_cov",
    "cispo",
    "sapo",
    "vespo",
    "dppo_tv",
    "dppo_kl",
]

ROW_LOSSES = ("gspo", "luspo", "geo_mean", "vespo", "gpg")
"""Losses that need one advantage a completion: their ratio, their weight or their factor belongs to all of its tokens."""

ADAPTIVE_ENTROPY = {"entropy_coef_delta": 0.005, "entropy_coef_min": 0.0, "entropy_coef_max": 1.0}
"""Settings that have an effect only with `entropy_target`, and their defaults."""

FROM_PRESET: Any = None
"""Default of a setting that `ObjectiveConfig` fills in from the preset."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The training objective: advantages, policy loss and KL term. A setting that is left out is the preset's, else the default.

    Args:
        preset: Named set of the settings below; see `grpo_jax.config.presets`.
        loss: reinforce, gpg, grpo, bnpo, dr_grpo, dapo, gspo, luspo, geo_mean, clip_cov, kl_cov, cispo, sapo, vespo, dppo_tv
            or dppo_kl; see `grpo_jax.learner.loss`. Default dapo.
        beta: Weight of the KL term; 0 computes no reference log-probabilities. Default 0.04.
        kl: KL term in the loss: k1, k2 or k3 (http://joschu.net/blog/kl-approx.html), or k3_corrected: k3 times the ratio, which
            has the gradient of the KL divergence. Default k3_corrected.
        kl_in_reward: Subtract beta times the completion's summed k1 from its reward; the loss has no KL term. Default false.
        epsilon: Clip range of the ratio below 1; of its logarithm in geo_mean, of the divergence in dppo. Default 0.2.
        epsilon_high: Clip range of the ratio above 1. Default: the same as epsilon.
        epsilon_max: Upper bound on the ratio in cispo, an absolute number. Default 5.
        cov_share: Share of a batch's tokens that clip_cov and kl_cov hold back. Default 2e-4.
        top_entropy: Share of a batch's tokens, those of the highest entropy, that have a policy term; below 1 it costs one more
            forward pass. Default 1.
        entropy_coef: Weight of the entropy bonus, the mean entropy of the distribution at each trained token, which the loss
            subtracts; with entropy_target the first weight. The update then computes the logits once more. Default 0.
        entropy_target: Entropy in nats a token that the weight adapts to: it rises by entropy_coef_delta in a step whose entropy is
            below, falls where it is above, and the bonus acts only where it is not above; null adapts nothing.
        entropy_coef_delta: Change of the weight in a step where it adapts. Default 0.005.
        entropy_coef_min: Lower bound of the weight where it adapts. Default 0.
        entropy_coef_max: Upper bound of the weight where it adapts. Default 1.
        delta: Upper bound on the ratio where the advantage is negative (two-sided clipping); null applies none.
        advantage: How rewards of a group are compared: `group` is (reward - mean) / standard deviation; rloo, opo, maxrl and
            pass_at_k (`grpo_jax.learner.baselines`) divide by no deviation. Default group.
        pass_k: k of pass_at_k, from 2 to rollout.num_generations. Default 4.
        normalize_each_reward: Normalise every reward function within its group before they are added (GDPO); scale_rewards is then
            `batch` where it is left out. Default false.
        credit: What an advantage is given to: the whole `episode`, by the sum of its turns' rewards, or each `turn` of the model,
            by the environment's rewards from this turn on, compared with the group's other episodes at the same turn; see
            `grpo_jax.learner.turn_credit`. Default episode.
        turn_discount: With credit turn, factor of a reward for each turn that it comes later; 0 counts a turn's own reward alone.
            Default 1.
        advantage_eps: Added to the standard deviation that advantages are divided by. Default 1e-4.
        scale_rewards: Standard deviation that advantages are divided by: of the `group`, of the `batch`, or `none`. Default group,
            and none where `advantage` is not `group`.
        num_iterations: Optimiser updates on each batch of completions. Default 1.
        importance_mode: Importance weight of the policy term, trainer against sampler: of each token or of the whole sequence,
            bounded (token_truncate, sequence_truncate) or set to 0 out of its bounds (token_mask, sequence_mask).
        importance_floor: Lower bound of the importance weight; null is none.
        importance_cap: Upper bound of the importance weight; null is none, and without any bound there is no weight.
        off_policy_threshold: Leave completions with a negative advantage out of the policy term where the policy has moved away
            from the sampler by more than this, in nats a token (off-policy sequence masking); null leaves out none.
        match_sampling: Compute the policy's log-probabilities under the distribution that completions are drawn from: after top_p,
            top_k, min_p and the ban on stop tokens before rollout.min_completion_length. False uses the untruncated distribution,
            as TRL does, and the ratio is then only approximate. The KL term always compares untruncated distributions.
        router_aux_coef: Weight of the load-balancing loss of a mixture of experts (https://arxiv.org/abs/2101.03961, eq. 4), over
            the tokens that predict trained ones; it costs one more forward pass. null takes router_aux_loss_coef of config.json
            where that says output_router_logits, and else 0, as TRL does.
        mask_truncated: Leave completions without a stop token out of the loss. Default false.
    """

    preset: PresetName | None = None
    loss: LossName = FROM_PRESET
    beta: float = FROM_PRESET
    kl: Literal["k1", "k2", "k3", "k3_corrected"] = FROM_PRESET
    kl_in_reward: bool = FROM_PRESET
    epsilon: float = FROM_PRESET
    epsilon_high: float = FROM_PRESET
    epsilon_max: float = FROM_PRESET
    cov_share: float = 2e-4
    top_entropy: float = 1.0
    entropy_coef: float = 0.0
    entropy_target: float | None = None
    entropy_coef_delta: float = 0.005
    entropy_coef_min: float = 0.0
    entropy_coef_max: float = 1.0
    delta: float | None = None
    advantage: Literal["group", "rloo", "opo", "maxrl", "pass_at_k"] = "group"
    pass_k: int = 4
    normalize_each_reward: bool = False
    credit: Literal["episode", "turn"] = "episode"
    turn_discount: float = 1.0
    advantage_eps: float = FROM_PRESET
    scale_rewards: Literal["group", "batch", "none"] = FROM_PRESET
    num_iterations: int = FROM_PRESET
    importance_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate"
    importance_floor: float | None = None
    importance_cap: float | None = None
    off_policy_threshold: float | None = None
    match_sampling: bool = True
    router_aux_coef: float | None = None
    mask_truncated: bool = FROM_PRESET

    def __post_init__(self) -> None:
        if self.preset is not None:
            require_choice("objective.preset", self.preset, PRESETS)
        chosen = dict(PRESETS[self.preset] if self.preset is not None else {})
        if self.advantage != "group":
            chosen["scale_rewards"] = "none"
        elif self.normalize_each_reward:
            chosen["scale_rewards"] = "batch"
        for name, default in OBJECTIVE_DEFAULTS.items():
            if self.__dict__[name] is None:
                object.__setattr__(self, name, chosen.get(name, default))
        if self.epsilon_high is None:
            object.__setattr__(self, "epsilon_high", self.epsilon)
        check_types(self, "objective")
        require(self.beta >= 0, "objective.beta", self.beta, "use 0 (no KL term) or a small positive number such as 0.04")
        require(0 <= self.epsilon < 1, "objective.epsilon", self.epsilon, "use a number from 0 up to 1, such as 0.2")
        require(self.epsilon_high >= 0, "objective.epsilon_high", self.epsilon_high, "use a positive number such as 0.28")
        require(self.epsilon_max > 0, "objective.epsilon_max", self.epsilon_max, "use a positive cap such as 5")
        require(0 < self.cov_share < 1, "objective.cov_share", self.cov_share, "use a small share such as 2e-4")
        require(
            0 < self.top_entropy <= 1, "objective.top_entropy", self.top_entropy, "use a share such as 0.2, or 1 for all tokens"
        )
        chooses = self.loss in ("clip_cov", "kl_cov") and self.top_entropy < 1
        require(not chooses, "objective.top_entropy", self.top_entropy, f"use 1: loss {self.loss} chooses tokens by covariance")
        self._check_entropy()
        if self.delta is not None:
            bound = 1 + self.epsilon_high
            require(self.delta > bound, "objective.delta", self.delta, f"use more than 1 + epsilon_high = {bound:g}, or null")
        eps = self.advantage_eps
        require(eps >= 0, "objective.advantage_eps", eps, "use a small positive number such as 1e-4")
        unscaled = self.advantage == "group" or self.scale_rewards == "none"
        fix = f"leave it out, or use none: advantage {self.advantage} divides by no standard deviation"
        require(unscaled, "objective.scale_rewards", self.scale_rewards, fix)
        require(self.pass_k >= 2, "objective.pass_k", self.pass_k, "use 2 or more; the mean reward, k = 1, is advantage rloo")
        if self.normalize_each_reward:
            fix = "use advantage group: normalised rewards have no scale and are 0 on average"
            require(self.advantage == "group", "objective.advantage", self.advantage, fix)
            fix = "use false: beta is in units of the reward, which normalize_each_reward removes"
            require(not self.kl_in_reward, "objective.kl_in_reward", self.kl_in_reward, fix)
        self._check_credit()
        router = self.router_aux_coef
        fix = "use 0 (off) or a small positive weight such as 0.001, or null for the model's own"
        require(router is None or router >= 0, "objective.router_aux_coef", router, fix)
        require(self.num_iterations >= 1, "objective.num_iterations", self.num_iterations, "use 1 or more")
        if self.importance_cap is not None:
            require(
                self.importance_cap > 0, "objective.importance_cap", self.importance_cap, "use a positive cap such as 2, or null"
            )

        fix = f"leave it out: loss {self.loss} compares the policy with the sampler already"
        against_sampler = self.loss in ("vespo", "dppo_tv", "dppo_kl")
        require(not (against_sampler and self.importance_cap), "objective.importance_cap", self.importance_cap, fix)
        require(not (against_sampler and self.importance_floor), "objective.importance_floor", self.importance_floor, fix)
        floor, threshold = self.importance_floor, self.off_policy_threshold
        if floor is not None:
            require(floor > 0, "objective.importance_floor", floor, "use a positive bound such as 0.5, or null")
            below = self.importance_cap is None or floor < self.importance_cap
            require(below, "objective.importance_floor", floor, f"use less than importance_cap ({self.importance_cap}), or null")
        bounded = floor is not None or self.importance_cap is not None
        fix = "also set objective.importance_cap or objective.importance_floor; without a bound there is no importance weight"
        require(bounded or self.importance_mode == "token_truncate", "objective.importance_mode", self.importance_mode, fix)
        if threshold is not None:
            require(
                threshold > 0, "objective.off_policy_threshold", threshold, "use a positive number of nats such as 0.5, or null"
            )

    def _check_credit(self) -> None:
        """Checks the settings of advantages by turn."""
        discount, by_turn = self.turn_discount, self.credit == "turn"
        require(0 <= discount <= 1, "objective.turn_discount", discount, "use a factor from 0 to 1")
        fix = "leave it out, or use objective.credit turn: an episode's rewards are added up without a discount"
        require(by_turn or discount == 1, "objective.turn_discount", discount, fix)
        if not by_turn:
            return
        fix = f"use dapo or another loss of single tokens with objective.credit turn: {self.loss} has one advantage a completion"
        require(self.loss not in ROW_LOSSES, "objective.loss", self.loss, fix)
        fix = "use group with objective.credit turn: the turns' rewards are compared by mean and standard deviation"
        require(self.advantage == "group", "objective.advantage", self.advantage, fix)
        fix = "use false with objective.credit turn, which compares the environment's rewards apart from the others already"
        require(not self.normalize_each_reward, "objective.normalize_each_reward", self.normalize_each_reward, fix)
        fix = "use false with objective.credit turn: the KL of a completion would be no turn's; objective.beta works as a KL term"
        require(not self.kl_in_reward, "objective.kl_in_reward", self.kl_in_reward, fix)
        fix = "use group or none with objective.credit turn: each turn is compared within its group"
        require(self.scale_rewards != "batch", "objective.scale_rewards", self.scale_rewards, fix)
        fix = "use null with objective.credit turn: it leaves out completions with a negative advantage, and turns have their own"
        require(self.off_policy_threshold is None, "objective.off_policy_threshold", self.off_policy_threshold, fix)

    def _check_entropy(self) -> None:
        """Checks the settings of the entropy bonus."""
        weight, least, most, target = self.entropy_coef, self.entropy_coef_min, self.entropy_coef_max, self.entropy_target
        require(weight >= 0, "objective.entropy_coef", weight, "use 0 (no entropy bonus) or a small positive weight such as 0.001")
        if target is None:
            for name, default in ADAPTIVE_ENTROPY.items():
                fix = "leave it out, or also set objective.entropy_target: without a target the weight is entropy_coef"
                require(getattr(self, name) == default, f"objective.{name}", getattr(self, name), fix)
            return
        require(target > 0, "objective.entropy_target", target, "use a positive number of nats a token such as 0.2, or null")
        step = self.entropy_coef_delta
        require(step > 0, "objective.entropy_coef_delta", step, "use a small positive number such as 0.005")
        require(0 <= least < most, "objective.entropy_coef_min", least, f"use 0 or more, and less than entropy_coef_max ({most:g})")
        fix = f"use a weight from entropy_coef_min ({least:g}) to entropy_coef_max ({most:g}), where it adapts to entropy_target"
        require(least <= weight <= most, "objective.entropy_coef", weight, fix)

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the loss has an entropy bonus, be its weight 0 at the moment."""
        return self.entropy_coef > 0 or self.entropy_target is not None

    @property
    def needs_reference(self) -> bool:
        """Whether the objective uses reference log-probabilities."""
        return self.beta > 0
