"""Compares what runs and exports have left on disk with its digests: `grpo-jax verify`. Reads every byte, changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grpo_jax.config import Config, ConfigError
from grpo_jax.run.checkpoint_files import COMMIT_FILES
from grpo_jax.run.records import RecordFile
from grpo_jax.runtime.digests import DIGESTS, DamagedError, read_digests, verify_digests

RECORDS = ("metrics.jsonl", "evaluations.jsonl", "completions.jsonl", "ledger.jsonl")


@dataclass(frozen=True)
class Verdict:
    """What was found of one folder or file.

    Attributes:
        path: of a checkpoint, an adapter, a merged model or a file of a run folder.
        damage: which file is damaged and how; "" where all is as it was written.
        note: what else is worth saying, such as the number of files.

    Example:
        Verdict(Path("runs/a/checkpoints/50"), "runs/a/checkpoints/50/state/d/8a is damaged: it has 10 bytes instead of 20")
    """

    path: Path
    damage: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"damaged  {self.damage}" if self.damage else f"ok       {self.path}{self.note and f'  ({self.note})'}"


def verify(path: str | Path) -> list[Verdict]:
    """Verifies a run folder with all that is in it, a folder of checkpoints, one checkpoint, an adapter or a merged model.

    Checkpoints that were set aside as damaged (`<step>.damaged`) are left out: nothing reads them.

    Raises:
        ConfigError: there is no such folder, or nothing in it has digests.
        OSError: the storage does not answer.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give a run folder, a checkpoint, an adapter or a merged model")
    verdicts = list(verdicts_of(folder))
    if not verdicts:
        raise ConfigError(
            f"{folder} holds no {DIGESTS}, no checkpoint and no run, so there is nothing to compare with; exports of versions "
            "before this one have no digests"
        )
    return verdicts


def verdicts_of(folder: Path) -> Iterator[Verdict]:
    """Verifies what is recognised in a folder."""
    if is_checkpoint(folder):
        yield verify_folder(folder, COMMIT_FILES)
        return
    if (folder / DIGESTS).exists():
        yield verify_folder(folder)
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    for checkpoint in sorted(filter(is_checkpoint, checkpoints.iterdir()), key=lambda entry: int(entry.name)):
        yield verify_folder(checkpoint, COMMIT_FILES)
    if (folder / "adapter" / DIGESTS).exists():
        yield verify_folder(folder / "adapter")
    if (folder / "config.yaml").is_file():
        yield verify_settings(folder / "config.yaml")
    yield from (verify_records(folder / name) for name in RECORDS if (folder / name).is_file())


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a committed checkpoint and something that only checkpoints have."""
    return folder.name.isdecimal() and any((folder / name).exists() for name in (DIGESTS, "state", "host", *COMMIT_FILES))


def verify_folder(folder: Path, ignored: tuple[str, ...] | None = None) -> Verdict:
    """Compares every file with the folder's digests; `ignored` as for `verify_digests`."""
    try:
        verify_digests(folder, ignored)
    except DamagedError as error:
        return Verdict(folder, damage=str(error))
    return Verdict(folder, note=f"{len(read_digests(folder))} files")


def verify_settings(path: Path) -> Verdict:
    """Reads the settings of a run."""
    try:
        Config.from_yaml(path)
    except ConfigError as error:
        return Verdict(path, damage=f"{path} is damaged: {error}")
    return Verdict(path)


def verify_records(path: Path) -> Verdict:
    """Reads a file of records; half a line at its end is no damage: a run that is resumed cuts it."""
    broken = RecordFile(path).broken_lines()
    return Verdict(path, damage=f"{path} is damaged: {broken} of its lines are no records" if broken else "")
