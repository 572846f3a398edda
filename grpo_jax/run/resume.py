"""Checks whether a run folder may be used: it is empty, or holds a run that can continue with the same settings."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from grpo_jax.config import Config, ConfigError, config_to_dict, difference
from grpo_jax.run.lock import LockedError, check_unlocked

FREE_ON_RESUME = (
    "environment.concurrency",
    "environment.timeout_seconds",
    "model.remat",
    "optim.max_skipped_steps",
    "optim.offload",
    "rewards.max_failed_share",
    "rewards.timeout_seconds",
    "rewards.workers",
    "rollout.dispatch_ahead",
    "rollout.refill",
    "rollout.segment",
    "rollout.slots",
    "train.accept_changed_inputs",
    "train.best_metric",
    "train.compilation_cache",
    "train.debug",
    "train.eval_every",
    "train.eval_kl",
    "train.eval_slots",
    "train.grace_seconds",
    "train.keep_best",
    "train.keep_checkpoints",
    "train.micro_batch_completions",
    "train.micro_batch_prompts",
    "train.micro_batch_tokens",
    "train.overlap",
    "train.project",
    "train.quiet",
    "train.record_tokens",
    "train.run_dir",
    "train.run_name",
    "train.save_every",
    "train.show_completions",
    "train.show_every",
    "train.stop_on",
    "train.track",
)
"""Settings that may change on resume: memory, speed, logging and limits of reward failures. A step's result is the same up to
rounding, so a run that was out of memory can continue with less."""

FREE_SECTIONS = ("mesh", "distributed", "eval")
"""Sections that may change on resume: a run can continue on other devices, and be evaluated on other sets."""


class RunFolderError(FileExistsError, ValueError):
    """A folder cannot be used for this run. The message names it and says what to do."""


def check_run_folder(run_dir: str | Path, config: Config, *, resume: bool, writes: bool = True) -> None:
    """Checks a folder without writing anything, so that it can be called before anything slow.

    Args:
        writes: False for a process that reads what another one writes.

    Raises:
        RunFolderError: the folder holds a run and resume is false; it holds a run with other settings; it is not a folder, or
            cannot be written to; or another process writes to it.
    """
    path = Path(run_dir)
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file, not a folder: choose another train.run_dir")
    if writes:
        check_writable(path)
        try:
            check_unlocked(path)
        except LockedError as error:
            raise RunFolderError(str(error)) from error
    if not holds_run(path):
        return
    if not resume:
        raise RunFolderError(f"{path} already holds a run: continue it with --resume, or choose another train.run_dir")
    if not (path / "config.yaml").is_file():
        raise RunFolderError(f"{path} holds a run but no config.yaml, so it cannot be resumed: choose another train.run_dir")
    try:
        stored = Config.from_yaml(str(path / "config.yaml"))
    except ConfigError as error:
        raise RunFolderError(f"{path / 'config.yaml'} cannot be read, so the run cannot be resumed: {error}") from error
    refused = [line for line in difference(config_to_dict(stored), config_to_dict(config)) if not may_change(line, config)]
    if refused:
        listed = "\n  ".join(refused)
        raise RunFolderError(
            f"{path} holds a run with other settings (stored -> now):\n  {listed}\n"
            "resume with the stored ones, or choose another train.run_dir to start anew"
        )


def check_writable(path: Path) -> None:
    """Raises RunFolderError where files cannot be written to a folder, or the folder cannot be made."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.exists(folder))
    if not existing.is_dir():
        raise unwritable(path, NotADirectoryError(errno.ENOTDIR, f"{existing} is a file"))
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        raise unwritable(path, PermissionError(errno.EACCES, f"{existing} is {'read-only' if read_only else 'not writable'}"))


def unwritable(path: Path, error: OSError) -> RunFolderError:
    """Builds the error for a run folder in which a file cannot be written."""
    where = "" if error.filename is None else f" ({error.filename})"
    return RunFolderError(
        f"{path} cannot be written to: {error.strerror}{where}. Make it writable or make room, or choose another train.run_dir"
    )


def may_change(line: str, config: Config) -> bool:
    """Whether a setting may differ on resume.

    `train.steps` may where the learning rate is constant; other schedules, and a warm-up by a share of them, go by it. It is 0, for
    not known yet, before `train.epochs` has met the rows.

    Args:
        line: of `difference`, such as "train.steps: 10 -> 20".
    """
    name = line.partition(":")[0]
    if name == "train.steps":
        return config.train.steps == 0 or (config.optim.schedule == "constant" and not config.optim.warmup_ratio)
    return name in FREE_ON_RESUME or name.partition(".")[0] in FREE_SECTIONS


def holds_run(path: Path) -> bool:
    """Whether a folder contains something that could be lost: a finished step, a checkpoint or a summary."""
    metrics = path / "metrics.jsonl"
    return holds_checkpoint(path) or (path / "summary.json").exists() or (metrics.is_file() and metrics.stat().st_size > 0)


def holds_checkpoint(path: Path) -> bool:
    """Whether a run folder contains a checkpoint, be it a damaged one."""
    checkpoints = path / "checkpoints"
    return checkpoints.is_dir() and any(entry.name.partition(".damaged")[0].isdecimal() for entry in checkpoints.iterdir())
