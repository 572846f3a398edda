"""What a run is made from: fingerprints of model, adapter, data and rewards, stored in checkpoints and compared at resume."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo_jax.data.examples import Examples
from grpo_jax.policy import Policy
from grpo_jax.rewards.protocol import NamedFunction
from grpo_jax.rewards.source_digest import source_digest
from grpo_jax.run.resume import RunFolderError
from grpo_jax.weights.fingerprint import fingerprint, model_fingerprints, revision_of
from grpo_jax.weights.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS

REVISION = "model revision"
"""Stored and shown, and not compared: a commit may change nothing but the model's page."""
SHOWN_DIGITS = 12
"""Of a digest in a message."""


def describe_inputs(
    policy: Policy, train: Examples, held_out: Examples, functions: Sequence[NamedFunction] = ()
) -> dict[str, str | None]:
    """Describes what a run is made from, in texts by name; None where a source cannot be read.

    Example:
        {"model revision": None, "model file config.json": "sha256:8d0...", "training rows": "24 rows, sha256:...", ...}
    """
    inputs: dict[str, str | None] = {REVISION: revision_of(policy.folder)}
    inputs |= {f"model file {name}": value for name, value in model_fingerprints(policy.folder).items()}
    template = None if policy.tokenizer is None else policy.tokenizer.own_template
    if template is not None:
        inputs["chat template"] = f"sha256:{hashlib.sha256(template.encode()).hexdigest()}"
    adapter = None if policy.lora is None or policy.lora.adapter is None else Path(policy.lora.adapter).expanduser()
    if adapter is not None and adapter.is_dir():
        names = (name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if (adapter / name).is_file())
        inputs |= {f"adapter file {name}": fingerprint(adapter / name) for name in names}
    inputs["training rows"] = describe_rows(train)
    if len(held_out) and held_out.table is not train.table:  # else the settings and the training rows decide them
        inputs["held-out rows"] = describe_rows(held_out)
    return inputs | {f"source of reward {name}": tagged(source_digest(function)) for name, function in functions}


def describe_rows(examples: Examples) -> str:
    """The number of rows, and the digest of the table that they are from."""
    return f"{len(examples)} rows of {len(examples.table)}, sha256:{examples.digest}"


def tagged(digest: str | None) -> str | None:
    """A digest with its kind."""
    return None if digest is None else f"sha256:{digest}"


def changed_inputs(stored: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    """Lists the differences, stored -> now; what is not known on one side is no difference."""
    lines = []
    for name in dict.fromkeys([*stored, *now]):
        before, after = stored.get(name), now.get(name)
        missing = name not in stored or name not in now
        if name != REVISION and (missing or (before != after and None not in (before, after))):
            lines.append(f"{name}: {shown(stored, name)} -> {shown(now, name)}")
    if any(line.startswith("model file") for line in lines) and stored.get(REVISION) != now.get(REVISION):
        lines.insert(0, f"{REVISION}: {stored.get(REVISION)} -> {now.get(REVISION)}")
    return lines


def check_inputs(stored: Mapping[str, str | None], now: Mapping[str, str | None], run_dir: Path, *, accept: bool) -> list[str]:
    """Compares what a run was made from with what it would continue with.

    Args:
        stored: of the checkpoint; {} where an older version of this package wrote it.
        accept: return the differences instead of raising.

    Returns:
        A line for each difference.

    Raises:
        RunFolderError: there are differences, which are listed, and they are not accepted.
    """
    lines = changed_inputs(stored, now) if stored else []
    if lines and not accept:
        listed = "\n  ".join(lines)
        raise RunFolderError(
            f"{run_dir} was trained from other inputs (stored -> now):\n  {listed}\nresume with the stored ones; or choose another "
            "train.run_dir to start anew; or set train.accept_changed_inputs to true to go on with the new ones"
        )
    return lines


def shown(inputs: Mapping[str, str | None], name: str) -> str:
    """One description, its digest shortened."""
    if name not in inputs:
        return "none"
    head, separator, digest = (inputs[name] or "unknown").rpartition(":")
    return f"{head}{separator}{digest[:SHOWN_DIGITS]}" if separator else digest
