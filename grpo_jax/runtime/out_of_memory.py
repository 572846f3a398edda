"""Says which settings to change where a device is out of memory, instead of XLA's traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jax.errors import JaxRuntimeError

UPDATE = "train.micro_batch_tokens auto (or a smaller number), or model.remat layer (or offload)"
ROLLOUT = "a smaller rollout.slots, or optim.offload true"
WEIGHTS = "model.quantization int8, a dtype of bfloat16, or a mesh with more devices"

ADVICE = {
    "update": f"use {UPDATE}",
    "KL to the reference": f"use {UPDATE}",
    "rollout": f"use {ROLLOUT}",
    "reading the weights": f"use {WEIGHTS}",
}
"""What helps, by the beginning of the name of a program or a task."""

ELSE = f"for the update use {UPDATE}; for sampling {ROLLOUT}"


class OutOfMemoryError(MemoryError):
    """A device has too little memory for what it was to compute; the message names the settings to change."""


@contextlib.contextmanager
def explaining_memory(doing: str) -> Iterator[None]:
    """Surrounds work on a device; XLA's error that there is no memory becomes an `OutOfMemoryError`.

    Args:
        doing: Name of a program, such as "update", or of a task.
    """
    try:
        yield
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice = next((text for name, text in ADVICE.items() if doing.startswith(name)), ELSE)
        raise OutOfMemoryError(
            f"{doing}: the device is out of memory (RESOURCE_EXHAUSTED); {advice}. A run that saved a checkpoint continues with "
            f"--resume and these settings; grpo-jax plan finds some that fit. XLA said: {str(error).splitlines()[0][:300]}"
        ) from error
