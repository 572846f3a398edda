"""The reward `reward_model`: a Hugging Face sequence-classification model with one label scores prompt and completion.

It computes on the devices, in the trainer's process: on the run's mesh, or with several processes on the first device of each,
which scores its own rows. Texts are made by its own tokenizer and chat template, as TRL does. Texts of similar length are scored
together in batches of few shapes, so that the number of compiled programs is bounded.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_jax.config import ConfigError
from grpo_jax.config.checks import require, require_choice
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.data.tokenizer_files import TokenizerError
from grpo_jax.models.attention import prefill_attend, select_last
from grpo_jax.models.families import read_spec
from grpo_jax.models.spec import ModelError, ModelSpec
from grpo_jax.models.transformer import Transformer, forward
from grpo_jax.rewards.calls import FailedValue
from grpo_jax.rewards.protocol import DeviceReward, NamedFunction, text_of
from grpo_jax.rewards.resolve import made_by
from grpo_jax.rollout.shapes import pad_rows
from grpo_jax.runtime.programs import Announce, Program, no_announcement
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params
from grpo_jax.weights.axes import check_mesh
from grpo_jax.weights.fingerprint import model_fingerprints
from grpo_jax.weights.hf import TensorFiles, check_tensors, find_folder, read_json
from grpo_jax.weights.loading import load_params

NAME = "reward_model"
SCORE = "score.weight"
"""The tensor that turns the hidden state of a text's last token into its value, [1, D]."""

OWN_ATTRIBUTES = ("num_labels", "classifier_dropout", "summary_type", "score_bias")
"""Attributes of config.json that belong to the classification and change nothing in the decoder."""

FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]

LEAST_WIDTH = 64
BATCH_TOKENS = 16384
"""Tokens that are computed at once. Widths are powers of two from `LEAST_WIDTH` on, and so are the rows of a batch."""


class RewardModel(DeviceReward):
    """A reward function: the value that a sequence-classification model gives to prompt and completion.

    `reward_model` makes it, and checks all but the weights, which `load` reads. A row whose text is longer than `max_length`, or
    that the chat template refuses, fails.

    Attributes:
        name: in metrics and errors.
        folder: of the model.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        name: str,
        dtype: str,
        quantization: str,
        chat_template: bool,
        template_arguments: Mapping[str, Any],
        max_length: int | None,
    ) -> None:
        super().__init__(name)
        self.folder, self.tokenizer = folder, tokenizer
        self._dtype, self._quantization = dtype, quantization
        self._chat, self._arguments = chat_template, dict(template_arguments)
        self.spec = read_reward_spec(folder)
        with TensorFiles(folder) as files:
            if SCORE not in files.files:
                raise ModelError(f"{folder}: tensor {SCORE} is missing, so this is no reward model")
            shape = files.shape(SCORE)
            if shape != (1, self.spec.width):
                raise ModelError(f"{folder}: {SCORE} has shape {shape}; a reward model has one label: (1, {self.spec.width})")
            check_tensors(folder, self.spec, files, (SCORE,))
        self.max_length = max_length if max_length is not None else self.spec.max_length
        pad = tokenizer.hf.pad_token_id
        self._pad = tokenizer.hf.eos_token_id if pad is None else pad
        self._layout: Layout | None = None
        self._variables: Params = {}
        self._program: Program | None = None

    def load(self, layout: Layout | None = None, announce: Announce = no_announcement) -> None:
        """Reads the weights onto the devices.

        Args:
            layout: of the run; None is this process's first device.
            announce: as of `Program`.

        Raises:
            ConfigError: the mesh does not divide the model.
        """
        if self._program is not None and self._layout == layout:
            return
        try:
            check_mesh(layout, self.spec, self._quantization)
        except ConfigError as error:
            raise ConfigError(f"reward {self.name}: {error}") from error
        dtype = jnp.dtype(self.spec.dtype if self._dtype == "auto" else self._dtype)
        params = load_params(self.folder, self.spec, dtype, quantization=self._quantization, layout=layout, others=(SCORE,))
        with TensorFiles(self.folder) as files:
            score = files.read(SCORE)[0].astype(np.float32)
        self._layout = layout
        self._variables = {"params": params, "score": jax.device_put(score) if layout is None else layout.put(score)}
        model = Transformer(self.spec, dtype, layout=layout)
        self._program = Program(f"reward {self.name}", functools.partial(values_of, model), announce=announce)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[Any]:
        """Returns the value of each row, or a `FailedValue`."""
        found: list[Any] = [None] * len(completions)
        rows: dict[int, list[int]] = {}
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                rows[number] = self.encode(prompt, completion)
            except TokenizerError as error:
                found[number] = FailedValue(f"has no value: {error}")
                continue
            size = len(rows[number])
            if size == 0 or (self.max_length is not None and size > self.max_length):
                found[number] = FailedValue(
                    f"has no value: its text has {size} tokens, and {self.name} takes 1 to {self.max_length}"
                )
                del rows[number]
        for number, value in zip(rows, self.values(list(rows.values())), strict=True):
            found[number] = value
        return found

    def encode(self, prompt: Any, completion: Any) -> list[int]:
        """Returns the token ids of a row: the conversation as the chat template renders it, or both texts one after the other."""
        if isinstance(prompt, str) and not self._chat:
            return self.tokenizer.encode_text(prompt + text_of(completion))
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        text = self.tokenizer.render([*messages, *answer], generation=False, template_arguments=self._arguments)
        return self.tokenizer.encode_text(text)

    def values(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Returns the values of texts, given as token ids; none may be empty."""
        if self._program is None:
            self.load()
        assert self._program is not None
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        shards = 1 if self._layout is None else self._layout.rows
        found = [0.0] * len(rows)
        while order:
            size, width = batch_shape(len(rows[order[0]]), len(order), shards)
            batch, order = order[:size], order[size:]
            texts = [list(rows[row]) for row in batch] + [[0]] * (size - len(batch))
            last = np.array([last_token(text, self._pad) for text in texts], np.int32)
            lengths = np.array([len(text) for text in texts], np.int32)
            arrays = (pad_rows(texts, width), lengths, last)
            if self._layout is None:
                values = jax.device_get(self._program(self._variables, *jax.device_put(arrays)))
            else:
                layout = self._layout
                values = layout.get(self._program(self._variables, *(layout.put(array, ("rows",)) for array in arrays)))
            for row, value in zip(batch, values, strict=False):
                found[row] = float(value)
        return found


def reward_model(
    path: str,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    quantization: Literal["none", "int8", "int4", "nf4"] = "none",
    chat_template: bool = False,
    template_arguments: dict[str, Any] | None = None,
    max_length: int | None = None,
) -> RewardModel:
    """Returns the value that a sequence-classification model of one label gives to prompt and completion.

    Args:
        path: Folder or hub id of a Hugging Face `...ForSequenceClassification` of a supported family, with its tokenizer.
        revision: Branch, tag or commit on the hub.
        dtype: Number format of the weights and of the computation; `auto` takes the one in config.json.
        quantization: Format of the layers' matrices, as of `model.quantization`.
        chat_template: Render plain prompts as a conversation too; conversations always are.
        template_arguments: Passed to the chat template.
        max_length: Longest text in tokens; a longer one has failed. null is what the model's positions are exact for.

    Raises:
        ConfigError, ModelError: The folder is no such model, or an argument is out of range.
    """
    options: dict[str, Any] = {"dtype": dtype, "quantization": quantization, "max_length": max_length}
    return open_reward_model(path, revision, chat_template=chat_template, template_arguments=template_arguments or {}, **options)


def open_reward_model(
    path: str, revision: str | None = None, *, name: str = NAME, tokenizer: Tokenizer | None = None, **options: Any
) -> RewardModel:
    """Checks a reward model's folder; see `reward_model`.

    Args:
        name: in metrics and errors.
        tokenizer: instead of the one in the folder.
        options: the further arguments of `RewardModel`.
    """
    field = f"{NAME}.path"
    require_choice(f"{NAME}.dtype", options["dtype"], ("auto", "float32", "bfloat16"))
    longest, chat = options["max_length"], options["chat_template"]
    require(longest is None or longest >= 1, f"{NAME}.max_length", longest, "use a number of tokens, or null")
    folder = find_folder(path, field, FILES, revision)
    tokenizer = tokenizer or Tokenizer.from_folder(folder)
    if tokenizer is None:
        raise ConfigError(f"{field} is {path!r}: it has no tokenizer (tokenizer.json), and texts need one")
    fix = "use false: the reward model's tokenizer has no chat template"
    require(not chat or tokenizer.has_chat_template, f"{NAME}.chat_template", chat, fix)
    return RewardModel(folder, tokenizer, name=name, **options)


def with_reward_models(entries: Sequence[Any]) -> list[Any]:
    """The entries of `rewards.functions` with each `{name: reward_model, path: ...}` made; the others are unchanged.

    Raises:
        ConfigError, ModelError: an argument is unknown or missing, or `reward_model` raises.
    """
    made = []
    for index, entry in enumerate(entries):
        name = entry.get("name") if isinstance(entry, Mapping) else entry
        if isinstance(name, str) and name == NAME:
            arguments = {key: value for key, value in entry.items() if key != "name"} if isinstance(entry, Mapping) else {}
            entry = made_by(reward_model, f"rewards.functions[{index}]", NAME, arguments)
        made.append(entry)
    return made


def reward_model_files(functions: Sequence[NamedFunction]) -> dict[str, str]:
    """Fingerprints of the files of the reward models among the functions, for `run/inputs.py`."""
    models = [(name, function) for name, function in functions if isinstance(function, RewardModel)]
    return {f"{name} file {file}": value for name, model in models for file, value in model_fingerprints(model.folder).items()}


def load_reward_models(functions: Sequence[NamedFunction], layout: Layout | None, announce: Announce) -> None:
    """Reads the weights of the reward models among the functions."""
    for _, function in functions:
        if isinstance(function, RewardModel):
            function.load(layout if jax.process_count() == 1 else None, announce)


def values_of(
    model: Transformer, variables: Params, ids: Int[Array, "N T"], lengths: Int[Array, "N"], last: Int[Array, "N"]
) -> Float[Array, "N"]:
    """Computes s·h: the score's row times the final hidden state of each text's last token.

    Args:
        variables: {"params": of the decoder, "score": [D] float32}.
        ids: padded on the right.
        lengths: tokens of each text.
        last: index of the token that is scored.
    """
    n, t = ids.shape
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None, :], (n, t))
    attend = prefill_attend(model, lengths, t)
    hidden, _, _ = forward(model, {"params": variables["params"]}, ids, positions, attend, select=select_last(last + 1))
    x = hidden[:, 0] if model.layout is None else model.layout.constrain(hidden[:, 0], "rows", None)
    return jnp.einsum("nd,d->n", x.astype(jnp.float32), variables["score"], precision=jax.lax.Precision.HIGHEST)


def last_token(ids: Sequence[int], pad: int | None) -> int:
    """Index of the last token that is no padding token, which transformers scores; 0 where all are."""
    return max((index for index, token in enumerate(ids) if token != pad), default=0)


def read_reward_spec(folder: Path) -> ModelSpec:
    """Reads the decoder of a reward model from its config.json.

    Raises:
        ModelError: it is no sequence classification, or of a family that cannot be computed.
    """
    file = folder / "config.json"
    config = read_json(file)
    kind = str((config.get("architectures") or ["none"])[0])
    if not kind.endswith("ForSequenceClassification"):
        raise ModelError(f"{file}: architectures is {kind}: a reward model is a ...ForSequenceClassification of one label")
    # The head is the score: the files have no lm_head, which a model that is not tied would need.
    decoder = {key: value for key, value in config.items() if key not in OWN_ATTRIBUTES}
    spec = replace(read_spec(decoder, str(file)), tied=True)
    if spec.logit_scale != 1:
        raise ModelError(f"{file}: a {spec.family} model divides its logits by a factor, which its score has not: use another")
    return spec


def batch_shape(longest: int, texts: int, shards: int) -> tuple[int, int]:
    """Rows and tokens of a batch: powers of two, and rows that all shards share.

    Args:
        longest: tokens of the longest text.
        texts: that are left.
        shards: of the mesh's rows.
    """
    width = power_of_two(max(LEAST_WIDTH, longest))
    return max(shards, min(power_of_two(texts), BATCH_TOKENS // width) // shards * shards), width


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()
