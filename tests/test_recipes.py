"""Every recipe in configs/: it reads, says what a reader wants to know, and its whole step traces at full size, without weights."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import padded_batches
import pytest
import yaml
from public_models import CONFIGS, PARAMETERS

from grpo_jax.config import Config, LoraConfig
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.metrics import PackedMetrics
from grpo_jax.learner.optim import learning_rate_at, make_optimizer
from grpo_jax.learner.step import train_step
from grpo_jax.learner.supervised import supervised_step
from grpo_jax.models.families import read_spec
from grpo_jax.models.parameters import abstract_params, count_parameters, flatten, param_specs
from grpo_jax.models.spec import ModelSpec
from grpo_jax.models.transformer import Transformer
from grpo_jax.rewards import check_functions, number_match, regex_format, resolve_functions
from grpo_jax.rollout.decode import SlotState, decode_segment
from grpo_jax.rollout.episode_setup import EpisodeInputs, EpisodeSetup
from grpo_jax.rollout.kv_cache import empty_past_block
from grpo_jax.rollout.prefill import prefill
from grpo_jax.rollout.sampling import controls_of
from grpo_jax.rollout.shapes import Sizes, choose_slots, sizes_of
from grpo_jax.types import Frozen, TrainBatch
from grpo_jax.weights.lora import init_lora

FOLDER = Path(__file__).resolve().parent.parent / "configs"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
GSM8K = [name for name in RECIPES if name.startswith("gsm8k_")]


def model_config(config: Config, request: pytest.FixtureRequest) -> dict[str, Any]:
    """config.json of the recipe's model: the hub's, the quickstart's own, or a folder's."""
    path = config.model.path
    if path is None or path.startswith("builtin:"):
        from grpo_jax.steps.builtin.small_model import chat_model
        from grpo_jax.steps.builtin.task import PREFIX, TASKS
        from grpo_jax.tools.quickstart import MODEL

        task = None if path is None else TASKS[path.removeprefix(PREFIX)]
        return MODEL if task is None else chat_model(task.WORDS, task.POSITIONS)
    if path in CONFIGS:
        return CONFIGS[path]
    folder = request.getfixturevalue("shared_data") / Path(path).name
    return json.loads((folder / "config.json").read_text())


def shapes_of(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype)) for path, leaf in leaves}


def test_there_are_the_recipes_that_the_readme_lists():
    assert {"quickstart.yaml", "stories.yaml", "tools_quickstart.yaml", "number_guessing.yaml"} <= set(RECIPES)
    assert "python_qwen2.5_1.5b.yaml" in RECIPES
    assert GSM8K == ["gsm8k_gemma3_1b.yaml", "gsm8k_llama3.1_8b.yaml", "gsm8k_qwen2.5_0.5b.yaml", "gsm8k_qwen2.5_1.5b.yaml"]


@pytest.mark.parametrize("name", GSM8K)
def test_a_comment_gives_command_hardware_time_and_expected_result(name: str):
    head = [line for line in (FOLDER / name).read_text().splitlines() if line.startswith("#")]
    said = {
        key: next((line for line in head if re.match(rf"# {key}: +\S", line)), None)
        for key in ("Command", "Hardware", "Time", "Expected")
    }
    assert None not in said.values(), said
    assert f"grpo-jax train --config configs/{name}" in str(said["Command"])
    gated = str(Config.from_yaml(FOLDER / name).model.path).split("/")[0] in ("meta-llama", "google")
    assert gated == ("licence" in " ".join(head)) == ("hf auth login" in " ".join(head))


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_a_recipe_is_read(name: str):
    config = Config.from_yaml(FOLDER / name)
    written = yaml.safe_load((FOLDER / name).read_text())
    for section, values in written.items():
        for key, value in values.items():
            assert config.__dict__[section].__dict__[key] == value, f"{section}.{key}"


@pytest.mark.parametrize("path", CONFIGS)
def test_a_public_model_has_as_many_parameters_as_its_page_says(path: str):
    spec = read_spec(CONFIGS[path], path)
    assert count_parameters(spec) == PARAMETERS[path]
    tree = abstract_params(spec, spec.dtype)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) == PARAMETERS[path]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} == {"bfloat16"}


def test_gemma_has_five_local_layers_to_a_global_one_and_llama_its_scaled_rope():
    gemma = read_spec(CONFIGS["google/gemma-3-1b-it"])
    assert [layer for layer, window in enumerate(gemma.windows) if window is None] == [5, 11, 17, 23]
    assert [(rope.theta, rope.kind) for rope in gemma.ropes] == [(1e6, "default"), (1e4, "default")]
    assert set(gemma.windows) == {None, 512}
    (rope,) = read_spec(CONFIGS["meta-llama/Llama-3.1-8B-Instruct"]).ropes
    assert (rope.kind, rope.theta, rope.factor, rope.original_length) == ("llama3", 5e5, 8.0, 8192)


def test_adapters_on_all_linear_layers_have_as_many_weights_as_by_hand():
    spec = read_spec(CONFIGS["Qwen/Qwen2.5-0.5B-Instruct"])
    # q and o 896 x 896, k and v 896 x 128, three of 896 x 4864; 24 layers, rank 16.
    by_hand = 24 * 16 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
    made = jax.eval_shape(lambda: init_lora(spec, LoraConfig(rank=16), jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made)) == by_hand == 8_798_208


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_of_a_recipe_is_built_abstractly_and_its_step_traces(name: str, request: pytest.FixtureRequest):
    config = Config.from_yaml(FOLDER / name)
    spec = read_spec(model_config(config, request), name)
    dtype = spec.dtype if config.model.dtype == "auto" else config.model.dtype
    params = abstract_params(spec, dtype)
    assert {path: leaf.shape for path, leaf in flatten(params)} == {path: p.shape for path, p in param_specs(spec).items()}
    full, supervised = config.lora.rank == 0, name.endswith("_sft.yaml")
    if full:
        trainable, frozen, variables = abstract_params(spec, "float32"), Frozen({}, params), {"params": params}
    else:
        trainable = jax.eval_shape(lambda: init_lora(spec, config.lora, jax.random.key(0)))
        frozen, variables = Frozen(params, {}), {"params": params, "lora": trainable}

    group = 1 if supervised else config.rollout.num_generations
    learner = learner_of(config, spec, dtype, group)
    step = functools.partial(supervised_step if supervised else train_step, learner)
    state = jax.eval_shape(learner.init, trainable)
    after, packed = jax.eval_shape(step, state, abstract_batch(config, group), frozen)
    assert shapes_of(after) == shapes_of(state)
    assert isinstance(packed, PackedMetrics)
    assert packed.values.shape == (len(packed.names) + (0 if supervised else config.train.prompts_per_step * group),)

    sizes, tokens = rollout_shapes(config, spec, dtype, variables)
    assert tokens.ids.shape == tokens.logps.shape == (sizes.slots, sizes.segment + 1)
    assert tokens.ends.shape == tokens.stopped.shape == (sizes.slots,)
    assert str(tokens.logps.dtype) == "float32"
    # The last segment's keys and values are never read again, and the last token has none.
    assert sum(sizes.past_blocks) + sizes.segment + 1 >= config.rollout.max_completion_length


def learner_of(config: Config, spec: ModelSpec, dtype: str, group: int) -> Learner:
    """As the loop makes it."""
    train, optim, full = config.train, config.optim, config.lora.rank == 0
    remat = "none" if config.model.remat == "none" else "layer"
    return Learner(
        model=Transformer(spec, jnp.dtype(dtype), 1.0 if full else config.lora.scale, remat),
        objective=config.objective,
        optimizer=make_optimizer(optim, train.steps),
        learning_rate=functools.partial(learning_rate_at, optim, train.steps),
        full=full,
        temperature=config.rollout.temperature,
        max_completion_length=config.rollout.max_completion_length,
    )


def abstract_batch(config: Config, g: int) -> TrainBatch:
    """A whole step of the longest prompts and completions."""
    train, rollout = config.train, config.rollout
    cut = (train.micro_batch_prompts or train.prompts_per_step, train.micro_batch_completions or g)
    return padded_batches.shapes_of(train.prompts_per_step, g, rollout.max_prompt_length, rollout.max_completion_length, cut)


def rollout_shapes(config: Config, spec: ModelSpec, dtype: str, variables: Any) -> tuple[Sizes, Any]:
    """The sizes of a rollout where memory does not count, and the tokens of a segment with all of the past in use."""
    rollout, prompts, longest = config.rollout, config.train.prompts_per_step, config.rollout.max_prompt_length
    model = Transformer(spec, jnp.dtype(dtype), 1.0 if config.lora.rank == 0 else config.lora.scale)
    sizes = sizes_of(rollout, prompts, longest, choose_slots(spec, rollout, prompts, longest, model.dtype.itemsize, None))

    def shape(*size: int, kind: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(size, kind)

    computed = functools.partial(prefill, model, kv_dtype="auto")
    held = jax.eval_shape(computed, variables, shape(sizes.prompt_slots, sizes.prompt), shape(sizes.prompt_slots))
    past = functools.partial(empty_past_block, spec, model.dtype, sizes.slots, kv_dtype="auto", unroll=False)
    past_blocks = tuple(jax.eval_shape(functools.partial(past, size)) for size in sizes.past_blocks)
    flag = shape(sizes.slots, kind=jnp.bool_)
    schedule = SlotState(*[shape(sizes.slots)] * 7, live=flag, begins=flag)
    table = None if sizes.fixed else shape(sizes.prompt_slots, sizes.slots_per_prompt)
    controls = jax.eval_shape(lambda: controls_of(rollout, 0, 0))
    program = functools.partial(decode_segment, model, (1,), length=sizes.segment)
    return sizes, jax.eval_shape(program, variables, held, past_blocks, schedule, table, controls)[0]


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith("_sft.yaml")])
def test_the_rewards_of_a_recipe_are_found_and_fit_its_columns(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(FOLDER.parent)
    config = Config.from_yaml(FOLDER / name)
    entries, columns = list[Any](config.rewards.functions), ["question", "answer"]
    if config.environment.name is not None:
        setup = EpisodeSetup.read(config, EpisodeInputs(), entries)
        config, entries, columns = setup.config, setup.entries, [*columns, *setup.columns]
    functions = resolve_functions(entries, max_completion_length=config.rollout.max_completion_length)
    check_functions(functions, columns, config.rewards.weights, config.rewards.accuracy)


@pytest.mark.parametrize("name", GSM8K)
def test_gsm8k_recipes_ask_for_the_real_dataset_and_score_what_the_system_prompt_asks_for(name: str):
    config = Config.from_yaml(FOLDER / name)
    data = config.data
    assert (data.path, data.name, data.split, data.eval_split, data.eval_size) == ("openai/gsm8k", "main", "train", "test", 256)
    assert (data.prompt_column, data.overlong) == ("question", "drop")
    assert "####" in str(data.system_prompt)
    entry = config.rewards.functions[1]
    assert isinstance(entry, dict)
    shape = regex_format(entry["pattern"])
    asked, other = "2 + 3 = 5 eggs,\n5 * 2 = 10\n#### 10", "The answer is 10."
    assert shape(completions=[asked, asked + "\n", "x\n#### $1,080.50", other, asked + " dollars"]) == [1, 1, 1, 0, 0]
    assert number_match()(completions=[asked, other], answer=["#### 10", "#### 10"]) == [1, 1]
    assert config.rewards.accuracy == "number_match"
