"""A run as the devices of `mesh.rollout` see it: they have the base and what is trained, but no optimiser and no reference."""

from __future__ import annotations

from dataclasses import replace

from grpo_jax.fit.abstract import Placement
from grpo_jax.fit.phases import RunShapes
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Frozen


def on_rollout_mesh(run: RunShapes, layout: Layout | None) -> RunShapes:
    """Returns the shapes of a run on the devices that only sample.

    Args:
        run: on the devices that update.
        layout: of those that sample; None returns the run itself, where all devices do both.
    """
    if layout is None:
        return run
    placement, adapters = Placement(layout, layout.mesh.devices.flat[0]), run.policy.adapters
    params = placement.put_model(run.spec, run.policy.params)
    trainable = placement.put_model(run.spec, run.state.trainable)
    policy = replace(
        run.policy,
        params=params,
        adapters=None if adapters is None else placement.put_model(run.spec, adapters),
        layout=layout,
        _sampler=[],
        _scorer=[],
    )
    return replace(
        run,
        placement=placement,
        policy=policy,
        learner=replace(run.learner, model=run.learner.model.clone(layout=layout)),
        state=replace(run.state, trainable=trainable, opt_state=(), reference=None),
        frozen=Frozen({} if adapters is None else params, None),
        only_samples=True,
    )
