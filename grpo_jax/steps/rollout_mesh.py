"""Devices that only sample (`mesh.rollout`), with their own copy of the frozen base.

What is trained is copied to them from the devices that update, once for each rollout and without the host. Completions of the
training steps and of evaluations are sampled there; gradients and the KL divergence are computed on the other devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from grpo_jax.policy import Policy
from grpo_jax.runtime.mesh_copies import copied_to_mesh
from grpo_jax.runtime.sharding import AxesTable, Layout
from grpo_jax.types import Params
from grpo_jax.weights.axes import check_mesh, model_axes
from grpo_jax.weights.quantize import quantization_of


@dataclass(frozen=True)
class RolloutMesh:
    """The mesh that completions are sampled on, next to the one of the updates.

    Attributes:
        layout: of the devices that sample.
        source: of the devices that update; None is one device.
        axes: logical axes of weights and adapters.
        base: the frozen weights on the devices that sample; None where every weight is trained.
    """

    layout: Layout
    source: Layout | None
    axes: AxesTable
    base: Params | None

    @staticmethod
    def of(policy: Policy, layout: Layout) -> RolloutMesh:
        """Copies the frozen base of a policy to the devices that sample.

        Raises:
            ConfigError: their mesh does not divide the model.
        """
        check_mesh(layout, policy.spec, quantization_of(policy.params), "mesh.rollout")
        axes = model_axes(policy.spec)
        base = None if policy.adapters is None else copied_to_mesh(policy.params, policy.layout, layout, axes)
        return RolloutMesh(layout, policy.layout, axes, base)

    def placed(self, policy: Policy) -> Policy:
        """The policy as its sampler is built from: the model computes on this mesh. Its arrays stay where they are."""
        return replace(policy, layout=self.layout, _sampler=[], _scorer=[])

    def variables(self, trainable: Params) -> Params:
        """Copies what is trained to this mesh; returns the policy's variables there."""
        trained = copied_to_mesh(trainable, self.source, self.layout, self.axes)
        return {"params": trained} if self.base is None else {"params": self.base, "lora": trained}
