"""`grpo-jax plan`: the memory that a run needs, and advice where it does not fit; and `micro_batch_prompts: auto`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from plain_oracles import quick_compiling
from plan_runs import RANK, settings
from shared_programs import shared_programs

import grpo_jax.fit.auto as auto
from grpo_jax.config import Config, ConfigError
from grpo_jax.data.tokenizer_files import read_model_stop_ids
from grpo_jax.fit.abstract import abstract_policy, placement_of
from grpo_jax.fit.memory_use import COMPONENTS, MemoryUse
from grpo_jax.fit.micro_batch import longest_lengths, rows_to_try, smaller_rows
from grpo_jax.fit.phases import RolloutMemory, RunShapes
from grpo_jax.fit.targets import GPUS, Machine
from grpo_jax.rollout.shapes import evaluation_slots, sizes_of
from grpo_jax.steps.builtin import number_guessing
from grpo_jax.steps.builtin.small_model import save_chat_model
from grpo_jax.tools.plan import PlanError, json_of, machine_of, make_plan, model_folder, rows_of
from grpo_jax.tools.plan.advice import Search, for_mesh, with_changes
from grpo_jax.tools.plan.verdict import Planner
from grpo_jax.weights.hf import read_folder_spec
from grpo_kernels.target import Target

PARAMETERS = 512 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64)
"""By hand: the tied embedding, the last norm; per layer q and o, k and v, three matrices of the feed-forward, two norms."""
ADAPTERS = 2 * RANK * (2 * (64 + 64) + 2 * (64 + 32) + 2 * (64 + 128) + (128 + 64))
"""Per layer (in + out) · rank of each of the seven matrices."""

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the libtpu wheel")


@pytest.fixture(scope="module", autouse=True)
def sharing() -> Iterator[None]:
    with shared_programs():
        yield


@pytest.fixture
def quickly() -> Iterator[None]:
    """For tests that compare what was compiled in the same way."""
    with quick_compiling():
        yield


def check_sums(plan: dict[str, Any]) -> None:
    """Asserts that components sum to the peak, in each phase and in the larger one."""
    for phase in (plan["rollout"], plan["update"]):
        assert set(phase["memory"]) == set(COMPONENTS)
        assert sum(phase["memory"].values()) == phase["peak_memory_bytes"]
    assert sum(plan["memory"].values()) == plan["peak_memory_bytes"]
    assert plan["peak_memory_bytes"] == max(plan["rollout"]["peak_memory_bytes"], plan["update"]["peak_memory_bytes"])


def test_the_command_ends_with_one_line_of_json(folder: Path, tmp_path: Path) -> None:
    """Runs the command in its own process and checks the JSON keys."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: {folder}}}\nlora: {{rank: {RANK}}}\ntrain: {{prompts_per_step: 2}}\n"
        "rollout: {num_generations: 4, max_prompt_length: 16, max_completion_length: 24}\n"
    )
    words = [sys.executable, "-m", "grpo_jax", "plan", "--config", str(file), "--target", "cpu", "--json"]
    environment = os.environ | tiny_runs.quick_environment()
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout.splitlines()[-1])
    named = {
        "fits",
        "peak_memory_bytes",
        "memory",
        "rollout",
        "update",
        "slots",
        "micro_batch_completions",
        "compile_seconds",
        "advice",
    }
    assert named <= set(plan)
    assert plan["fits"] is True
    assert plan["advice"] == {}
    assert (plan["slots"], plan["micro_batch_prompts"], plan["micro_batch_completions"]) == (8, 2, 4)
    check_sums(plan)
    resident = {"base": 2 * PARAMETERS, "adapters": 4 * ADAPTERS, "reference": 4 * ADAPTERS}
    assert {name: plan["update"]["memory"][name] for name in resident} == resident
    # Two moments in float32, and a few counters.
    assert 0 <= plan["update"]["memory"]["optimizer"] - 8 * ADAPTERS <= 64
    # Keys and values of both layers in bfloat16: prompts of 16 tokens, and of a completion's 24 the last 24-token segment's not.
    heads = 2 * 2 * 2 * 16 * 2
    assert plan["rollout"]["memory"]["prefix_kv"] == 2 * 16 * heads + 2 * (4 + 64 * 2)
    assert "tokenizer" not in done.stderr


def test_a_built_in_task_is_planned_with_the_model_that_a_run_would_make_and_nothing_is_made(tmp_path: Path) -> None:
    recipe = Config.from_yaml(Path(__file__).resolve().parents[2] / "configs" / "number_guessing.yaml")
    config = replace(recipe, train=replace(recipe.train, run_dir=str(tmp_path / "run")))
    save_chat_model(tmp_path / "made", number_guessing.WORDS, number_guessing.POSITIONS, 0)
    with model_folder(config) as folder:
        assert read_folder_spec(folder) == read_folder_spec(tmp_path / "made")
        assert read_model_stop_ids(folder) == read_model_stop_ids(tmp_path / "made")
    assert not folder.exists()
    assert not (tmp_path / "run").exists()
    unknown = replace(config, model=replace(config.model, path="builtin:abacus"), data=replace(config.data, path="builtin:abacus"))
    with pytest.raises(ConfigError, match=r"model\.path is 'builtin:abacus': choose from builtin:calculator"):
        make_plan(unknown, "cpu")


@pytest.mark.slow
def test_a_recipe_of_a_built_in_task_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Config.from_yaml(Path(__file__).resolve().parents[2] / "configs" / "tools_quickstart.yaml")
    made = json_of(make_plan(recipe, "cpu"))
    assert made["fits"]
    assert made["slots"] == 16 * 8
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@needs_libtpu
def test_each_of_eight_chips_has_an_eighth_of_the_weights(folder: Path) -> None:
    made = json_of(make_plan(settings(folder, train={"micro_batch_prompts": 1}, mesh={"fsdp": -1}), "v6e-8"))
    check_sums(made)
    assert made["mesh"] == {"data": 1, "fsdp": -1, "tensor": 1, "why": ""}
    assert made["fits"]
    assert made["devices"] == 8
    # Norms and embeddings are split over `embed` too, so an eighth of everything; adapters where one side is `embed`.
    assert made["update"]["memory"]["base"] == 2 * PARAMETERS // 8
    # A mesh needs at least one prompt per shard.
    assert (made["micro_batch_prompts"], made["advice"]) == (8, {})
    assert made["limit_bytes"] == int(31.24 * 2**30)
    assert made["rollout"]["seconds_at_least"] > 0


@pytest.mark.slow
@needs_libtpu
def test_each_of_eight_chips_has_all_of_the_weights_where_they_are_small(folder: Path) -> None:
    """A rollout joins q, k and v, gate and up, and two norms, in copies of both layers."""
    made = make_plan(settings(folder), "v6e-8")
    bases = [json_of(made)[phase]["memory"]["base"] for phase in ("update", "rollout")]
    assert bases == [2 * PARAMETERS, 2 * (PARAMETERS + 2 * (64 * 64 + 2 * 64 * 32 + 2 * 64 * 128 + 2 * 64))]
    shown = dict(rows_of(made))
    assert shown["mesh"].startswith(
        "data 8, fsdp 1, tensor 1; auto chose copies, because the frozen weights take 0.00 GiB, at most half"
    )
    assert shown["attention of the update"] == "mosaic_tpu"


@needs_libtpu
def test_shards_are_tried_first_where_copies_do_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the weights leave half of the memory, and the made-up activations take more."""

    def update(run: Any) -> MemoryUse:
        shards = run.placement.layout.mesh.shape["fsdp"]
        return MemoryUse(dict.fromkeys(COMPONENTS, 0) | {"base": 800_000 // shards, "activations": 900_000}, 0.0)

    def rollout(run: Any, _: int) -> RolloutMemory:
        return RolloutMemory(MemoryUse(dict.fromkeys(COMPONENTS, 0), 0.0), 32, sizes_of(run.config.rollout, 8, 16, 32))

    monkeypatch.setattr("grpo_jax.tools.plan.verdict.update_memory", update)
    monkeypatch.setattr("grpo_jax.tools.plan.verdict.rollout_memory", rollout)
    machine = replace(machine_of("v6e-8"), limit_bytes=1_600_000)
    monkeypatch.setattr("grpo_jax.tools.plan.machine_of", lambda name: machine)
    made = json_of(make_plan(settings(folder, train={"micro_batch_prompts": 8}), "v6e-8"))
    assert not made["fits"]
    assert made["mesh"]["data"] == -1
    assert made["advice"] == {"mesh.data": 1, "mesh.fsdp": -1}


def test_a_plan_has_the_micro_batch_that_the_run_will_choose(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up memory: 100 bytes a token, more where less is recomputed, and room for 30,000 bytes on an accelerator.

    A group has 16 + 4 · 23 = 108 tokens, and rows of accelerators are multiples of 128: eight groups take 896, two 256.
    """
    bytes_of = {"none": 200, "selective": 110, "layer": 100}

    def update(run: Any, program: Any = None) -> MemoryUse:
        tokens, remat = run.sizes[0].tokens, run.learner.model.remat
        return MemoryUse(dict.fromkeys(COMPONENTS, 0) | {"activations": bytes_of[remat] * tokens}, 0.0)

    def rollout(run: Any, _: int) -> RolloutMemory:
        return RolloutMemory(MemoryUse(dict.fromkeys(COMPONENTS, 0), 0.0), 32, sizes_of(run.config.rollout, 8, 16, 32))

    monkeypatch.setattr(auto, "update_memory", update)
    monkeypatch.setattr(auto, "activation_bytes", lambda run: bytes_of[run.learner.model.remat] * run.sizes[0].tokens)
    monkeypatch.setattr(RunShapes, "resident", property(lambda run: {}))
    monkeypatch.setattr("grpo_jax.tools.plan.verdict.rollout_memory", rollout)
    machine = replace(machine_of("cpu"), limit_bytes=30_000, target=Target("tpu", 128 * 2**20, 6))
    monkeypatch.setattr("grpo_jax.tools.plan.machine_of", lambda name: machine)
    made = make_plan(settings(folder), "v6e-1")
    said, shown = json_of(made), dict(rows_of(made))
    assert (said["fits"], said["micro_batch_auto"], said["micro_batch_tokens"], said["remat"]) == (True, True, 256, "selective")
    assert shown["micro-batch"] == "256 tokens: 2 prompts, 4 completions of each; auto chose this by compiling, as the run will"
    assert shown["model.remat"].startswith("selective; auto chose this")


def with_limit(machine: Machine, limit: int) -> Machine:
    """Returns the machine with another memory limit."""
    return replace(machine, limit_bytes=limit)


@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
def test_advice_that_is_followed_fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine, with a limit that leaves room for half of what the update needs next to the resident arrays."""
    config = settings(folder, model={"remat": "layer"}, train={"micro_batch_prompts": 8})
    whole = make_plan(config, "cpu")
    update = whole.verdict.update
    scratch = update.components["activations"] + update.components["temporaries"]
    limit = update.peak_bytes - scratch // 2
    here = machine_of("cpu")
    monkeypatch.setattr("grpo_jax.tools.plan.machine_of", lambda name: with_limit(here, limit))
    shown: list[str] = []
    short = make_plan(config, "cpu", show=shown.append)
    said = json_of(short)
    assert not said["fits"]
    assert said["advice"]["train.micro_batch_tokens"] < whole.verdict.tokens
    assert any(line.startswith("trying train.micro_batch_tokens") for line in shown)
    again = json_of(make_plan(with_changes(config, said["advice"]), "cpu"))
    assert again["fits"]
    assert again["peak_memory_bytes"] <= limit


def test_nothing_fits_where_the_weights_alone_do_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiling: both phases need the same memory, whatever is changed."""
    memory = dict.fromkeys(COMPONENTS, 0) | {"base": 5000, "temporaries": 100}
    tried: list[Config] = []

    def rollout(run: Any, limit: int) -> RolloutMemory:
        tried.append(run.config)
        return RolloutMemory(MemoryUse(memory, 0.0), 32, sizes_of(run.config.rollout, 8, 16, 32))

    monkeypatch.setattr("grpo_jax.tools.plan.verdict.update_memory", lambda run: MemoryUse(memory, 0.0))
    monkeypatch.setattr("grpo_jax.tools.plan.verdict.rollout_memory", rollout)
    here = with_limit(machine_of("cpu"), 1000)
    monkeypatch.setattr("grpo_jax.tools.plan.machine_of", lambda name: here)
    made = json_of(make_plan(settings(folder), "cpu"))
    assert (made["fits"], made["advice"], made["peak_memory_bytes"]) == (False, None, 5100)
    # Fewer slots and smaller micro-batches cannot be enough where the weights are too large; rounding the weights may be.
    assert [config.model.quantization for config in tried] == ["none", "int8", "int4"]


@pytest.mark.parametrize(
    ("limit", "advice"),
    [
        (900, {"model.quantization": "int8"}),  # 500 + 32 · 10: fewer slots and int8 were accepted before, and are dropped
        (700, {"rollout.kv_dtype": "int8", "model.quantization": "int8"}),  # 500 + 32 · 5
        (330, {"rollout.slots": 8, "model.quantization": "int4"}),  # 250 + 8 · 10: as many slots as fit then
    ],
)
def test_changes_that_are_not_needed_are_dropped(
    limit: int, advice: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With made-up sizes: weights of 1000 bytes that rounding halves, and 10 bytes a slot, which int8 halves."""

    def rollout(run: Any, _: int) -> RolloutMemory:
        config = run.config
        weights = {"none": 1000, "int8": 500, "int4": 250}[config.model.quantization]
        slots = config.rollout.slots or 32
        past = slots * (5 if config.rollout.kv_dtype == "int8" else 10)
        memory = dict.fromkeys(COMPONENTS, 0) | {"base": weights, "suffix_kv": past}
        return RolloutMemory(MemoryUse(memory, 0.0), slots, sizes_of(config.rollout, 8, 16, slots))

    def always(search: Search) -> Any:
        yield {"rollout.slots": 1}

    def int8(search: Search) -> Any:
        yield {"rollout.kv_dtype": "int8"}

    # These two kinds are tried in every case, also where known sizes say that they cannot be enough.
    monkeypatch.setattr(Search, "fewer_slots", always)
    monkeypatch.setattr(Search, "int8_cache", int8)
    monkeypatch.setattr("grpo_jax.tools.plan.verdict.update_memory", lambda run: MemoryUse(dict.fromkeys(COMPONENTS, 0), 0.0))
    monkeypatch.setattr("grpo_jax.tools.plan.verdict.rollout_memory", rollout)
    here = with_limit(machine_of("cpu"), limit)
    monkeypatch.setattr("grpo_jax.tools.plan.machine_of", lambda name: here)
    config = settings(folder)
    made = json_of(make_plan(config, "cpu"))
    assert made["advice"] == advice
    assert json_of(make_plan(with_changes(config, made["advice"]), "cpu"))["fits"]


@pytest.mark.parametrize("name", ["v7-8", "v5p-12", "h100x9", "b200", "tpu"])
def test_an_unknown_target_names_the_known_ones(name: str) -> None:
    with pytest.raises(PlanError, match=r"known are v4-8.*v6e-.*h100.*cpu"):
        machine_of(name)


@pytest.mark.parametrize(
    ("target", "install"), [("v6e-8", "pip install libtpu"), ("h100x8", "pip install --no-deps jax-cuda13-pjrt")]
)
def test_a_missing_compiler_says_what_to_install(target: str, install: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=install):
        machine_of(target)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "devices", "kind"),
    [("v4-8", 4, "TPU v4"), ("v5e-16", 16, "TPU v5 lite"), ("v5p-64", 32, "TPU v5"), ("v6e-1", 1, "TPU v6 lite")],
)
def test_slices_have_their_chips(name: str, devices: int, kind: str) -> None:
    """The number counts cores for v4 and v5p, two a chip."""
    machine = machine_of(name)
    assert (len(machine.devices), machine.devices[0].device_kind) == (devices, kind)


@pytest.mark.parametrize("gpu", GPUS)
def test_gpu_descriptions_are_complete(gpu: str) -> None:
    """Braces are balanced, and the memory size is written."""
    text = GPUS[gpu].text
    assert text.count("{") == text.count("}") == 3
    assert f"device_memory_size: {GPUS[gpu].memory_bytes}" in text


@needs_libtpu
def test_settings_are_changed_to_split_evenly_over_the_devices(folder: Path) -> None:
    spec, eight = read_folder_spec(folder), machine_of("v6e-8")
    config = settings(folder, rollout={"slots": 12}, train={"prompts_per_step": 24, "micro_batch_prompts": 12})
    assert for_mesh(config, spec, eight) == {"train.micro_batch_prompts": 8, "rollout.slots": 16}
    assert for_mesh(settings(folder, train={"micro_batch_prompts": 2}), spec, eight) == {}
    # Four prompts cannot be split over eight shards: two heads are split instead.
    assert for_mesh(settings(folder, train={"prompts_per_step": 4}), spec, eight) == {"mesh.fsdp": -1, "mesh.tensor": 2}


def test_smaller_rows_and_which_of_them_to_try(folder: Path) -> None:
    config = settings(folder)
    lengths = longest_lengths(config)
    group = 16 + 4 * 23  # a prompt, and four completions without their last tokens
    sizes = smaller_rows(config, 4 * group, lengths)
    assert sizes == [3 * group, 2 * group, group, 16 + 3 * 23, 16 + 2 * 23, 16 + 23]
    # Rows of 432 tokens took 864 bytes next to 100: 450 remain, for 225 tokens; then half of them, and the smallest.
    assert rows_to_try(sizes, 4 * group, 100, 864, 550) == [2 * group, group, 16 + 23]
    assert rows_to_try(sizes, 4 * group, 100, 864, 50) == [16 + 23]


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> tiny_runs.Finished:
    """A run whose prompts and completions have the longest lengths, so that it uses the programs compiled for the plan."""
    config = tiny_runs.config_of(tmp_path_factory.mktemp("auto") / "run", train={"micro_batch_prompts": "auto"})
    with quick_compiling():
        return tiny_runs.run(config)


def test_auto_prints_its_plan_and_compiles_the_longest_first(chosen: tiny_runs.Finished) -> None:
    assert re.search(r"micro-batch: \d+ tokens", chosen.printed)
    plan, step = chosen.printed.index("micro-batch:"), chosen.printed.index("step 1")
    assert plan < step
    assert chosen.printed.index("compiling update") < plan
    assert chosen.printed.count("compiling update") == 1


@pytest.mark.usefixtures("quickly")
def test_auto_trains_as_numbers_do(chosen: tiny_runs.Finished, tmp_path: Path) -> None:
    given = tiny_runs.run(tiny_runs.config_of(tmp_path / "run", train={"micro_batch_prompts": 2}))
    for ours, theirs in zip(chosen.result.history, given.result.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("fixed_share", [0.6, 0.0])
def test_auto_takes_less_where_memory_is_short(fixed_share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit below what the first micro-batch needs, and with one that nothing meets."""
    seen: list[int] = []
    update_memory: Callable[..., Any] = auto.update_memory

    def recorded(*arguments: Any) -> Any:
        found = update_memory(*arguments)
        seen.append(found.peak_bytes)
        return found

    monkeypatch.setattr(auto, "update_memory", recorded)
    config = tiny_runs.config_of(tmp_path / "run", train={"micro_batch_prompts": "auto"}, model={"remat": "layer"})
    policy_bytes = 4 * 30_000
    if fixed_share == 0.0:
        monkeypatch.setattr(auto, "least_free_bytes", lambda: 1000)
        with pytest.raises(ConfigError, match="micro_batch_tokens is auto: the smallest update needs"):
            tiny_runs.run(config)
        return
    whole = tiny_runs.run(config)
    monkeypatch.setattr(auto, "least_free_bytes", lambda: seen[0] - policy_bytes)
    monkeypatch.setattr(auto, "fit_rollout", lambda run, limit, display: rollout_anyhow(run))
    short = tiny_runs.run(replace(config, train=replace(config.train, run_dir=str(tmp_path / "short"))))
    tokens = [int(re.findall(r"micro-batch: (\d+) tokens", done.printed)[0]) for done in (whole, short)]
    assert tokens[1] < tokens[0]


@pytest.mark.usefixtures("quickly")
def test_auto_evaluates_in_as_many_slots_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slot of an evaluation has its own prompt: a limit one byte below its need halves the slots."""
    fit: Callable[..., RolloutMemory] = auto.fit_evaluation
    seen: list[RolloutMemory] = []

    def recorded(run: Any, slots: int, problems: int, limit: Any, sampler: Any) -> RolloutMemory:
        whole = fit(run, slots, problems, None, sampler)
        short = fit(run, slots, problems, whole.use.peak_bytes - 1, sampler)
        seen.extend([whole, short])
        fixed = replace(run, config=replace(run.config, train=replace(run.config.train, eval_slots=whole.slots)))
        with pytest.raises(ConfigError, match=rf"train\.eval_slots is {whole.slots}: the evaluation needs"):
            fit(fixed, slots, problems, whole.use.peak_bytes - 1, sampler)
        return short

    monkeypatch.setattr(auto, "fit_evaluation", recorded)
    config = tiny_runs.config_of(tmp_path / "run", train={"micro_batch_prompts": "auto"})
    done = tiny_runs.run(config, eval_dataset=tiny_runs.additions(6))
    whole, short = seen
    assert (whole.slots, short.slots) == (6, 3)
    assert short.use.peak_bytes < whole.use.peak_bytes
    assert "slots of an evaluation: 3" in done.printed
    assert done.result.summary["accuracy_after"] is not None


def test_an_evaluation_takes_the_slots_that_are_set() -> None:
    config = Config.from_dict({"train": {"prompts_per_step": 4}, "rollout": {"num_generations": 8}})
    assert evaluation_slots(config, 100) == 32
    assert evaluation_slots(config, 20) == 20
    assert evaluation_slots(config, 100, 5) == 30, "whole groups"
    assert evaluation_slots(config, 100, 64) == 32, "a part of a group, where one is too many"
    few = replace(config, rollout=replace(config.rollout, slots=6))
    assert evaluation_slots(few, 100) == 6
    assert evaluation_slots(replace(few, train=replace(few.train, eval_slots=3)), 100) == 3


def rollout_anyhow(run: Any) -> Any:
    """Fits the rollout without a limit."""
    sampler = auto.sampler_of(run.policy)
    return sampler, auto.rollout_memory(run, None, sampler)


def test_sft_refuses_auto(tmp_path: Path) -> None:
    from grpo_jax.training import sft

    rows = tiny_runs.write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "completion": "2"}] * 4)
    config = tiny_runs.config_of(tmp_path / "run", train={"micro_batch_prompts": "auto"}, data={"path": str(rows)})
    with pytest.raises(ConfigError, match=r"train\.micro_batch_prompts is"):
        sft(config)


def test_planning_allocates_nothing_large(folder: Path) -> None:
    """A planner's policy consists of shapes, not arrays."""
    spec, machine = read_folder_spec(folder), machine_of("cpu")
    config = settings(folder)
    policy = abstract_policy(config, folder, spec, placement_of(config, spec, machine))
    assert not any(isinstance(leaf, (np.ndarray, jnp.ndarray)) for leaf in policy.params["layers"]["q_proj"].values())
    assert Planner(folder, spec).compile_seconds == 0


@pytest.mark.slow
def test_a_cpu_plan_equals_the_growth_of_the_process() -> None:
    """For an update of some 400 MB, in its own process; within a tenth, as the runtime allocates some memory too.

    Freed memory goes back to the system at once there: what glibc keeps of it differs from run to run by a tenth.
    """
    script = Path(__file__).parents[1] / "support" / "plan_memory.py"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, env=environment)
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["planned"] > 300e6
    assert abs(measured["planned"] / measured["grown"] - 1) < 0.1, measured
