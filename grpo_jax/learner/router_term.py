"""The load-balancing loss of a mixture of experts, and how often its routers differ from the sampler's.

Both are over the tokens that predict a trained token, each counted once for every trained token that it predicts (a prompt's last
token once for each of its completions), in all layers. So they do not depend on the packing: other tokens of prompts, padding, and
tokens from outside have weight 0. transformers averages over all tokens that are no padding, prompts included.

The loss is a product of two means over the batch (`routing.balance_loss`). The first one has no gradient; it is counted before the
gradients are computed, by one more forward pass, so that micro-batches add up to the batch's loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from grpo_jax.learner.logprobs import row_hidden
from grpo_jax.learner.micro_batches import MicroBatch, any_token, scan_micro_batches
from grpo_jax.models.routing import RouterSums, balance_loss
from grpo_jax.models.transformer import Transformer
from grpo_jax.types import Params, TrainBatch


@struct.dataclass
class RouterTerm:
    """What an update asks of the routers.

    Attributes:
        mask: [N, C], the trained tokens.
        counts: how many of them used each expert, in all layers; None where there is no load-balancing loss.
        model: the decoder.
        coefficient: weight of the loss.
        compares: the sampler's experts are known.
    """

    mask: Bool[Array, "N C"]
    counts: Float[Array, "E"] | None
    model: Transformer = struct.field(pytree_node=False)
    coefficient: float = struct.field(pytree_node=False)
    compares: bool = struct.field(pytree_node=False)

    @staticmethod
    def of(model: Transformer, coefficient: float, mask: Bool[Array, "N C"], batch: TrainBatch) -> RouterTerm | None:
        """Makes the term of a batch, before anything is counted; None where the routers are asked nothing."""
        compares = any(part.rows.experts is not None for part in batch.micro_batches)
        return RouterTerm(mask, None, model, coefficient, compares) if compares or coefficient > 0 else None

    def counted(self, variables: Params, batch: TrainBatch, computed: Callable[[MicroBatch], MicroBatch]) -> RouterTerm:
        """The same with the counts of the whole batch.

        Args:
            computed: a micro-batch as the gradient computes it, so that routers select the same experts: with the same dropout.
        """

        def add(total: Array, part: MicroBatch) -> tuple[Array, None]:
            report = row_hidden(self.model, variables, computed(part).rows, self.weights(part))[1]
            assert report is not None
            return total + report.counts, None

        start = jnp.zeros((self.model.spec.experts,), jnp.float32)
        counts, _, _ = scan_micro_batches(batch.micro_batches, add, start, any_token, self.model.layout)
        return replace(self, counts=jax.lax.stop_gradient(counts))

    def weights(self, part: MicroBatch) -> Float[Array, "R T"]:
        """How many trained tokens each token of a micro-batch predicts."""
        used, rows = part.used, part.rows
        completions, columns = (jnp.where(used, jnp.asarray(x), 0) for x in (part.completions, rows.columns))
        trained = (used & self.mask[completions, columns]).astype(jnp.float32)
        empty = jnp.zeros(rows.ids.shape, jnp.float32)
        return jax.vmap(lambda own, at, more: own.at[at].add(more))(empty, jnp.asarray(rows.selected), trained)

    def add(self, report: RouterSums) -> tuple[Float[Array, ""], dict[str, Array]]:
        """What a micro-batch adds to the batch's loss, and to the sums for metrics."""
        stats: dict[str, Array] = {"router_differing": report.differing} if self.compares else {}
        if self.counts is None:
            return jnp.float32(0), stats
        tokens = jnp.sum(self.mask.astype(jnp.float32))
        balance = balance_loss(self.counts, report.probabilities, tokens, self.model.spec.expert_layers)
        return self.coefficient * balance, stats | {"router_aux": jax.lax.stop_gradient(balance)}

    def metrics(self, sums: dict[str, Any]) -> dict[str, Array]:
        """`router/aux_loss`, before its weight; `router/mismatch`, the share of the sampler's choices that routers differ in."""
        found: dict[str, Array] = {}
        if "router_aux" in sums:
            found["router/aux_loss"] = sums["router_aux"]
        if "router_differing" in sums:
            choices = self.model.spec.expert_layers * self.model.spec.experts_per_token * jnp.sum(self.mask.astype(jnp.float32))
            found["router/mismatch"] = jax.lax.stop_gradient(sums["router_differing"]) / jnp.maximum(choices, jnp.float32(1))
        return found
