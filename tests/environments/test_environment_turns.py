"""Episodes with a scripted sampler: what is trained, what rewards get, limits, failures, and that nothing depends on the clock."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from episode_templates import GEMMA, HERMES, family_tokenizer
from scripted_sampler import Script, batch_of, play

from grpo_jax.config import Config, ConfigError, EnvironmentConfig, RolloutConfig
from grpo_jax.environments import Step
from grpo_jax.environments.pool import EnvironmentPool
from grpo_jax.rewards import RewardError, resolve_functions
from grpo_jax.rewards.scoring import score
from grpo_jax.rollout.environment_turns import EnvironmentTurns, EpisodeDriver, reward_rows
from grpo_jax.rollout.episode_content import RewardRows, episode_metrics
from grpo_jax.rollout.episode_setup import EpisodeInputs, EpisodeSetup
from grpo_jax.types import Rollout

TOKENIZER = family_tokenizer(HERMES)
STOP = TOKENIZER.hf.convert_tokens_to_ids("<|im_end|>")
USER = {"role": "user", "content": "What is 2+3?"}


def spelled(text: str, *, stop: bool = True) -> list[int]:
    """One token for each byte, special words apart."""
    words = text.replace("<tool_call>", "\0").replace("</tool_call>", "\1")
    names = {"\0": "<tool_call>", "\1": "</tool_call>"}
    ids = [i for character in words for i in TOKENIZER.encode_text(names.get(character, character))]
    return [*ids, STOP] if stop else ids


def says(*turns: str) -> Script:
    """Every episode says the same."""
    return lambda row, number: (spelled(turns[number]), "stop")


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: First number.
        b: Second number.
    """
    return a + b


CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'


def driver_of(
    environment: Callable[[], Any] | None = None, tools: Sequence[Any] = (), tokenizer: Any = TOKENIZER, **settings: Any
) -> EpisodeDriver:
    config = Config(environment=EnvironmentConfig(**settings), rollout=RolloutConfig(max_prompt_length=400))
    driver = EpisodeSetup.read(config, EpisodeInputs(environment, tools), []).driver(tokenizer, several_processes=False)
    assert driver is not None
    return driver


def begin(driver: EpisodeDriver, prompts: Sequence[Any], generations: int, **columns: list[Any]) -> EnvironmentTurns:
    batch: Any = batch_of(prompts, [driver.chat.prompt_ids(prompt) for prompt in prompts], **columns)
    return driver.begin(batch, generations)


def played(turns: EnvironmentTurns, script: Script, rows: int, limit: int = 10_000) -> tuple[Rollout, RewardRows]:
    rollout = play(turns, rows, script, limit=limit)
    return rollout, reward_rows(turns.prompts, rollout, turns, TOKENIZER.decode)


def whole_text(turns: EnvironmentTurns, rollout: Rollout, row: int, generations: int) -> str:
    ids = [*turns.prompts.prompt_ids[row // generations], *rollout.completion_ids[row]]
    return TOKENIZER.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_a_tool_episode_is_the_rendered_conversation_and_only_the_models_tokens_are_trained():
    driver = driver_of(tools=[add])
    turns = begin(driver, [[USER]], 2, answer=["5"])
    rollout, rows = played(turns, says(CALL, "It is 5"), 2)
    assert rows.completions[0] == [
        {"role": "assistant", "content": CALL},
        {"role": "tool", "name": "add", "content": "5"},
        {"role": "assistant", "content": "It is 5"},
    ]
    rendered = driver.chat.tokenizer.render(
        [USER, *rows.completions[0]], generation=False, template_arguments=driver.chat.template_arguments
    )
    assert '"description": "Adds."' in rendered
    assert whole_text(turns, rollout, 0, 2) + "\n" == rendered
    assert rollout.sampled is not None
    own = [i for i, sampled in zip(rollout.completion_ids[0], rollout.sampled[0], strict=True) if sampled]
    assert own == spelled(CALL) + spelled("It is 5")  # byte by byte what was sampled
    assert episode_metrics(rows.episodes) == {
        "turns/mean": 2.0, "turns/max": 2.0, "tools/calls": 1.0, "tools/errors": 0.0, "environment/failed": 0.0,
        "environment/seconds": episode_metrics(rows.episodes)["environment/seconds"],
    }  # fmt: skip
    assert rows.columns["answer"] == ["5", "5"]
    assert rows.columns["environment_reward"] == [None, None]
    assert rows.columns["environment_info"][0] == [{"tool_calls": 1, "tool_errors": 0}, {}]
    assert rows.texts[0] == f"[assistant] {CALL}\n[tool] 5\n[assistant] It is 5"


def test_built_in_rewards_look_at_the_models_last_turn():
    driver = driver_of(tools=[add], max_turns=1)
    _, rows = played(begin(driver, [[USER]], 2, answer=["5"]), lambda row, number: (spelled(CALL if row else "5"), "stop"), 2)
    assert rows.completions[1][-1]["role"] == "tool"
    functions = resolve_functions(["exact_match"])
    scored = score(functions, prompts=rows.prompts, completions=rows.completions, completion_ids=[[1], [1]], columns=rows.columns)
    assert scored.rewards.tolist() == [1.0, 0.0]


class Counter:
    """Counts to the row's goal; says how far it is."""

    def reset(self, goal: int, hint: str | None = None) -> Any:
        self.goal, self.count = goal, 0
        return hint

    def step(self, message: dict[str, Any]) -> Step:
        self.count += 1
        done = self.count == self.goal
        return Step(f"{self.count}", done=done, reward=0.5, info={"said": message["content"]})


def test_rewards_of_the_turns_are_added_and_infos_listed():
    turns = begin(driver_of(Counter), [[USER], [USER]], 2, goal=[1, 3])
    rollout, rows = played(turns, lambda row, number: (spelled(f"{row}.{number}"), "stop"), 4)
    assert rows.columns["environment_reward"] == [0.5, 0.5, 1.5, 1.5]
    assert [info["said"] for info in rows.columns["environment_info"][3]] == ["3.0", "3.1", "3.2"]
    assert [message["content"] for message in rows.completions[2]] == ["2.0", "1", "2.1", "2", "2.2", "3"]
    assert [environment.count for environment in rows.columns["environments"]] == [1, 1, 3, 3]
    assert rollout.completion_ids[0] == spelled("0.0")  # the last answer is not read
    scored = score(resolve_functions(["environment"]), prompts=rows.prompts, completions=rows.completions,
                   completion_ids=rollout.completion_ids, columns=rows.columns)  # fmt: skip
    assert scored.rewards.tolist() == [0.5, 0.5, 1.5, 1.5]


def test_the_number_of_turns_is_limited():
    rollout, rows = played(begin(driver_of(Counter, max_turns=2), [[USER]], 2, goal=[99]), says("a", "b"), 2)
    assert episode_metrics(rows.episodes)["turns/max"] == 2
    assert rollout.sampled is not None
    assert [int(own.sum()) for own in rollout.sampled] == [4, 4]


def test_a_turn_that_reaches_the_episodes_limit_is_in_the_conversation_and_never_answered():
    turns = begin(driver_of(Counter), [[USER]], 2, goal=[99])
    first = len(play(begin(driver_of(Counter), [[USER]], 1, goal=[1]), 1, says("abc")).completion_ids[0])
    rollout, rows = played(turns, says("abc", "x" * 1000), 2, limit=first + 100)
    assert rollout.finish_reasons == ["length", "length"]
    assert len(rows.completions[0]) == 3
    assert set(rows.completions[0][2]["content"]) == {"x"}
    assert rows.columns["environment_reward"] == [0.5, 0.5]
    assert episode_metrics(rows.episodes)["turns/mean"] == 2


def test_what_reset_adds_for_a_whole_group_is_part_of_the_shared_prompt():
    driver = driver_of(Counter)
    turns = begin(driver, [[USER], [USER]], 2, goal=[1, 1], hint=[" Please.", None])
    assert turns.first_ids == [[], [], [], []]
    assert turns.prompts.prompt_ids[1] == driver.chat.prompt_ids([USER])
    assert turns.prompts.prompt_ids[0] == driver.chat.prompt_ids([{**USER, "content": "What is 2+3? Please."}])
    _, rows = played(turns, says("x"), 4)
    assert rows.prompts[0] == [{**USER, "content": "What is 2+3? Please."}]


def test_what_reset_adds_for_one_episode_alone_is_read_by_it_alone():
    numbers = iter(range(100))

    class Own(Counter):
        def reset(self, **row: Any) -> Any:
            self.goal, self.count = 1, 0
            return [{"role": "user", "content": f"You are number {next(numbers)}."}]

    driver = driver_of(Own, concurrency=1)
    turns = begin(driver, [[USER]], 3)
    rollout, rows = played(turns, says("yes"), 3)
    for row in range(3):
        prompt: Any = rows.prompts[row]
        assert prompt[1]["content"] == f"You are number {row}."
        assert whole_text(turns, rollout, row, 3).startswith(driver.chat.tokenizer.render(prompt, generation=True))
        assert rows.completions[row][0] == {"role": "assistant", "content": "yes"}
    assert rollout.sampled is not None
    assert not rollout.sampled[0][: len(turns.first_ids[0])].any()
    shared = driver.chat.tokenizer.hf.decode(turns.prompts.prompt_ids[0])
    assert shared.endswith("You are number ")


def test_a_prompt_that_reset_makes_too_long_goes_on_in_each_episode():
    driver = replace(driver_of(Counter), longest_prompt=60)
    turns = begin(driver, [[USER]], 2, goal=[1], hint=["!" * 100])
    assert len(turns.prompts.prompt_ids[0]) == 60
    assert [*turns.prompts.prompt_ids[0], *turns.first_ids[1]] == driver.chat.prompt_ids(
        [{**USER, "content": "What is 2+3?" + "!" * 100}]
    )


def outcome(delay: Callable[[], float], concurrency: int) -> tuple[Any, ...]:
    class Late(Counter):
        def step(self, message: dict[str, Any]) -> Step:
            time.sleep(delay())
            return super().step(message)

    class LateAsync(Counter):
        async def reset(self, goal: int) -> Any:  # type: ignore[override]
            await asyncio.sleep(delay())
            return Counter.reset(self, goal)

        async def step(self, message: dict[str, Any]) -> Step:  # type: ignore[override]
            await asyncio.sleep(delay())
            return Counter.step(self, message)

    results = []
    for environment in (Late, LateAsync):
        turns = begin(driver_of(environment, concurrency=concurrency), [[USER], [USER]], 4, goal=[2, 3])
        rollout, rows = played(turns, lambda row, number: (spelled("abc"[: (row + number) % 3 + 1]), "stop"), 8)
        results.append(
            (
                rollout.completion_ids,
                [own.tolist() for own in rollout.sampled or []],
                rows.completions,
                rows.columns["environment_info"],
            )
        )
    assert results[0] == results[1]
    return results[0]


def test_nothing_depends_on_when_environments_answer():
    rng = np.random.default_rng(0)
    expected = outcome(lambda: 0.0, 1)
    assert outcome(lambda: float(rng.exponential(0.005)), 8) == expected
    assert outcome(lambda: float(rng.exponential(0.005)), 3) == expected


HANGS, RELEASE = threading.Event(), threading.Event()


class Fails(Counter):
    """Fails in the way that the row names, in its second step; other rows count."""

    def reset(self, goal: int, how: str) -> Any:
        self.how = how
        if how == "reset":
            raise RuntimeError("no board")
        if how == "number":
            return 3
        return super().reset(goal)

    def step(self, message: dict[str, Any]) -> Any:
        step = super().step(message)
        if self.count == 2:
            if self.how == "hang":
                HANGS.set()
                RELEASE.wait(600)
            if self.how == "raise":
                raise KeyError("lost")
            return {"none": None, "text": Step(""), "nan": Step("x", reward=float("nan")), "roles": Step([{"role": "user"}])}.get(
                self.how, step
            )
        return step


WAYS = {
    "fine": None,
    "hang": "step 2 took longer than environment.timeout_seconds = 0.5",
    "raise": "step 2 raised KeyError: 'lost'",
    "reset": "reset raised RuntimeError: no board",
    "number": "reset returned int instead of a text or a list of messages",
    "none": "step returned NoneType instead of a Step",
    "nan": "step returned the reward nan",
    "roles": "step returned {'role': 'user'}, which is no message",
}


def test_an_environment_that_fails_costs_its_episode_and_no_other():
    ways = list(WAYS)
    hung = ways.index("hang")

    def clock() -> float:
        """Jumps over the limit once nothing but the step that hangs is left."""
        return 1000.0 if set(pool._running) == {hung} and HANGS.is_set() else 0.0

    pool = EnvironmentPool(32, 0.5, clock)
    driver = replace(driver_of(Fails), pool=pool)
    turns = begin(driver, [[USER]] * len(ways), 1, goal=[3] * len(ways), how=ways)
    rollout, rows = played(turns, says("a", "b", "c"), len(ways))
    RELEASE.set()
    for failure, expected in zip(rows.columns["environment_failure"], WAYS.values(), strict=True):
        assert (failure is None) if expected is None else failure.startswith(expected)
    assert rows.columns["environment_reward"][0] == 1.5
    assert episode_metrics(rows.episodes)["environment/failed"] == len(ways) - 1
    inputs: dict[str, Any] = {"prompts": rows.prompts, "completions": rows.completions, "completion_ids": rollout.completion_ids}
    functions = resolve_functions(["environment"])
    scored = score(functions, **inputs, columns=rows.columns, max_failed_share=1.0)
    assert scored.valid.tolist() == [True] + [False] * (len(ways) - 1)
    assert scored.failed_rows == len(ways) - 1
    with pytest.raises(RewardError, match="environment step 2 took longer"):
        score(functions, **inputs, columns=rows.columns)


def test_a_plain_prompt_goes_on_with_the_texts_of_the_answers():
    tokenizer = family_tokenizer(None)
    turns = begin(driver_of(Counter, tokenizer=tokenizer), ["abc:"], 2, goal=[2], hint=["go "])
    assert turns.prompts.prompt_ids[0] == tokenizer.encode_text("abc:go ")
    rollout, rows = played(turns, lambda row, number: ([*tokenizer.encode_text("abc"), STOP], "stop"), 2)
    assert rollout.completion_ids[0] == [
        *tokenizer.encode_text("abc"),
        STOP,
        *tokenizer.encode_text("1"),
        *tokenizer.encode_text("abc"),
        STOP,
    ]
    assert rows.prompts[0] == "abc:go "


def test_an_answer_without_text_fails_its_episode():
    class Silent(Counter):
        def step(self, message: dict[str, Any]) -> Step:
            return Step()

    _, rows = played(begin(driver_of(Silent, tokenizer=family_tokenizer(None)), ["abc"], 1, goal=[1]), says("a"), 1)
    assert rows.columns["environment_failure"] == ["step 1 gave no text and did not end the episode: give messages or done=True"]


def test_environments_are_closed():
    closed: list[int] = []

    class Holds(Counter):
        def close(self) -> None:
            closed.append(self.goal)

    played(begin(driver_of(Holds), [[USER], [USER]], 1, goal=[1, 2]), says("a", "b"), 2)
    assert sorted(closed) == [1, 2]


def test_tools_with_plain_prompts_say_what_to_set():
    with pytest.raises(ConfigError, match=r"data\.chat_template is null: set it to true"):
        driver_of(tools=[add]).begin(batch_of(["2+3"], [[1]]), 1)  # type: ignore[arg-type]


def test_a_template_that_does_not_show_tools_is_said():
    setup = EpisodeSetup.read(Config(), EpisodeInputs(tools=[add]), [])
    assert setup.hidden_tools(TOKENIZER) is None
    assert "does not show the model its tools (add)" in str(setup.hidden_tools(family_tokenizer(GEMMA)))
    assert EpisodeSetup.read(Config(), EpisodeInputs(), []).hidden_tools(family_tokenizer(GEMMA)) is None


def test_trls_environments_have_their_methods_as_tools():
    class Board:
        def reset(self, **row: Any) -> str:
            self.moves: list[int] = []
            return f" Board of {row['size']}."

        def move(self, square: int) -> str:
            """Moves.

            Args:
                square: Where to.
            """
            self.moves.append(square)
            return f"moved to {square}"

        def _hidden(self) -> None:
            pass

    setup = EpisodeSetup.read(Config(), EpisodeInputs(Board, [add], methods=True), [])
    driver = setup.driver(TOKENIZER, several_processes=False)
    assert driver is not None
    assert driver.environments.toolbox is not None
    assert sorted(driver.environments.toolbox.tools) == ["add", "move"]
    call = '<tool_call>{"name": "move", "arguments": {"square": %d}}</tool_call>'
    turns = begin(driver, [[USER]], 3, size=[9])
    _, rows = played(turns, lambda row, number: (spelled(call % row if number == 0 else "ok"), "stop"), 3)
    assert [board.moves for board in rows.columns["environments"]] == [[0], [1], [2]]
    assert rows.completions[1][1] == {"role": "tool", "name": "move", "content": "moved to 1"}
    assert rows.prompts[0] == [{**USER, "content": "What is 2+3? Board of 9."}]


def test_the_environments_own_reward_joins_the_others():
    config = Config.from_dict(
        {"environment": {"name": "number_guessing"}, "rewards": {"functions": ["exact_match"], "weights": [2.0]}}
    )
    setup = EpisodeSetup.read(config, EpisodeInputs(), config.rewards.functions)
    assert [name for name, _ in resolve_functions(setup.entries)] == ["exact_match", "environment"]
    assert setup.config.rewards.weights == [2.0, 1.0]
    config = Config.from_dict(
        {"environment": {"name": "number_guessing"}, "rewards": {"functions": ["environment"], "weights": [0.5]}}
    )
    assert EpisodeSetup.read(config, EpisodeInputs(), config.rewards.functions).entries == ["environment"]
    config = replace(config, rewards=replace(config.rewards, weights=[0.0]))
    with pytest.raises(ConfigError, match="use another weight for environment"):
        EpisodeSetup.read(config, EpisodeInputs(), config.rewards.functions)
    with pytest.raises(ConfigError, match="there is no environment"):
        EpisodeSetup.read(Config(), EpisodeInputs(), ["environment"])


def test_several_processes_are_refused():
    config = Config.from_dict({"environment": {"name": "number_guessing"}})
    with pytest.raises(ConfigError, match="one process"):
        EpisodeSetup.read(config, EpisodeInputs(), []).driver(TOKENIZER, several_processes=True)
