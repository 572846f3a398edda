"""Lists the programs that rollouts of known shapes will run, with shapes instead of arrays, so that they can be compiled before.

On one device only: on a mesh the compiler chooses some results' shardings, so their programs compile when they are first called.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import RolloutConfig
from grpo_jax.rollout.decode import Continued, SlotState
from grpo_jax.rollout.extend import NewTokens
from grpo_jax.rollout.kv_cache import empty_past_block
from grpo_jax.rollout.prefill import prefill
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.sampling import controls_of
from grpo_jax.rollout.shapes import RolloutShapes
from grpo_jax.rollout.states import begin_states
from grpo_jax.rollout.weights import prepared_shapes
from grpo_jax.runtime.compile_ahead import FutureCall
from grpo_jax.runtime.memory import least_free_bytes
from grpo_jax.types import Params


def rollout_calls(sampler: Sampler, variables: Params, rollout: RolloutConfig, shapes: RolloutShapes) -> list[FutureCall]:
    """Lists the calls of rollouts in these shapes, those that compile longest first.

    Args:
        variables: the policy's, arrays or shapes; see `Sampler.sample`.
        rollout: the settings.
        shapes: the run's.
    """
    model, programs, sizes = sampler.model, sampler.programs, shapes.sizes
    if model.layout is not None:
        return []
    kv_dtype, sharding = rollout.kv_dtype, jax.tree.leaves(variables)[0].sharding

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type), tree)

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def token_ids(count: int, width: int) -> tuple[Any, Any]:
        return array(jnp.int32, count, width), array(jnp.int32, count)

    def past_block(tokens: int) -> Any:
        make = partial(empty_past_block, model.spec, model.dtype, sizes.slots, tokens, kv_dtype=kv_dtype, unroll=model.unroll)
        return placed(jax.eval_shape(make))

    settings = sampler.weight_settings(variables, least_free_bytes(), rollout)
    weights = placed(prepared_shapes(model, variables, **settings))

    def prefilled(*arguments: Any) -> Any:
        return placed(jax.eval_shape(partial(prefill, model, kv_dtype=kv_dtype), weights, *arguments).replace(experts=None))

    past_blocks, segment_cache = tuple(past_block(tokens) for tokens in sizes.past_blocks), past_block(sizes.segment)
    number, flag = array(jnp.int32, sizes.slots), array(jnp.bool_, sizes.slots)
    slots = SlotState(*[number] * 7, live=flag, begins=flag, continued=Continued(flag, number, flag))
    table = None if sizes.fixed else array(jnp.int32, sizes.prompt_slots, sizes.slots_per_prompt)
    controls = placed(jax.eval_shape(lambda: controls_of(rollout, 0, 0)))
    levels = sorted({sizes.past_blocks_for(int(tokens)) for tokens in (0, *np.cumsum(sizes.past_blocks))})

    calls: list[FutureCall] = []
    static = {"kv_dtype": kv_dtype}
    for width in shapes.widths:
        prompts = prefilled(*token_ids(sizes.prompt_slots, width))
        states = placed(jax.eval_shape(begin_states, None, prompts.states, number, flag))
        if states is not None:
            for before in (None, states):
                calls.append(FutureCall(programs.begin_states, (before, prompts.states, number, flag)))
        for level in levels:
            arguments = (weights, prompts, past_blocks[:level], slots, table, controls, states)
            calls.append(FutureCall(programs.decode_segment, arguments, {"length": sizes.segment}))
        calls.append(FutureCall(programs.prefill, (weights, *token_ids(sizes.prompt_slots, width)), static))
        if not sizes.fixed:  # prompts that come later, a few at a time
            late = token_ids(sizes.late_prompts, width)
            if sizes.late_prompts < sizes.prompt_slots:
                calls.append(FutureCall(programs.prefill, (weights, *late), static))
            later = (prompts, prefilled(*late), array(jnp.int32, sizes.late_prompts))
            calls.append(FutureCall(programs.insert_prompts, later))
    calls.insert(1, FutureCall(programs.prepare_weights, (variables,), settings))
    if past_blocks:
        making = {"slots": sizes.slots, "tokens": sizes.past_blocks, "kv_dtype": kv_dtype, "unroll": model.unroll}
        calls.append(FutureCall(programs.empty_past_blocks, (), making))
        if not sizes.extensions:
            calls.append(FutureCall(programs.write_segment, (past_blocks, segment_cache, number), {"together": sizes.fixed}))
            return calls
        calls.append(FutureCall(programs.append_segment, (past_blocks, segment_cache, number, flag)))
        for rows, tokens in sizes.extensions:
            new = NewTokens(*[array(jnp.int32, rows)] * 4, ids=array(jnp.int32, rows, tokens))
            calls.append(FutureCall(programs.extend_past, (weights, prompts, past_blocks, new)))
        if sizes.parked:
            calls.append(FutureCall(programs.exchange_past, (past_blocks, past_blocks, *[array(jnp.int32, 1)] * 2)))
    return calls
