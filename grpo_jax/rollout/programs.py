"""The compiled programs of a rollout, as one object: built once for a model, and called by the loop over segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial

from grpo_jax.models.transformer import Transformer
from grpo_jax.rollout.decode import decode_segment, gpu_options
from grpo_jax.rollout.extend import extend_past
from grpo_jax.rollout.kv_cache import empty_past_blocks, write_segment
from grpo_jax.rollout.past_blocks import append_segment, exchange_past
from grpo_jax.rollout.prefill import insert_prompts, prefill
from grpo_jax.rollout.states import begin_states
from grpo_jax.rollout.weights import decoding_model, new_weights
from grpo_jax.runtime.programs import Announce, Program, no_announcement
from grpo_kernels.target import platform

__all__ = ["RolloutPrograms"]


@dataclass(frozen=True)
class RolloutPrograms:
    """The compiled functions of rollouts of one model, each named as the function it compiles; iterating gives all of them.

    `prepare_weights` is `new_weights`. `append_segment`, `extend_past` and `exchange_past` are for episodes, whose segments
    `append_segment` writes.
    """

    prepare_weights: Program
    prefill: Program
    insert_prompts: Program
    begin_states: Program
    decode_segment: Program
    write_segment: Program
    empty_past_blocks: Program
    append_segment: Program
    extend_past: Program
    exchange_past: Program

    @staticmethod
    def build(
        model: Transformer,
        stop_ids: tuple[int, ...],
        *,
        announce: Announce = no_announcement,
        quantization: str = "none",
    ) -> RolloutPrograms:
        """Makes the programs of a model. Compiles nothing before the first call; see `Sampler.build` for the arguments."""
        options, layout, decoder = gpu_options(quantization) if platform() == "gpu" else {}, model.layout, decoding_model(model)
        states = (6,) if model.spec.recurrent_layers else ()  # the argument of `decode_segment` that its result replaces
        return RolloutPrograms(
            Program("rollout: weights", partial(new_weights, model), announce=announce),
            Program("rollout: prompts", partial(prefill, decoder), announce=announce),
            Program("rollout: prompts", partial(insert_prompts, layout=layout), donate=(0,), announce=announce),
            Program("rollout: prompts", partial(begin_states, layout=layout), donate=(0,), announce=announce),
            Program("rollout", partial(decode_segment, decoder, stop_ids), donate=states, announce=announce, options=options),
            Program("rollout: past", partial(write_segment, layout=layout), donate=(0,), announce=announce),
            Program("rollout", partial(empty_past_blocks, model.spec, model.dtype, layout=layout), announce=announce),
            Program("rollout: past", partial(append_segment, layout=layout), donate=(0,), announce=announce),
            Program("rollout: turns", partial(extend_past, decoder), donate=(2,), announce=announce),
            Program("rollout: turns", partial(exchange_past, layout=layout), donate=(0, 1), announce=announce),
        )

    def __iter__(self) -> Iterator[Program]:
        return (getattr(self, field.name) for field in fields(self))
