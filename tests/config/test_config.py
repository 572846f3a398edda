"""Settings: names, types, ranges, presets, precedence, and the way from and to YAML."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_jax.config import (
    Config,
    ConfigError,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RewardsConfig,
    RolloutConfig,
    TrainConfig,
    check_training,
    config_from_dict,
    config_to_dict,
    difference,
    load,
    read_yaml,
    resolved_settings,
    write_yaml,
)

READY = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "rewards": {"functions": ["exact_match"]}}


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def sources_of(config: Config, sources: dict[str, str] | None = None) -> dict[str, str]:
    return {setting.name: setting.source for setting in resolved_settings(config, sources)}


@pytest.mark.parametrize(
    ("values", "suggested"),
    [
        ({"optim": {"learning_rte": 1e-5}}, "optim.learning_rate"),
        ({"optm": {"learning_rate": 1e-5}}, "optim"),
        ({"optm.learning_rate": 1e-5}, "optim.learning_rate"),
        ({"learning_rate": 1e-5}, "optim.learning_rate"),
        ({"train": {"learning_rate": 1e-5}}, "optim.learning_rate"),
        ({"train": {"max_steps": 5}}, "train.steps"),
        ({"objective": {"eps": 0.2}}, "objective.epsilon"),
        ({"rollout": {"num_generation": 4}}, "rollout.num_generations"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(values: dict[str, Any], suggested: str):
    with pytest.raises(ConfigError, match=rf"is not a setting; did you mean {suggested}\?"):
        config_from_dict(values)


def test_a_name_that_is_like_no_other_is_answered_with_the_sections():
    with pytest.raises(ConfigError, match="zzzz is not a setting; the sections are model, lora, data, rollout, env"):
        config_from_dict({"zzzz": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"steps": True}}, "train.steps is true: expected a whole number"),
        ({"train": {"steps": 1.0}}, "train.steps is 1.0: expected a whole number"),
        ({"train": {"steps": "many"}}, "train.steps is 'many': expected a whole number"),
        ({"train": {"steps": None}}, "train.steps is null: expected a whole number"),
        ({"train": {"quiet": 1}}, "train.quiet is 1: expected true or false"),
        ({"optim": {"learning_rate": False}}, "optim.learning_rate is false: expected a finite number"),
        ({"optim": {"learning_rate": float("nan")}}, "optim.learning_rate is nan: expected a finite number"),
        ({"optim": {"learning_rate": float("inf")}}, "optim.learning_rate is inf: expected a finite number"),
        ({"model": {"path": 7}}, "model.path is 7: expected text, or null"),
        ({"objective": {"loss": "drgrpo"}}, "objective.loss is 'drgrpo': expected one of .*; did you mean dr_grpo"),
        ({"objective": {"preset": "dapoo"}}, "objective.preset is 'dapoo': expected one of .*; did you mean dapo"),
        ({"objective": {"scale_rewards": False}}, "objective.scale_rewards is false: expected one of group, batch, none"),
        (
            {"rewards": {"functions": "exact_match"}},
            r"rewards.functions is 'exact_match': expected a list, written \[a, b\], of text",
        ),
        ({"rewards": {"weights": [1.0, "x"]}}, r"rewards.weights is \[1.0, 'x'\]: expected a list"),
        ({"rollout": {"stop": "###"}}, r"rollout.stop is '###': expected a list, written \[a, b\], of text"),
        ({"rollout": {"kv_dtype": "int2"}}, "rollout.kv_dtype is 'int2': expected one of auto, int8, int4"),
        ({"data": {"template_arguments": [1]}}, r"data.template_arguments is \[1\]: expected a mapping"),
        ({"train": 5}, "train is 5: expected a mapping of its settings"),
    ],
)
def test_an_ill_typed_value_is_refused_with_field_value_and_expected_type(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values)


@pytest.mark.parametrize(
    ("values", "field", "fix"),
    [
        ({"rollout": {"num_generations": 0}}, "rollout.num_generations is 0", "4 to 16"),
        ({"rollout": {"top_p": 0.0}}, "rollout.top_p is 0.0", "above 0"),
        ({"rollout": {"min_completion_length": 300}}, "rollout.min_completion_length is 300", "256"),
        ({"rollout": {"slots": 0}}, "rollout.slots is 0", "at least 1, or null"),
        ({"rollout": {"segment": 0}}, "rollout.segment is 0", "at least 1, or null"),
        ({"rollout": {"stop": ["###", ""]}}, r"rollout.stop is \['###', ''\]", "leave it out"),
        ({"train": {"micro_batch_prompts": 3}}, "train.micro_batch_prompts is 3", r"divisor of train.prompts_per_step \(8\)"),
        (
            {"train": {"micro_batch_completions": 3}},
            "train.micro_batch_completions is 3",
            r"divisor of rollout.num_generations \(8\)",
        ),
        ({"train": {"micro_batch_completions": 0}}, "train.micro_batch_completions is 0", "divisor"),
        ({"rewards": {"functions": ["a", "b"], "weights": [1]}}, r"rewards.weights is \[1.0\]", "each of the 2"),
        ({"lora": {"targets": ["q_prj"]}}, "lora.targets is 'q_prj'", "q_proj"),
        ({"lora": {"targets": "everything"}}, "lora.targets is 'everything'", "all-linear"),
        ({"objective": {"delta": 1.1}}, "objective.delta is 1.1", "more than 1 [+] epsilon_high = 1.2"),
        ({"optim": {"learning_rate": 0}}, "optim.learning_rate is 0.0", "positive"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_mend(values: dict[str, Any], field: str, fix: str):
    with pytest.raises(ConfigError, match=f"{field}: .*{fix}"):
        config_from_dict(values)


def test_sections_made_in_python_are_checked_alike():
    with pytest.raises(ConfigError, match=r"lora.rank is true: expected a whole number"):
        LoraConfig(rank=True)
    with pytest.raises(ConfigError, match=r"objective.preset is 'gsp': did you mean gspo"):
        ObjectiveConfig(preset="gsp")  # pyright: ignore[reportArgumentType] - the mistake under test
    with pytest.raises(ConfigError, match=r"train is .*: expected a TrainConfig"):
        Config(train={"steps": 3})  # pyright: ignore[reportArgumentType] - the mistake under test


def test_lossless_conversions_leave_plain_values():
    assert type(LoraConfig(alpha=32).alpha) is float
    assert type(TrainConfig(steps=np.int64(5)).steps) is int  # pyright: ignore[reportArgumentType] - NumPy's int
    assert type(OptimConfig(learning_rate=np.float32(0.5)).learning_rate) is float  # pyright: ignore[reportArgumentType] - converted
    assert LoraConfig(targets=("q_proj", "v_proj")).targets == ["q_proj", "v_proj"]  # pyright: ignore[reportArgumentType] - converted
    assert ModelConfig(path=Path("a") / "b").path == str(Path("a") / "b")  # pyright: ignore[reportArgumentType] - converted


def test_a_section_does_not_share_a_list_with_its_maker():
    names = ["exact_match"]
    section = RewardsConfig(functions=names)  # pyright: ignore[reportArgumentType] - list is invariant
    names.append("other")
    assert section.functions == ["exact_match"]


@pytest.mark.parametrize("spelling", ["1e-6", "1E-6", "0.000001", "1.0e-6", '"1e-6"'])
def test_every_spelling_of_a_small_number_is_a_float(tmp_path: Path, spelling: str):
    path = written(tmp_path, f"optim:\n  learning_rate: {spelling}\n")
    assert Config.from_yaml(path).optim.learning_rate == 1e-6
    assert load(None, {"optim.learning_rate": spelling.strip('"')}).config.optim.learning_rate == 1e-6
    assert config_from_dict({"optim": {"learning_rate": spelling.strip('"')}}).optim.learning_rate == 1e-6


def test_values_inside_mappings_keep_the_kind_that_yaml_gives_them(tmp_path: Path):
    path = written(
        tmp_path,
        """
data:
  template_arguments: {year: "2024", date: 2024-01-01, clock: 12:30, code: 010, enable_thinking: false}
rewards:
  functions: [exact_match, {name: overlong, penalty: 1e-3, pattern: "1"}]
""",
    )
    config = Config.from_yaml(path)
    assert config.data.template_arguments == {
        "year": "2024",
        "date": "2024-01-01",
        "clock": "12:30",
        "code": "010",
        "enable_thinking": False,
    }
    assert config.rewards.functions == ["exact_match", {"name": "overlong", "penalty": 0.001, "pattern": "1"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  steps: [1\n", "run.yaml, line 3, column 1: "),
        ("train:\n\tsteps: 1\n", "run.yaml, line 2, column 1: "),
        ("train:\n  steps: 1\n  seed: 2\n  steps: 3\n", "run.yaml, line 4, column 3: 'steps' is given twice"),
        ("- train\n", "run.yaml holds a list: write sections"),
        ("hello\n", "run.yaml holds a str: write sections"),
        ("a: !!python/object/apply:os.getcwd []\n", "run.yaml, line 1, column 4: "),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused_with_its_line(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        read_yaml(written(tmp_path, text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: there is no such file"):
        read_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_yaml(tmp_path / "bytes.yaml")


def test_an_empty_file_and_empty_sections_are_the_defaults(tmp_path: Path):
    assert Config.from_yaml(written(tmp_path, "# nothing yet\n")) == Config()
    assert Config.from_yaml(written(tmp_path, "train:\noptim:\n")) == Config()


# What the sources say, written out by hand, in this order: loss, beta, kl, epsilon, epsilon_high, epsilon_max, advantage_eps,
# scale_rewards, mask_truncated.
EXPECTED = {
    None: ("dapo", 0.04, "k3_corrected", 0.2, 0.2, 5.0, 1e-4, "group", False),
    "deepseekmath": ("grpo", 0.04, "k3", 0.2, 0.2, 5.0, 1e-4, "group", False),
    "dr_grpo": ("dr_grpo", 0.0, "k3_corrected", 0.2, 0.2, 5.0, 1e-4, "none", False),
    "dapo": ("dapo", 0.0, "k3_corrected", 0.2, 0.28, 5.0, 1e-4, "group", True),
    "gspo": ("gspo", 0.0, "k3_corrected", 3e-4, 4e-4, 5.0, 1e-4, "group", False),
    "gmpo": ("geo_mean", 0.0, "k3_corrected", 0.4, 0.4, 5.0, 1e-4, "group", False),
    "gpg": ("gpg", 0.0, "k3_corrected", 0.2, 0.2, 5.0, 1e-4, "none", False),
    "cispo": ("cispo", 0.0, "k3_corrected", 0.2, 0.2, 5.0, 1e-4, "group", False),
    "trl": ("dapo", 0.0, "k3_corrected", 0.2, 0.2, 5.0, 1e-4, "group", False),
    "unsloth": ("bnpo", 0.001, "k3", 0.2, 0.2, 5.0, 1e-4, "group", False),
    "plain": ("reinforce", 0.04, "k1", 0.2, 0.2, 5.0, 1e-8, "group", False),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_a_preset_resolves_to_the_values_of_its_source(preset: Any):
    made = ObjectiveConfig(preset=preset)
    assert (
        made.loss,
        made.beta,
        made.kl,
        made.epsilon,
        made.epsilon_high,
        made.epsilon_max,
        made.advantage_eps,
        made.scale_rewards,
        made.mask_truncated,
    ) == EXPECTED[preset]
    assert (made.num_iterations, made.kl_in_reward, made.delta, made.importance_cap) == (1, False, None, None)


def test_a_given_setting_wins_over_the_preset_even_where_it_is_false_or_zero():
    made = ObjectiveConfig(preset="dapo", mask_truncated=False, epsilon_high=0.3)
    assert (made.mask_truncated, made.epsilon_high, made.epsilon) == (False, 0.3, 0.2)
    assert ObjectiveConfig(preset="deepseekmath", beta=0).beta == 0.0


def test_epsilon_high_is_epsilon_unless_it_is_given():
    assert ObjectiveConfig(epsilon=0.1).epsilon_high == 0.1
    assert ObjectiveConfig(epsilon=0.1, epsilon_high=0.3).epsilon_high == 0.3
    assert ObjectiveConfig(preset="dapo", epsilon=0.1).epsilon_high == 0.28


def test_the_command_line_wins_over_yaml_which_wins_over_the_preset(tmp_path: Path):
    path = written(tmp_path, "objective:\n  preset: dapo\n  epsilon: 0.1\ntrain:\n  steps: 7\n  seed: 1\n")
    loaded = load(path, {"train.steps": "9", "objective.beta": "0.5"})
    config, sources = loaded.config, sources_of(loaded.config, loaded.sources)
    assert (config.train.steps, config.train.seed) == (9, 1)
    assert (config.objective.epsilon, config.objective.epsilon_high, config.objective.beta) == (0.1, 0.28, 0.5)
    assert sources["train.steps"] == sources["objective.beta"] == "command line"
    assert sources["train.seed"] == sources["objective.epsilon"] == sources["objective.preset"] == "run.yaml"
    assert sources["objective.epsilon_high"] == sources["objective.mask_truncated"] == "preset dapo"
    assert sources["objective.kl"] == sources["optim.learning_rate"] == "default"


def test_a_null_gives_a_setting_back_to_the_preset(tmp_path: Path):
    path = written(tmp_path, "objective:\n  preset: dapo\n  epsilon_high: 0.5\n")
    loaded = load(path, {"objective.epsilon_high": "null"})
    assert loaded.config.objective.epsilon_high == 0.28
    assert sources_of(loaded.config, loaded.sources)["objective.epsilon_high"] == "preset dapo"


def test_a_null_switches_an_optional_setting_off(tmp_path: Path):
    path = written(tmp_path, "optim:\n  max_grad_norm: 0.5\ndata:\n  system_prompt: Think.\n")
    config = load(path, {"optim.max_grad_norm": "null", "data.system_prompt": "null"}).config
    assert config.optim.max_grad_norm is None
    assert config.data.system_prompt is None


def test_settings_made_in_python_are_listed_as_such():
    sources = sources_of(
        Config(train=TrainConfig(steps=3), objective=ObjectiveConfig(preset="gspo", epsilon=0.1, epsilon_high=0.2))
    )
    assert sources["train.steps"] == sources["objective.preset"] == sources["objective.epsilon"] == "set in Python"
    assert sources["objective.loss"] == "preset gspo"
    assert sources["train.seed"] == "default"


def test_every_setting_is_listed_once_with_its_value():
    config = config_from_dict(READY)
    listed = resolved_settings(config)
    names = [setting.name for setting in listed]
    assert len(names) == len(set(names)) == sum(len(section) for section in config_to_dict(config).values())
    assert {setting.name: setting.value for setting in listed}["model.path"] == "m"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        (
            "rewards.functions",
            "[exact_match, {name: overlong, penalty: 1e-3}]",
            ["exact_match", {"name": "overlong", "penalty": 0.001}],
        ),
        ("rewards.functions", '["a.py:f"]', ["a.py:f"]),
        ("rewards.weights", "[1, 0.5]", [1.0, 0.5]),
        ("rollout.stop", '["###", "\\n\\n"]', ["###", "\n\n"]),
        ("lora.targets", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("lora.targets", "all-linear", "all-linear"),
        ("data.template_arguments", "{enable_thinking: false}", {"enable_thinking": False}),
        ("data.path", "123", "123"),
        ("data.path", "null", None),
        ("data.split", "train[:100]", "train[:100]"),
        ("data.system_prompt", "Answer: a number", "Answer: a number"),
        ("data.system_prompt", "yes", "yes"),
        ("data.system_prompt", "- [unclosed", "- [unclosed"),
        ("model.revision", "1e5", "1e5"),
        ("lora.rslora", "true", True),
        ("train.steps", "3", 3),
        ("train.micro_batch_prompts", "4", 4),
        ("train.micro_batch_prompts", "null", None),
    ],
)
def test_an_override_is_read_as_its_fields_type(name: str, text: str, value: Any):
    changed = {"rewards.weights": {"rewards.functions": "[a, b]"}}.get(name, {})
    settings = {setting.name: setting.value for setting in resolved_settings(load(None, {name: text} | changed).config)}
    assert settings[name] == value
    assert type(settings[name]) is type(value)


def test_what_is_written_reads_back_the_same(tmp_path: Path):
    config = config_from_dict(
        {
            "model": {"path": "m", "revision": "12e4567"},
            "data": {
                "system_prompt": "Zeile 1\n  \"quoted\": 'ü' – 1e-3\n",
                "template_arguments": {"year": "2024", "x": "null", "y": 1e-7},
            },
            "rewards": {"functions": ["a", {"name": "b", "k": "1e5"}]},
            "objective": {"preset": "dapo", "delta": 4},
            "optim": {"learning_rate": "3e-7"},
        }
    )
    write_yaml(config, tmp_path / "out.yaml")
    assert Config.from_yaml(tmp_path / "out.yaml") == config
    assert config_from_dict(config_to_dict(config)) == config


def test_what_is_no_plain_data_cannot_be_written(tmp_path: Path):
    config = Config(rewards=RewardsConfig(functions=[{"name": "a", "f": print}]))
    with pytest.raises(ConfigError, match="not plain data"):
        write_yaml(config, tmp_path / "out.yaml")


def test_the_difference_names_every_changed_setting_with_both_values():
    old, new = config_to_dict(config_from_dict(READY)), config_to_dict(config_from_dict(READY | {"optim": {"learning_rate": 2e-5}}))
    assert difference(old, old) == []
    assert difference(old, new) == ["optim.learning_rate: 1e-05 -> 2e-05"]
    del old["train"]["seed"]
    new["train"]["quiet"] = True
    assert difference(old, new) == ["optim.learning_rate: 1e-05 -> 2e-05", "train.quiet: false -> true", "train.seed: (none) -> 0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout": {"num_generations": 1}}, "rollout.num_generations is 1: .*at least 2"),
        ({"rollout": {"temperature": 0}}, "rollout.temperature is 0.0: .*all alike"),
        ({"model": {}}, "model.path is null: give a model folder or a hub id"),
        ({"data": {}}, "data.path is null: give a file"),
        ({"rewards": {}}, r"rewards.functions is \[\]: name at least one"),
        ({"optim": {"warmup_steps": 100}}, r"optim.warmup_steps is 100: use fewer than train.steps \(100\)"),
    ],
)
def test_what_cannot_be_trained_is_refused(change: dict[str, Any], message: str):
    check_training(config_from_dict(READY))
    with pytest.raises(ConfigError, match=message):
        check_training(config_from_dict(READY | change))


def test_what_is_handed_over_need_not_be_named():
    check_training(Config(), has_policy=True, has_dataset=True, has_rewards=True)
    with pytest.raises(ConfigError, match=r"rewards.functions"):
        check_training(Config(), has_policy=True, has_dataset=True)


@pytest.mark.parametrize("slots", [1, 12, 1000])
def test_slots_need_not_be_a_multiple_of_the_completions(slots: int):
    assert RolloutConfig(num_generations=8, slots=slots).slots == slots


def test_greedy_sampling_of_one_completion_is_a_valid_rollout():
    assert RolloutConfig(num_generations=1, temperature=0).temperature == 0.0


def test_settings_import_neither_jax_nor_numpy():
    code = "import sys, grpo_jax.config; sys.exit(any(name in sys.modules for name in ('jax', 'numpy', 'flax')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_epochs_replace_the_steps_and_steps_that_were_given_stay() -> None:
    assert Config().train.steps == 100
    assert Config.from_dict({"train": {"epochs": 2}}).train.steps == 0  # until the rows are read
    resolved = Config.from_dict({"train": {"epochs": 2, "steps": 24}})
    assert (resolved.train.epochs, resolved.train.steps) == (2.0, 24)
    with pytest.raises(ConfigError, match=r"train\.steps is 0: use at least 1"):
        TrainConfig(steps=0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train": {"epochs": 0}}, r"train\.epochs is 0\.0: use a positive number of passes"),
        ({"optim": {"warmup_ratio": 1.0}}, r"optim\.warmup_ratio is 1\.0: use a share of all updates from 0 up to 1"),
        ({"optim": {"warmup_ratio": 0.1, "warmup_steps": 3}}, r"optim\.warmup_ratio is 0\.1: leave out this or warmup_steps \(3\)"),
        ({"data": {"overlong_quantile": 0.0}}, r"data\.overlong_quantile is 0\.0: use a share above 0"),
    ],
)
def test_epochs_and_shares_out_of_range_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(section)
