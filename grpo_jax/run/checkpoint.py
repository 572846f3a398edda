"""Checkpoints of a run: the train state and a few host values, written by Orbax while training goes on.

Enters: the train state (any tree of arrays) and a dict of plain values, at a step. Leaves: the same, bit for bit, with the dtypes
it was saved in and the shardings of the state that it is read into: another mesh, or another number of processes. A checkpoint
gets its final name only when every file of it is written, so one that was cut short is never taken. Of several processes each
writes what its devices hold, to storage that all share, and all have to make the same calls. Left out on purpose: the frozen base
model, which training does not change and which is read from its own folder again; remote storage.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from grpo_jax.runtime.distributed import broadcast_from_main

HOST, STATE = "host", "state"
SHOWN_DIFFERENCES = 6


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another model. The message names it and says what to do."""


class Checkpointer:
    """The checkpoints of one run, in `folder/<step>`.

    Args:
        folder: Where they lie; created where it is missing, unless keep is None.
        keep: Number of checkpoints that are kept, the newest; None opens the folder for reading only, which is safe beside a run
            that is still writing to it.

    Example:
        with Checkpointer("runs/a/checkpoints", keep=2) as checkpoints:
            checkpoints.save(10, state, {"next_row": 80})
    """

    def __init__(self, folder: str | Path, keep: int | None) -> None:
        self.folder = Path(folder).resolve()
        self._own: set[int] = set()
        self._read_only = keep is None
        if self._read_only and not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no folder with checkpoints; give the folder of a run that has saved one")
        writes = not self._read_only
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=writes, cleanup_tmp_directories=writes)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any, host: dict[str, Any]) -> None:
        """Saves a checkpoint, mostly in the background; waits for the one before it where that is still being written.

        The state may be donated as soon as this returns. A step that this object has already saved or restored is left as it is;
        checkpoints at this step or later that come from elsewhere (a damaged one that was passed over) are removed first.

        Args:
            step: Steps finished.
            state: A tree of arrays, such as a `TrainState`.
            host: Values that JSON can hold; tuples come back as lists.

        Raises:
            CheckpointError: this object only reads, or host holds something that JSON cannot.
        """
        if self._read_only:
            raise CheckpointError(f"{self.folder} was opened for reading only; pass a number as keep to save")
        if step in self._own:
            return
        arrays = _by_name(state)
        content = {"host": host, "arrays": {name: _describe(leaf) for name, leaf in arrays.items()}}
        try:
            content = json.loads(json.dumps(content))  # a snapshot: the caller may change its dict while Orbax writes
        except TypeError as error:
            raise CheckpointError(f"the host values of step {step} cannot be stored as JSON: {error}") from error
        self._manager.wait_until_finished()
        for old in self._manager.all_steps():
            if old >= step:
                self._manager.delete(old)
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), host=ocp.args.JsonSave(content))
        # The copy to the host happens here, before this returns, and it is meant. On CPU Orbax keeps a view instead of a copy,
        # which makes JAX leave the buffer alone: a donating step that follows writes elsewhere.
        with jax.transfer_guard("allow"):
            self._manager.save(step, args=args, force=True)
        self._own.add(step)

    def latest_step(self) -> int | None:
        """The newest step whose checkpoint is complete, or None. One that was cut short or lost its host values is passed over."""
        self.wait()
        if self._read_only:
            self._manager.reload()
        return broadcast_from_main(self._latest())

    def _latest(self) -> int | None:
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                self._content(step)
            except CheckpointError:
                continue
            return step
        return None

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
            abstract_state: A tree of the same structure; its leaves are arrays or `jax.ShapeDtypeStruct`, whose shardings the
                result gets (the first device, where a leaf has none).
            step: Which one; None is the newest complete one.

        Returns:
            The state, of the structure of abstract_state, and the host dict.

        Raises:
            CheckpointError: there is none, it is damaged, or its arrays have other names, shapes or dtypes, which are listed.
        """
        step = self._chosen(step)
        content = self._content(step)
        wanted = _by_name(abstract_state)
        _compare(content["arrays"], {name: _describe(leaf) for name, leaf in wanted.items()}, self.folder / str(step))
        target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf)) for name, leaf in wanted.items()}
        try:
            with jax.transfer_guard("allow"):
                arrays = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))[STATE]
        except Exception as error:  # Orbax, TensorStore and the file system each have their own kinds
            raise CheckpointError(_damaged(self.folder / str(step), error)) from error
        self._own.add(step)
        leaves = [arrays[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), content["host"]

    def restore_part(self, part: str, shardings: Callable[[Any], Any], step: int | None = None) -> Any:
        """Reads one part of the saved state, such as `trainable`, and nothing else of it.

        Args:
            part: Name of the part at the top of the state; a nested dict of arrays.
            shardings: Given the part as nested dicts of `jax.ShapeDtypeStruct`, returns the sharding of each array.
            step: Which checkpoint; None is the newest complete one.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        step = self._chosen(step)
        stored = self._content(step)["arrays"]
        shapes = {name: described for name, described in stored.items() if name.startswith(f"{part}.")}
        tree: dict[str, Any] = {}
        for name, (shape, dtype) in shapes.items():
            *path, leaf = name.split(".")[1:]
            node = tree
            for key in path:
                node = node.setdefault(key, {})
            node[leaf] = jax.ShapeDtypeStruct(tuple(shape), dtype)
        targets = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings(tree))
        flat = {f"{part}.{name}": leaf for name, leaf in _by_name(targets).items()}
        args = ocp.args.PyTreeRestore(flat, ocp.checkpoint_utils.construct_restore_args(flat), partial_restore=True)
        try:
            with jax.transfer_guard("allow"):
                arrays = self._manager.restore(step, args=ocp.args.Composite(state=args))[STATE]
        except Exception as error:  # as in restore
            raise CheckpointError(_damaged(self.folder / str(step), error)) from error
        return jax.tree.unflatten(jax.tree.structure(targets), [arrays[name] for name in flat])

    def _chosen(self, step: int | None) -> int:
        """The step, or the newest complete one; CheckpointError where there is none."""
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.folder} holds no complete checkpoint")
        return step

    def host(self, step: int | None = None) -> dict[str, Any]:
        """The host dict alone, of a step or of the newest complete one: what must be known before the state can be built.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        step = self._chosen(step)
        return self._content(step)["host"]

    def wait(self) -> None:
        """Returns when everything saved so far is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases Orbax's threads."""
        self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _content(self, step: int) -> dict[str, Any]:
        """What was stored beside the arrays: {"host": the caller's dict, "arrays": {name: [shape, dtype]}}."""
        try:
            content = self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))[HOST]
            if content.keys() != {"host", "arrays"}:
                raise KeyError("host values of another format")
        except Exception as error:  # as in restore
            raise CheckpointError(_damaged(self.folder / str(step), error)) from error
        return content


def _by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree under their paths, such as `trainable.layers.q_proj.a`: what a message can name."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise CheckpointError("two arrays of the state have the same path once its keys are joined by dots; rename one")
    return named


def _describe(leaf: Any) -> list[Any]:
    return [list(leaf.shape), str(leaf.dtype)]


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _compare(stored: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    lost = [name for name in wanted if name not in stored]
    extra = [name for name in stored if name not in wanted]
    differences = [f"{name}: {_spell(wanted[name])} is expected, it is not in the checkpoint" for name in lost]
    differences += [f"{name}: {_spell(stored[name])} is in the checkpoint, it is not expected" for name in extra]
    differences += [
        f"{name}: {_spell(wanted[name])} is expected, the checkpoint has {_spell(stored[name])}"
        for name in wanted
        if name in stored and stored[name] != wanted[name]
    ]
    if differences:
        shown = "\n  ".join(differences[:SHOWN_DIFFERENCES])
        rest = f"\n  and {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
        raise CheckpointError(
            f"{path} is of another model, adapter or optimiser: resume with the settings it was saved with\n  {shown}{rest}"
        )


def _spell(description: list[Any]) -> str:
    shape, dtype = description
    return f"{dtype}[{','.join(map(str, shape))}]"


def _damaged(path: Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{path} cannot be read ({reason}); remove that folder to go on from the checkpoint before it"
