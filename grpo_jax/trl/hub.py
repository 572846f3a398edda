"""Uploads to the Hugging Face hub for `GRPOTrainer`: at every save in the background, and when it is asked for.

What is uploaded is the adapter or the whole model with tokenizer and model card. With `hub_strategy` checkpoint and all_checkpoints
so is a folder from which the run can be continued: the newest checkpoint with settings and records, without the completions.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from grpo_jax.policy import Policy
from grpo_jax.run.callbacks import Callback
from grpo_jax.runtime import distributed
from grpo_jax.trl.grpo_config import GRPOConfig
from grpo_jax.weights.hub import HubError, push_folder
from grpo_jax.weights.model_card import RunFacts
from grpo_jax.weights.publish import write_export

if TYPE_CHECKING:
    from grpo_jax.trainer import Trainer

RECORDS = ("config.yaml", "metrics.jsonl", "evaluations.jsonl", "ledger.jsonl")
"""The files of a run folder that a resumed run reads, next to its checkpoint."""


class HubUploads(Callback):
    """Uploads what a trainer has trained.

    Args:
        args: TRL's arguments.
        updates: of a step of ours, which TRL calls steps.

    Attributes:
        repo: `hub_model_id`, or the last part of `output_dir`.
    """

    def __init__(self, args: GRPOConfig, updates: int = 1) -> None:
        self.args, self.updates = args, updates
        self.repo = args.hub_model_id or Path(args.output_dir or "").name
        self._threads: ThreadPoolExecutor | None = None
        self._current: Future[str] | None = None

    def start(
        self,
        policy: Policy,
        run_dir: Path,
        message: str,
        *,
        token: str | None = None,
        revision: str | None = None,
        dataset: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> Future[str]:
        """Writes an export now, and uploads it in the background; every process of a run makes this call.

        Args:
            run_dir: of the run, for the model card.
            token, revision: None takes `hub_token` and `hub_revision`.
            dataset, tags: for the model card; see `facts_of`.

        Returns:
            The address of the commit; "" in other processes.
        """
        kind = "merged" if policy.adapters is None else "adapter"
        facts = facts_of(run_dir, dataset, tags)
        folder = TemporaryDirectory()
        out = write_export(policy, Path(folder.name) / "export", kind, facts=facts, repo=self.repo)

        def upload() -> str:
            with folder:
                if not distributed.is_main():
                    return ""
                options = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
                return push_folder(out, self.repo, private=self.args.hub_private_repo, message=message, **options)

        self._threads = self._threads or ThreadPoolExecutor(1, "hub")
        self._current = self._threads.submit(upload)
        return self._current

    def on_save(self, trainer: Trainer) -> None:
        """Uploads with `push_to_hub`, unless `hub_strategy` is end; not while the one before goes on, unless `hub_always_push`."""
        if not self.args.push_to_hub or self.args.hub_strategy == "end":
            return
        busy = self._current is not None and not self._current.done()
        if distributed.broadcast_from_main(busy) and not self.args.hub_always_push:
            return
        self._warn(trainer)
        message = f"Training in progress, step {trainer.steps_done * self.updates}"
        self.start(trainer.policy, trainer.run_dir, message)
        if self.args.hub_strategy != "every_save":
            self._start_checkpoint(trainer, message)

    def _start_checkpoint(self, trainer: Trainer, message: str) -> None:
        """Copies what resuming needs, and uploads it behind the model."""
        trainer.open()[1].wait()  # until it is on disk
        if not distributed.is_main():
            return
        last = self.args.hub_strategy == "checkpoint"
        name = "last-checkpoint" if last else f"checkpoint-{trainer.steps_done * self.updates}"
        folder = TemporaryDirectory()
        copy_resumable(trainer.run_dir, Path(folder.name) / name, trainer.steps_done)
        before = self._current
        assert before is not None
        assert self._threads is not None

        def upload() -> str:
            with folder:
                address = before.result()
                options = {"token": self.args.hub_token, "revision": self.args.hub_revision}
                source = Path(folder.name) / name
                push_folder(source, self.repo, private=self.args.hub_private_repo, message=message, subfolder=name, **options)
                return address

        self._current = self._threads.submit(upload)

    def on_train_end(self, trainer: Trainer) -> None:
        """Waits for the last upload; a failed one is said and does not end the run."""
        self._warn(trainer)
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def _warn(self, trainer: Trainer) -> None:
        """Says that the upload before has failed; waits for it."""
        current, self._current = self._current, None
        try:
            if current is not None:
                current.result()
        except HubError as error:
            trainer.display.warning(str(error))


def facts_of(run_dir: Path, dataset: str | list[str] | None = None, tags: str | list[str] | None = None) -> RunFacts | None:
    """What a model card says of a run; None before it has begun.

    Args:
        dataset: hub id of the rows, instead of the run's `data.path`; of several the first.
        tags: added to the card's own.
    """
    if not (run_dir / "config.yaml").is_file():
        return None
    facts = RunFacts.of(run_dir)
    facts = replace(facts, tags=tuple([tags] if isinstance(tags, str) else tags or ()))
    if not dataset:
        return facts
    path = dataset if isinstance(dataset, str) else dataset[0]
    return replace(facts, config=replace(facts.config, data=replace(facts.config.data, path=path)))


def copy_resumable(run_dir: Path, target: Path, step: int) -> None:
    """Copies the checkpoint of a step, and the settings and records that belong to it, into a new folder."""
    shutil.copytree(run_dir / "checkpoints" / str(step), target / "checkpoints" / str(step))
    for name in RECORDS:
        if (run_dir / name).is_file():
            shutil.copyfile(run_dir / name, target / name)


def adopt_checkpoint(folder: Path, run_dir: Path) -> None:
    """Makes a folder of `copy_resumable`, downloaded from the hub, the run of an output folder that holds none."""
    run_dir.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, run_dir, dirs_exist_ok=True)
