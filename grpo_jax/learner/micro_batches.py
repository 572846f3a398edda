"""Runs a function over the micro-batches of a batch, and brings values of entries of packed rows into tables [N, C].

The sums do not depend on how a batch is packed. A micro-batch without anything to compute is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import MicroBatches, PackedRows


@struct.dataclass
class MicroBatch:
    """One micro-batch.

    Attributes:
        rows: packed rows.
        completions: [R, E], the completion of each entry; N for none.
        places: [N, C], the entry of every token of a completion, counted through the rows; negative, or R·E and more, where the
            token is not in this micro-batch.
        layout: None is one device.
    """

    rows: PackedRows
    completions: Int[Array, "R E"]
    places: Int[Array, "N C"]
    layout: Layout | None = struct.field(pytree_node=False, default=None)

    @property
    def here(self) -> Bool[Array, "N C"]:
        """True = the token is in this micro-batch."""
        return (self.places >= 0) & (self.places < self.completions.size)

    @property
    def used(self) -> Bool[Array, "R E"]:
        """True = the entry is a token."""
        return self.completions < self.places.shape[0]

    def table(self, values: Float[Array, "R E"]) -> Float[Array, "N C"]:
        """Values of entries as a table, 0 for tokens that are not here; differentiable."""
        values = to_table(values, self.places, self.completions, jnp.asarray(self.rows.columns))
        return values if self.layout is None else self.layout.constrain(values, "rows", None)


@jax.custom_vjp
def to_table(
    values: Float[Array, "R E"], places: Int[Array, "N C"], completions: Int[Array, "R E"], columns: Int[Array, "R E"]
) -> Float[Array, "N C"]:
    """values[places], 0 where there is no such entry. Entries and tokens correspond one to one, so the gradient is a gather too."""
    here = (places >= 0) & (places < values.size)
    return jnp.where(here, values.reshape(-1)[jnp.where(here, places, 0)], jnp.zeros((), values.dtype))


def to_table_forward(values: Array, places: Array, completions: Array, columns: Array) -> tuple[Array, Any]:
    """`to_table`, and what its backward pass needs."""
    return to_table(values, places, completions, columns), (places, completions, columns)


def to_table_backward(residuals: Any, d_table: Array) -> tuple[Any, ...]:
    """The gradient of the entries' values."""
    places, completions, columns = residuals
    used = completions < places.shape[0]
    own = d_table[jnp.where(used, completions, 0), jnp.where(used, columns, 0)]
    none = (np.zeros(x.shape, jax.dtypes.float0) for x in residuals)
    return jnp.where(used, own, jnp.zeros((), own.dtype)), *none


to_table.defvjp(to_table_forward, to_table_backward)


def scan_micro_batches(
    batches: tuple[MicroBatches, ...],
    function: Callable[[Any, MicroBatch], tuple[Any, Any]],
    carry: Any,
    used: Callable[[MicroBatch], Bool[Array, ""]],
    layout: Layout | None,
) -> tuple[Any, Any, Bool[Array, "M"]]:
    """Applies a function to one micro-batch after the other.

    Args:
        function: carry and micro-batch to the next carry, and outputs (a tree of arrays).
        used: whether a micro-batch is computed; one that is not leaves the carry as it is and has outputs of 0.

    Returns:
        The last carry; the outputs, stacked along a leading axis; and which micro-batches were computed.
    """
    stacks = []
    compute = jax.jit(function, inline=True)  # traced once for its outputs' shapes and for its program
    for batch in batches:
        count = batch.completions.shape[0]

        def one(carry: Any, part: tuple[PackedRows, Array, Array], batch: MicroBatches = batch) -> tuple[Any, Any]:
            rows, completions, number = part
            micro_batch = MicroBatch(rows, completions, jnp.asarray(batch.places) - number * completions.size, layout)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, carry, micro_batch)[1])
            needed = used(micro_batch)
            carry, outputs = jax.lax.cond(needed, compute, lambda carry, _: (carry, nothing), carry, micro_batch)
            return carry, (outputs, needed)

        parts = (jax.tree.map(jnp.asarray, batch.rows), jnp.asarray(batch.completions), jnp.arange(count, dtype=jnp.int32))
        carry, outputs = jax.lax.scan(one, carry, parts)
        stacks.append(outputs)
    outputs, computed = jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)
    return carry, outputs, computed


def any_token(micro_batch: MicroBatch) -> Bool[Array, ""]:
    """Whether a micro-batch has any token to compute."""
    return jnp.any(micro_batch.used)
