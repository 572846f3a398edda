"""Which run `train(resume_from_checkpoint=...)` continues."""

from __future__ import annotations

from pathlib import Path

from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.run.resume import holds_run
from grpo_jax.runtime import distributed
from grpo_jax.trl.arguments import allow
from grpo_jax.trl.hub import adopt_checkpoint


def resumes(given: str | Path | bool | None, folder: Path, updates: int) -> bool:
    """Whether the run in a folder is continued; a folder that was uploaded becomes the run of an empty one.

    Args:
        given: the argument: True, the folder itself, its newest checkpoint, or a folder that `hub_strategy` has uploaded.
        folder: `output_dir`.
        updates: of a step of ours, which TRL calls steps.

    Raises:
        ConfigError: another path.
    """
    if not given or given is True:
        return bool(given)
    path = Path(given)
    if path.resolve() == folder.resolve():
        return True
    for uploaded in (path, folder / path):
        if not holds_run(folder) and (uploaded / "config.yaml").is_file() and (uploaded / "checkpoints").is_dir():
            if distributed.is_main():
                adopt_checkpoint(uploaded, folder)
            distributed.barrier("resume_from_checkpoint")
            return True
    number = path.name.removeprefix("checkpoint-")
    inside = path.parent.resolve() in (folder.resolve(), (folder / "checkpoints").resolve())
    with Checkpointer(folder / "checkpoints", keep=None) as checkpoints:
        newest = checkpoints.latest_step() or 0
    names = {str(newest), f"checkpoint-{newest * updates}"}
    fix = f"use True, or the newest one, {folder / 'checkpoints' / str(newest)}"
    allow(inside and bool(newest) and path.name in names and number.isdecimal(), "resume_from_checkpoint", str(given), fix)
    return True
