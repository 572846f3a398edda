"""Saves and restores checkpoints of a run: the train state and a dict of plain values, written by Orbax in the background.

A state is restored bit for bit, with the dtypes it was saved in and the shardings of the state that it is read into, so the mesh
and the number of processes may change. A checkpoint gets its final name only when all of its files and their digests are written,
so an incomplete one is never used. The digests are verified before anything is read: a damaged checkpoint is renamed to
`<step>.damaged` and kept, and the one before it is taken. With several processes, each writes the arrays of its own devices to
storage that all share, and all must make the same calls. Not saved: the frozen base model, which is read from its own folder again.
Remote storage is not supported.

Where a checkpoint cannot be written (a full or read-only disk, a folder that has vanished), those before it stay as they are. The
error of a save in the background is known at the next call; that one then writes before it returns, and tries several times.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import orbax.checkpoint as ocp

from grpo_jax.run.checkpoint_content import by_name, compare, describe, sharding_of
from grpo_jax.run.checkpoint_errors import CheckpointError, hide_tracebacks, reason, unreadable, unwritable
from grpo_jax.run.checkpoint_files import COMMIT_FILES, UNFINISHED, damage_of, data_file_bytes, data_files, newest_undamaged
from grpo_jax.runtime.digests import EarlyDigests, listed, write_digests
from grpo_jax.runtime.distributed import broadcast_from_main, is_lost_peer, is_main, is_multiprocess

HOST, STATE = "host", "state"
RETRY_SECONDS = (1.0, 3.0, 10.0, 30.0)
"""Waits between the tries to write a checkpoint. With several processes there is one try: they would have to agree on each."""


@dataclass(frozen=True)
class NewestAndBest:
    """Which checkpoints Orbax keeps: the newest ones, all where `count` is None, and the one of the step that `best` returns."""

    count: int | None
    best: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each of the checkpoints, in the order of their steps, stays."""
        best, oldest = self.best(), 0 if self.count is None else len(checkpoints) - self.count
        return [index >= oldest or checkpoint.step == best for index, checkpoint in enumerate(checkpoints)]


class Checkpointer:
    """The checkpoints of one run, in `folder/<step>`.

    Args:
        folder: Of the checkpoints; created if it is missing, unless keep is None.
        keep: How many of the newest checkpoints are kept; None opens the folder for reading only, which is safe while a run is
            still writing to it.
        warn: Called with a line for each checkpoint that cannot be written yet.
        best: Called when older checkpoints are removed; returns a step whose checkpoint stays, or None.

    Attributes:
        damaged: A line for each checkpoint that was found to be damaged.

    Example:
        with Checkpointer("runs/a/checkpoints", keep=2) as checkpoints:
            checkpoints.save(10, state, {"next_row": 80})
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int | None,
        warn: Callable[[str], None] = lambda line: None,
        best: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.folder = Path(folder).resolve()
        self.damaged: list[str] = []
        self._keep, self._warn, self._best = keep, warn, best
        self._current: set[int] = set()  # steps that this object has saved or restored
        self._verified: set[int] = set()  # steps with the right digests
        self._early: EarlyDigests | None = None  # of the checkpoint that is being written
        self._saving = -1  # the step that is being written in the background; -1 where none is
        if keep is None and not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no folder with checkpoints; give the folder of a run that has saved one")
        hide_tracebacks()
        self._manager = self._new_manager()

    def _new_manager(self) -> ocp.CheckpointManager:
        """Opens the folder, and removes what interrupted saves have left there."""
        writes = self._keep is not None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=NewestAndBest(self._keep, self._best),
            create=writes,
            cleanup_tmp_directories=writes,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_digests),  # called before the commit
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any, host: dict[str, Any], *, wait: bool = False) -> None:
        """Saves a checkpoint, mostly in the background; waits until the previous one is written.

        The state may be donated as soon as this returns. A step that this object has already saved or restored is not saved again.
        Other checkpoints of this step or a later one, such as a damaged one that was skipped, are removed first.

        Args:
            step: Steps finished.
            state: A tree of arrays, such as a `TrainState`.
            host: Values that JSON can hold; tuples come back as lists.
            wait: Return when the checkpoint is on disk.

        Raises:
            CheckpointError: this object is read-only, or host contains something that JSON cannot store; or the checkpoint cannot
                be written, after `len(RETRY_SECONDS)` more tries.
        """
        if self._keep is None:
            raise CheckpointError(f"{self.folder} was opened for reading only; pass a number as keep to save")
        if step in self._current and not wait:
            return
        arrays = by_name(state)
        content = {"host": host, "arrays": {name: describe(leaf) for name, leaf in arrays.items()}}
        try:
            content = json.loads(json.dumps(content))  # a copy: the caller may change its dict while Orbax writes
        except TypeError as error:
            raise CheckpointError(f"the host values of step {step} cannot be stored as JSON: {error}") from error
        previous = self._saving
        failure = self._settle()
        if step in self._current:
            return
        if failure is not None and is_multiprocess():
            self._give_up(previous, failure)
        wait = wait or failure is not None
        if failure is not None and previous != step:
            self._warn(f"the checkpoint of step {previous} could not be written ({reason(failure)}); step {step} is saved instead")
        for seconds in (None,) if is_multiprocess() else (*RETRY_SECONDS, None):
            failure = self._write(step, arrays, content, wait)
            if failure is None:
                return
            if seconds is None:
                self._give_up(step, failure)
            self._warn(f"the checkpoint of step {step} cannot be written ({reason(failure)}); trying again in {seconds:g} s")
            time.sleep(seconds)

    def _give_up(self, step: int, failure: Exception) -> NoReturn:
        """Raises the error of a save that failed; that of another process's end stays what it is."""
        if is_lost_peer(failure):
            raise failure
        raise unwritable(self.folder, step, failure) from failure

    def failed(self) -> bool:
        """Whether the last save has ended without a checkpoint; does not wait, and is False with several processes."""
        if self._saving < 0 or is_multiprocess():
            return False
        return not self._manager.is_saving_in_progress() and not (self.folder / str(self._saving)).is_dir()

    def _settle(self) -> Exception | None:
        """Waits for the save in the background; returns its error, after removing what it has written."""
        step = self._saving
        try:
            self._manager.wait_until_finished()
            if step >= 0 and is_main() and not (self.folder / str(step)).is_dir():
                raise FileNotFoundError(errno.ENOENT, "the folder of the checkpoint has vanished", str(self.folder / str(step)))
        except Exception as error:  # Orbax, TensorStore and the file system raise different types
            self._discard(step)
            return error
        finally:
            self._saving = -1
            self._end_early_digests()
        return None

    def _write(self, step: int, arrays: dict[str, Any], content: dict[str, Any], wait: bool) -> Exception | None:
        """Starts to write a checkpoint, and where `wait` is true ends it; returns the error, where there is one."""
        try:
            if not self.folder.is_dir():  # Orbax would make it anew, perhaps where nothing is mounted any more
                raise FileNotFoundError(errno.ENOENT, "the folder has vanished", str(self.folder))
            for old in self._manager.all_steps():
                if old >= step:
                    self._manager.delete(old)
                    self._verified.discard(old)
            self._saving = step
            self._early = EarlyDigests(lambda: data_files(self.folder, step)) if is_main() else None
            tree = ocp.args.PyTreeSave(arrays, ocdbt_target_data_file_size=data_file_bytes(arrays))
            args = ocp.args.Composite(state=tree, host=ocp.args.JsonSave(content))
            # The copy to the host is intended, and happens before this returns. On CPU Orbax keeps a view instead of a copy; JAX
            # then does not reuse the buffer, so that a later step to which the state is donated writes elsewhere.
            with jax.transfer_guard("allow"):
                self._manager.save(step, args=args, force=True)
        except Exception as error:
            self._saving = -1
            self._discard(step)
            return error
        self._current.add(step)
        return self._settle() if wait else None

    def _discard(self, step: int) -> None:
        """Removes what is left of a checkpoint that could not be written, so that its space is free again."""
        self._end_early_digests()
        self._current.discard(step)
        with contextlib.suppress(Exception):
            self._manager.close()
        if is_main():
            for left in self.folder.glob(f"{step}{UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
        if self.folder.is_dir() and not is_multiprocess():
            with contextlib.suppress(Exception):  # then the next save has the error
                self._manager = self._new_manager()

    def latest_step(self) -> int | None:
        """Returns the newest step whose checkpoint is not damaged, or None where none has been committed.

        Damaged checkpoints that are newer are renamed, unless this object is read-only, and listed in `damaged`.

        Raises:
            CheckpointError: there are only damaged checkpoints, or the storage cannot be read. A run that started over would lose
                what is there.
        """
        self.wait()
        writes = self._keep is not None
        found = broadcast_from_main(newest_undamaged(self.folder, self._verified, writes=writes) if is_main() else None)
        self._manager.reload()
        self.damaged += found["damaged"]
        if found["error"]:
            raise CheckpointError(found["error"])
        if found["step"] is not None:
            self._verified.add(found["step"])
        return found["step"]

    def _write_digests(self) -> None:
        """Writes the digests of the checkpoint that is about to be committed; Orbax's background thread calls it."""
        if not is_main():
            return
        (folder,) = self.folder.glob(f"{self._saving}{UNFINISHED}*")
        early = self._end_early_digests()
        write_digests(folder, listed(folder, COMMIT_FILES), early)

    def _end_early_digests(self) -> EarlyDigests | None:
        """Ends the hashing of the checkpoint that is being written, and returns what was hashed."""
        early, self._early = self._early, None
        if early is not None:
            early.close()
        return early

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
            abstract_state: A tree of the same structure, of arrays or `jax.ShapeDtypeStruct`. The result gets their shardings; a
                leaf without one goes to the first device.
            step: Which checkpoint; None is the newest undamaged one.

        Returns:
            The state, of the structure of abstract_state, and the host dict.

        Raises:
            CheckpointError: there is none, it is damaged, or its arrays have other names, shapes or dtypes, which are listed.
        """
        step = self._chosen(step)
        content = self._content(step)
        expected = by_name(abstract_state)
        compare(content["arrays"], {name: describe(leaf) for name, leaf in expected.items()}, self.folder / str(step))
        target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf)) for name, leaf in expected.items()}
        arrays = self._read(step, STATE, ocp.args.PyTreeRestore(target, ocp.checkpoint_utils.construct_restore_args(target)))
        self._current.add(step)
        leaves = [arrays[name] for name in expected]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), content["host"]

    def restore_part(self, part: str, shardings: Callable[[Any], Any], step: int | None = None) -> Any:
        """Reads one part of the saved state, such as `trainable`, and no other array.

        Args:
            part: Name of a field of the state that is a nested dict of arrays.
            shardings: Given the part as nested dicts of `jax.ShapeDtypeStruct`, returns the sharding of each array.
            step: Which checkpoint; None is the newest undamaged one.

        Raises:
            CheckpointError: there is none, it is damaged, or it has no such part.
        """
        step = self._chosen(step)
        tree: dict[str, Any] = {}
        for name, (shape, dtype) in self._content(step)["arrays"].items():
            if not name.startswith(f"{part}."):
                continue
            *path, leaf = name.split(".")[1:]
            node = tree
            for key in path:
                node = node.setdefault(key, {})
            node[leaf] = jax.ShapeDtypeStruct(tuple(shape), dtype)
        if not tree:
            raise CheckpointError(f"{self.folder / str(step)} holds no array under {part!r}; it is no checkpoint of a training run")
        targets = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings(tree))
        flat = {f"{part}.{name}": leaf for name, leaf in by_name(targets).items()}
        args = ocp.args.PyTreeRestore(flat, ocp.checkpoint_utils.construct_restore_args(flat), partial_restore=True)
        arrays = self._read(step, STATE, args)
        return jax.tree.unflatten(jax.tree.structure(targets), [arrays[name] for name in flat])

    def host(self, step: int | None = None) -> dict[str, Any]:
        """Reads only the host dict, of a step or of the newest undamaged one; it can say how to build the state to restore into.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        return self._content(self._chosen(step))["host"]

    def wait(self) -> None:
        """Waits until everything saved so far is on disk.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        step = self._saving
        failure = self._settle()
        if failure is not None:
            self._give_up(step, failure)

    def close(self) -> None:
        """Waits as `wait`, then releases Orbax's threads."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):
                self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _chosen(self, step: int | None) -> int:
        """Returns the step, or for None the newest undamaged one; raises CheckpointError where there is none or it is damaged."""
        if step is None:
            step = self.latest_step()
            if step is None:
                raise CheckpointError(f"{self.folder} holds no complete checkpoint")
            return step
        damage = broadcast_from_main(damage_of(self.folder / str(step)) if is_main() and step not in self._verified else None)
        if damage is not None:
            raise CheckpointError(damage)
        self._verified.add(step)
        return step

    def _content(self, step: int) -> dict[str, Any]:
        """Reads what was stored next to the arrays: {"host": the caller's dict, "arrays": {name: [shape, dtype]}}."""
        content = self._read(step, HOST, ocp.args.JsonRestore())
        if content.keys() != {"host", "arrays"}:
            raise unreadable(self.folder / str(step), KeyError("host values of another format"))
        return content

    def _read(self, step: int, item: str, args: Any) -> Any:
        """Reads one item of a checkpoint; any error becomes a CheckpointError."""
        try:
            with jax.transfer_guard("allow"):
                return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # Orbax, TensorStore and the file system raise different types
            raise unreadable(self.folder / str(step), error) from error
