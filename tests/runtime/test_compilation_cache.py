"""The compilation cache on disk: where it is, who decides, and that a second process compiles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from tiny_runs import additions, quick_environment, settings, words_of, write_rows

from grpo_jax.config import Config, ConfigError
from grpo_jax.runtime import compilation_cache
from grpo_jax.runtime.compilation_cache import default_folder, machine_name, use_compilation_cache

LEAST = "jax_persistent_cache_min_compile_time_secs"
SCRIPT = """
import json, sys
import jax
counts = {"compiled": 0, "hits": 0}
def on_event(event, **_): counts["hits"] += event == "/jax/compilation_cache/cache_hits"
def on_duration(event, seconds, **_): counts["compiled"] += event == "/jax/core/compile/backend_compile_duration"
jax.monitoring.register_event_listener(on_event)
jax.monitoring.register_event_duration_secs_listener(on_duration)
from grpo_jax import cli
assert cli.main(sys.argv[1:]) == 0
print(json.dumps(counts))
"""


@pytest.fixture
def no_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX without a cache, as users have it; the tests' own one comes back afterwards."""
    before, least = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    jax_cache.reset_cache()
    yield
    compilation_cache._ours.clear()
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update(LEAST, least)
    jax_cache.reset_cache()


@pytest.mark.usefixtures("no_folder")
def test_the_folder_is_the_users_cache_folder_unless_a_setting_says_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == tmp_path / "home" / ".cache" / "grpo_jax" / machine_name()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    used = use_compilation_cache(True)
    assert used == tmp_path / "xdg" / "grpo_jax" / machine_name()
    assert jax.config.jax_compilation_cache_dir == str(used)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    assert used.stat().st_mode & 0o077 == 0  # whoever writes there runs code here
    assert use_compilation_cache(str(tmp_path / "own")) == tmp_path / "own" / machine_name()
    jax.jit(lambda x: x + 1.5)(1.0).block_until_ready()
    assert list((tmp_path / "own").rglob("*-cache"))
    assert not list(used.rglob("*-cache"))
    assert use_compilation_cache(False) is None
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.usefixtures("no_folder")
def test_a_folder_that_the_user_gave_jax_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert use_compilation_cache(True) == tmp_path / "theirs"
    assert use_compilation_cache(False) == tmp_path / "theirs"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    jax.config.update(LEAST, 7.0)
    use_compilation_cache(True)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7
    assert not (tmp_path / "xdg").exists()


@pytest.mark.usefixtures("no_folder")
def test_a_folder_that_cannot_be_made_is_an_error_only_where_the_user_named_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert use_compilation_cache(True) is None
    assert jax.config.jax_compilation_cache_dir is None
    with pytest.raises(ConfigError, match=r"train\.compilation_cache is '.*file': cannot write there"):
        use_compilation_cache(str(tmp_path / "file"))


def test_the_setting_is_a_switch_or_a_path() -> None:
    assert Config().train.compilation_cache is True
    assert Config.from_dict({"train": {"compilation_cache": False}}).train.compilation_cache is False
    assert Config.from_dict({"train": {"compilation_cache": "cache"}}).train.compilation_cache == "cache"


@pytest.mark.slow
def test_a_second_process_and_a_resumed_one_compile_nothing(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", additions())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= quick_environment() | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)

    def start(name: str, steps: int, *words: str) -> tuple[dict[str, int], dict[str, object], str]:
        data, rewards = {"path": str(rows), "eval_size": 3}, {"functions": ["exact_match"]}
        train = {"steps": steps, "prompts_per_step": 2, "save_every": 1, "quiet": True, "run_dir": str(tmp_path / name)}
        values = settings(tmp_path / name, data=data, rewards=rewards, train=train)
        command = [sys.executable, "-c", SCRIPT, "train", *words_of(values), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert "machine" not in done.stderr.lower(), done.stderr  # XLA warns where a program was compiled for another CPU
        counts = json.loads(done.stdout.splitlines()[-1])
        return counts, json.loads((tmp_path / name / "summary.json").read_text()), done.stdout

    first, summary, _ = start("first", 1)
    assert first["hits"] == 0
    assert summary["programs_from_cache"] == 0
    assert summary["programs_compiled"] > 0
    second, summary, printed = start("second", 1)
    assert second["hits"] == second["compiled"] > 0  # the duration's event comes with every hit too
    assert summary["programs_compiled"] == 0
    assert 0 < summary["programs_from_cache"] <= second["hits"]
    assert 0 < summary["seconds_to_first_rewards"] < summary["seconds_to_first_step"] < summary["seconds"] + 60
    assert "first step after" in printed
    resumed, summary, _ = start("second", 2, "--resume")
    assert summary["steps"] == 2
    assert resumed["compiled"] - resumed["hits"] <= 3, "reading a checkpoint"
