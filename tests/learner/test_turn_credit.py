"""Advantages by turn: by hand, by loops over prompts and turns, and what of a batch they change."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest

from grpo_jax.config import Config, ConfigError
from grpo_jax.learner.batches import learnable, reward_table
from grpo_jax.learner.turn_credit import returns, token_table, turn_advantages, turn_numbers
from grpo_jax.rewards.protocol import ScoredBatch
from grpo_jax.rollout.episode_setup import EpisodeInputs, EpisodeSetup
from grpo_jax.steps.groups import joined_scores, scored_rows
from grpo_jax.steps.mini_batches import part_of
from grpo_jax.types import PromptBatch, Rollout


def config_of(group: int, weights: list[float] | None = None, **objective: Any) -> Config:
    functions = ["number_match", "environment"]
    sections: dict[str, Any] = {"rollout": {"num_generations": group, "max_completion_length": 16}}
    sections |= {"objective": {"credit": "turn", **objective}}
    return Config.from_dict(sections | ({} if weights is None else {"rewards": {"functions": functions, "weights": weights}}))


def scored_of(turns: list[list[float]], outcome: list[float] | None = None, valid: list[bool] | None = None) -> ScoredBatch:
    own, flags = np.array(outcome or [0.0] * len(turns), np.float32), np.array(valid or [True] * len(turns))
    environment = np.array([sum(rewards) for rewards in turns], np.float32)
    values = {"number_match": own, "environment": environment}
    return ScoredBatch(own + environment, flags, values, [], turn_rewards=turns)


def test_by_hand() -> None:
    np.testing.assert_allclose(returns([1.0, 0.0, 4.0], 4, 0.5), [2.0, 2.0, 4.0, 0.0])
    turns, counts = [[0.0, 1.0], [1.0], [0.0, 0.0, 2.0]], [2, 1, 3]
    # To go: turn 1: 1, 1, 2; turn 2: 1, -, 2; turn 3 alone.
    config = config_of(3, scale_rewards="none")
    first, second, third = turn_advantages(scored_of(turns), counts, 3, config)
    np.testing.assert_allclose(first, [-1 / 3, -0.5])
    np.testing.assert_allclose(second, [-1 / 3])
    np.testing.assert_allclose(third, [2 / 3, 0.5, 0.0])
    # Each turn's own: turn 1: 0, 1, 0; turn 2: 1, -, 0. Weight 3.
    config = config_of(3, scale_rewards="none", turn_discount=0.0, weights=[1.0, 3.0])
    first, second, third = turn_advantages(scored_of(turns), counts, 3, config)
    np.testing.assert_allclose(first, [-1.0, 1.5])
    np.testing.assert_allclose(second, [2.0])
    np.testing.assert_allclose(third, [-1.0, -1.5, 0.0])
    # Divided by the deviation (ddof 1): 0.5 over sqrt(0.5).
    config = config_of(3, scale_rewards="group", advantage_eps=0.0, turn_discount=0.0)
    first, _, third = turn_advantages(scored_of(turns), counts, 3, config)
    np.testing.assert_allclose([first[1], third[1]], [0.5 / np.sqrt(0.5), -0.5 / np.sqrt(0.5)])


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
def test_against_loops_over_prompts_and_turns(discount: float) -> None:
    rng, group, prompts, eps = np.random.default_rng(2), 5, 12, 1e-3
    counts = [int(n) for n in rng.integers(0, 5, group * prompts)]
    turns = [rng.integers(0, 3, max(0, count - int(rng.integers(0, 2)))).astype(float).tolist() for count in counts]
    valid = (rng.random(group * prompts) < 0.8).tolist()
    config = config_of(group, [1.0, 0.5], turn_discount=discount, advantage_eps=eps)
    got = turn_advantages(scored_of(turns, valid=valid), counts, group, config)
    assert any(own.any() for own in got)
    for row, (own, count) in enumerate(zip(got, counts, strict=True)):
        assert len(own) == count
        start = row // group * group
        for turn in range(count):
            values = {
                other: sum(discount ** (later - turn) * reward for later, reward in enumerate(turns[other]) if later >= turn)
                for other in range(start, start + group)
                if valid[other] and counts[other] > turn
            }
            known, expected = list(values.values()), 0.0
            if row in values and max(known) > min(known):
                expected = 0.5 * (values[row] - statistics.mean(known)) / (statistics.stdev(known) + eps)
            assert own[turn] == pytest.approx(expected, rel=1e-5, abs=1e-6), (row, turn)


def test_sums_that_differ_by_rounding_alone_are_equal() -> None:
    config = config_of(2, advantage_eps=0.0)
    first, second = turn_advantages(scored_of([[0.1, 0.2, 0.3], [0.6, 0.0, 0.0]]), [3, 3], 2, config)
    assert first[0] == second[0] == 0
    assert first[1] == -second[1] > 0


def test_tokens_have_their_turns_advantage_and_answers_none() -> None:
    sampled = [np.array([0, 1, 1, 0, 1], bool), np.array([1, 0, 0, 1, 1, 0, 1], bool), np.zeros(0, bool)]
    assert [turn_numbers(own).tolist() for own in sampled] == [[0, 0, 1], [0, 1, 1, 2], []]
    config = config_of(3, scale_rewards="none")
    table = token_table(scored_of([[0.0, 2.0], [0.0, 0.0, 6.0], []], valid=[True, True, False]), sampled, 8, config)
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, [[0, -2, -2, 0, -2, 0, 0, 0], [2, 0, 0, 2, 2, 0, 0, 0], [0] * 8])


def test_the_outcome_is_compared_without_the_environment_and_a_turn_alone_makes_a_group_learn() -> None:
    sampled = [np.array([1, 0, 1], bool)] * 4
    rollout = Rollout([[1, 2, 3]] * 4, [np.zeros(3, np.float32)] * 4, ["stop"] * 4, sampled=sampled)
    scored = scored_of([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], [0.1, 0.1, 0.3, 0.3])
    config = config_of(2)
    rewards, _ = reward_table(scored, config, 2)
    np.testing.assert_array_equal(rewards, np.array([[0.1, 0.1], [0.3, 0.3]], np.float32))
    assert learnable(rollout, scored, config, 2).tolist() == [True, False]  # the sums are equal in both
    episode = Config.from_dict({"rollout": {"num_generations": 2}})
    assert learnable(rollout, scored, episode, 2).tolist() == [False, False]


def test_selected_joined_and_split_rows_keep_their_turns() -> None:
    scored = scored_of([[0.0], [1.0, 2.0], [3.0], [4.0]])
    assert scored_rows(scored, np.array([3, 1])).turn_rewards == [[4.0], [1.0, 2.0]]
    assert joined_scores([scored, scored]).turn_rewards == [*(scored.turn_rewards or []), *(scored.turn_rewards or [])]
    prompts = PromptBatch(0, np.arange(2), ["a", "b"], [[1], [2]], {})
    rollout = Rollout([[1]] * 4, [np.zeros(1)] * 4, ["stop"] * 4)
    assert part_of(prompts, rollout, scored, slice(1, 2), slice(2, 4))[2].turn_rewards == [[3.0], [4.0]]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"objective": {"credit": "turn", "loss": "gspo"}}, "loss"),
        ({"objective": {"credit": "turn", "loss": "geo_mean"}}, "loss"),
        ({"objective": {"credit": "turn", "loss": "gpg"}}, "loss"),
        ({"objective": {"credit": "turn", "advantage": "rloo"}}, "advantage"),
        ({"objective": {"credit": "turn", "normalize_each_reward": True}}, "normalize_each_reward"),
        ({"objective": {"credit": "turn", "kl_in_reward": True}}, "kl_in_reward"),
        ({"objective": {"credit": "turn", "scale_rewards": "batch"}}, "scale_rewards"),
        ({"objective": {"credit": "turn", "off_policy_threshold": 0.5}}, "off_policy_threshold"),
        ({"objective": {"turn_discount": 0.9}}, "turn_discount"),
        ({"objective": {"credit": "turn", "turn_discount": 1.5}}, "turn_discount"),
        ({"objective": {"credit": "turn"}, "train": {"update_generations": 4}}, "train.update_generations"),
    ],
)
def test_what_needs_one_advantage_a_completion_is_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name if "." in name else rf"objective\.{name}"):
        Config.from_dict(settings)


def test_without_an_environment_it_is_refused() -> None:
    config = Config.from_dict({"objective": {"credit": "turn"}, "environment": {"tools": ["calculator"]}})
    with pytest.raises(ConfigError, match=r"objective\.credit is 'turn': use episode: only an environment"):
        EpisodeSetup.read(config, EpisodeInputs(), ["number_match"])
    config = Config.from_dict({"objective": {"credit": "turn"}, "environment": {"name": "number_guessing"}})
    assert EpisodeSetup.read(config, EpisodeInputs(), []).environments is not None
