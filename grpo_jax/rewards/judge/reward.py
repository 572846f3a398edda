"""The built-in reward `llm_judge`, which asks a language model for a score of each completion or a ranking of each group."""

from __future__ import annotations

import asyncio
import inspect
import json
import keyword
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from grpo_jax.config.checks import ConfigError, require, require_choice
from grpo_jax.rewards.calls import FailedValue
from grpo_jax.rewards.judge.question import (
    COMPLETION,
    conversation_text,
    placeholders,
    rank_messages,
    read_ranking,
    read_score,
    score_messages,
)
from grpo_jax.rewards.judge.service import FailedRequestError, Service
from grpo_jax.rewards.protocol import RewardFunction, text_of

PROMPT = "prompt"
NOT_COLUMNS = {PROMPT: "prompts", COMPLETION: "completions"}
"""Placeholders that are inputs of every reward function, with the input's name."""

OWN_FIELDS = {"model", "messages", "temperature", "stream", "n"}
"""Fields of the request that `request` may not set."""


def llm_judge(
    base_url: str,
    model: str,
    rubric: str,
    api_key_env: str | None = None,
    rank: str | None = None,
    scale: list[float] | None = None,
    temperature: float = 0.0,
    request: dict[str, Any] | None = None,
    retries: int = 4,
    requests_in_flight: int = 8,
    request_seconds: float = 30.0,
    call_seconds: float = 50.0,
    cache: str | None = None,
    seed: int = 0,
) -> RewardFunction:
    """Returns the score that a language model gives to a completion, from 0 (worst) to 1 (best).

    The judge is any service with OpenAI's chat completions (vLLM, Ollama, llama.cpp, a provider). A row without an answer, or with
    one that cannot be read, has failed; it is never scored 0. A judge can be fooled: by the policy's style, its length, its
    confidence, or by texts that speak to the judge. Borders and the strict reading of the answer prevent that a completion passes
    for instructions or for the answer itself, not that it convinces the judge. Watch a second reward or held-out accuracy.

    Args:
        base_url: Address up to `/v1`, such as http://127.0.0.1:8000/v1.
        model: Name of the model there.
        rubric: What to judge, with `{completion}`, and `{prompt}` and dataset columns such as `{answer}` where they are needed. A
            row with None in one of these columns gets None.
        api_key_env: Environment variable with the API key; null sends none.
        rank: `group` asks for a ranking of all completions of a prompt in one request: 1 for the best, 0 for the worst, evenly
            spaced. Equal texts share a rank. A group without two different texts gets None, and so do greedy evaluations. null
            scores each completion.
        scale: [lowest, highest] score that the judge may give; null is [0, 10]. Not with `rank`.
        temperature: Of the judge.
        request: Further fields of the request, such as {max_tokens: 500, response_format: {type: json_object}}.
        retries: Further tries after a connection error, a time limit, or the statuses 408, 409, 425, 429 and 5xx. They wait 0.5 s,
            1 s, 2 s, ... up to 30 s, times a random factor from 0.5 to 1.5, and at least as long as Retry-After says.
        requests_in_flight: Most requests at the same time, from each process that calls the function.
        request_seconds: Limit of one try.
        call_seconds: Limit of all rows of a call; rows without an answer fail then, the others keep theirs. Keep it below
            rewards.timeout_seconds, at which all rows of the call fail.
        cache: Folder of answers by the SHA-256 digest of address and request; null caches none. Equal requests get equal answers.
        seed: Of the waits' random factor, and of the order in which a ranked group is shown.

    Raises:
        ConfigError: A setting is out of range, or the key's variable is not set.
    """
    require(is_address(base_url), "llm_judge.base_url", base_url, "give an address such as http://127.0.0.1:8000/v1")
    names = placeholders(rubric)
    require(COMPLETION in names, "llm_judge.rubric", rubric, "write {completion} where the completion goes")
    for name in names:
        require(not keyword.iskeyword(name), "llm_judge.rubric", rubric, f"{{{name}}} is a word of Python; rename the column")
    if rank is not None:
        require_choice("llm_judge.rank", rank, ["group"])
        require(scale is None, "llm_judge.scale", scale, "leave it out: a ranking has none")
    ends = scale if scale is not None else [0.0, 10.0]
    require(len(ends) == 2 and ends[0] < ends[1], "llm_judge.scale", scale, "give [lowest, highest], such as [0, 10]")
    require(temperature >= 0, "llm_judge.temperature", temperature, "use 0 or more")
    require(retries >= 0, "llm_judge.retries", retries, "use 0 or more")
    require(requests_in_flight >= 1, "llm_judge.requests_in_flight", requests_in_flight, "use 1 or more")
    require(
        0 < request_seconds <= call_seconds, "llm_judge.request_seconds", request_seconds, "use more than 0, at most call_seconds"
    )
    for name in sorted(OWN_FIELDS & set(request or {})):
        raise ConfigError(f"llm_judge.request has {name}: the reward sets it itself; leave it out")
    try:
        json.dumps(request)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"llm_judge.request cannot be written as JSON: {error}") from None
    if api_key_env is not None:
        key = os.environ.get(api_key_env, "")
        readable = key.isascii() and key.isprintable() and not key.isspace()
        require(
            bool(key) and readable,
            "llm_judge.api_key_env",
            api_key_env,
            "set this environment variable to the API key, or use null",
        )
    if cache is not None:
        path = Path(cache).expanduser()
        require(not path.exists() or path.is_dir(), "llm_judge.cache", cache, "give a folder")
    url = base_url.rstrip("/") + "/chat/completions"
    service = Service(url, api_key_env, retries, request_seconds, requests_in_flight, cache, seed)
    fields = {**(request or {}), "model": model, "temperature": temperature}
    judge = Judge(service, fields, rubric, tuple(names), ends[0], ends[1], rank is not None, call_seconds, seed)

    async def reward(**inputs: Sequence[Any]) -> list[Any]:
        return await judge.values(inputs)

    inputs = dict.fromkeys(["completions", *(NOT_COLUMNS.get(name, name) for name in names)])
    if judge.ranks:
        inputs["prompts"] = None  # tells groups apart
    reward.__name__ = "llm_judge"
    reward.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess] - read by `inspect.signature`
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]
    )
    return reward


@dataclass(frozen=True)
class Judge:
    """Asks for the values of rows; the attributes are those of `llm_judge`, checked.

    Attributes:
        fields: of every request.
        names: placeholders of the rubric.
        ranks: it ranks groups instead of scoring completions.
    """

    service: Service
    fields: Mapping[str, Any]
    rubric: str
    names: tuple[str, ...]
    lowest: float
    highest: float
    ranks: bool
    call_seconds: float
    seed: int

    async def values(self, inputs: Mapping[str, Sequence[Any]]) -> list[Any]:
        """Returns a number, None or a `FailedValue` for each of N rows."""
        deadline = asyncio.get_running_loop().time() + self.call_seconds
        completions = [text_of(completion) for completion in inputs["completions"]]
        columns = {name: inputs[NOT_COLUMNS.get(name, name)] for name in self.names if name != COMPLETION}
        found: list[Any] = [None] * len(completions)
        applies = [all(values[row] is not None for values in columns.values()) for row in range(len(completions))]
        questions: dict[str, tuple[dict[str, str], list[int]]] = {}
        grouped = groups_of(inputs["prompts"], columns) if self.ranks else [[row] for row in range(len(completions))]
        for rows in grouped:
            if not applies[rows[0]]:
                continue
            texts = {name: conversation_text(values[rows[0]]) for name, values in columns.items()}
            # Equal questions are asked once.
            key = json.dumps([texts, sorted(completions[row] for row in rows)])
            questions.setdefault(key, (texts, []))[1].extend(rows)

        async def answered(texts: Mapping[str, str], rows: Sequence[int]) -> None:
            try:
                values = await self._ask(texts, [completions[row] for row in rows], deadline)
            except FailedRequestError as error:
                values = [FailedValue(f"has no value: the judge {error}")] * len(rows)
            for row, value in zip(rows, values, strict=True):
                found[row] = value

        await asyncio.gather(*(answered(*question) for question in questions.values()))
        return found

    async def _ask(self, texts: Mapping[str, str], completions: Sequence[str], deadline: float) -> list[float | None]:
        """The values of completions of one prompt: one by one equal texts, or a group to rank."""
        different = sorted(set(completions))
        if not self.ranks:
            messages = score_messages(self.rubric, {**texts, COMPLETION: different[0]}, self.lowest, self.highest)
            body = {**self.fields, "messages": messages}
            score = await self.service.ask(body, lambda text: read_score(text, self.lowest, self.highest), deadline)
            return [(score - self.lowest) / (self.highest - self.lowest)] * len(completions)
        if len(different) == 1:
            return [None] * len(completions)
        # Judges favour places; the same group is always shown in the same order, so that its answer is found in the cache.
        random.Random(json.dumps([self.seed, texts, different])).shuffle(different)
        body = {**self.fields, "messages": rank_messages(self.rubric, texts, different)}
        ranking = await self.service.ask(body, lambda text: read_ranking(text, len(different)), deadline)
        values = {different[place]: 1 - rank / (len(different) - 1) for rank, place in enumerate(ranking)}
        return [values[completion] for completion in completions]


def groups_of(prompts: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> list[list[int]]:
    """Rows of each group: rows in a row that have the same prompt and columns."""
    groups: list[list[int]] = []
    for row, prompt in enumerate(prompts):
        first = groups[-1][0] if groups else None
        if first is not None and prompts[first] == prompt and all(values[first] == values[row] for values in columns.values()):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def is_address(text: str) -> bool:
    """Whether a text is an address of HTTP or HTTPS with a host, and without a user's name or a query."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises where it is no port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc and not parts.query
