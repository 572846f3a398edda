"""The name by which `jax.checkpoint` policies find what attention's backward pass needs next to its arguments."""

from __future__ import annotations

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

ATTENTION_RESULT = "group_attention"
"""Name of the result and the log-sum-exp: with both saved the forward kernels do not run again."""


def named(out: Array, lse: Array) -> tuple[Array, Array]:
    """Gives the result and the log-sum-exp their name."""
    return checkpoint_name(out, ATTENTION_RESULT), checkpoint_name(lse, ATTENTION_RESULT)
