"""Counts the operations and bytes of a training step from its shapes.

The compiler's own count is not used: it counts a loop's body once. Collectives between chips are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grpo_jax.models.layer_kinds import is_recurrent
from grpo_jax.models.spec import EXPERT_LINEARS, ModelSpec
from grpo_jax.rollout.shapes import key_value_bytes


@dataclass(frozen=True)
class StepShapes:
    """The sizes of a step that its cost depends on.

    Attributes:
        prompt_length: tokens of every prompt, unless their lengths are given too.
        slots: completions decoded at once; None is all of them.
        lora_rank: 0 trains every weight.
        kv_dtype: of the KV cache, `auto`, `int8` or `int4`.
    """

    prompts: int
    num_generations: int
    prompt_length: int
    slots: int | None
    lora_rank: int
    kv_dtype: str


@dataclass(frozen=True)
class StepCost:
    """The least operations and bytes that a step needs.

    Attributes:
        layer_parameters: elements of the layers' matrices.
        active_parameters: those that one token uses: all of them, unless a router chooses among experts.
        head_parameters: elements of the head.
        update_tokens: tokens of prompts, counted once, and of completions.
        update_flops: of the reference (forward) and the policy (forward and backward), the head on completion tokens only;
            recomputing is not counted. 2 operations per weight and token for a forward, 2 for the gradient of the inputs, 2 more
            for that of the weights where they are trained; attention over the keys that a query sees.
        rollout_flops: of prompts, and of every token of a completion.
        rollout_steps: tokens of the longest completion, or with fewer slots than completions all tokens divided by the slots.
        weight_bytes: moved for all weights at every step of a rollout.
        update_weight_bytes: moved for all weights in one pass of an update.
        past_bytes: the keys and values that the steps' queries see, a prompt's once per group.
    """

    layer_parameters: int
    active_parameters: int
    head_parameters: int
    update_tokens: int
    update_flops: float
    rollout_flops: float
    rollout_steps: float
    weight_bytes: float
    update_weight_bytes: float
    past_bytes: float

    @property
    def rollout_bytes(self) -> float:
        """Bytes that all steps of a rollout move, if one device does it."""
        return self.rollout_steps * self.weight_bytes + self.past_bytes

    @staticmethod
    def of(
        spec: ModelSpec,
        shapes: StepShapes,
        lengths: np.ndarray,
        itemsize: int,
        *,
        prompt_lengths: np.ndarray | None = None,
        reference: bool = True,
        decoding_layers: int | None = None,
        update_layers: int | None = None,
        copied_keys: bool = False,
    ) -> StepCost:
        """Counts a step's operations and bytes.

        Args:
            lengths: tokens of each completion.
            itemsize: bytes of a weight.
            prompt_lengths: tokens of each prompt; None is `prompt_length` for all.
            reference: whether the reference model is scored.
            decoding_layers, update_layers: bytes that a step of a rollout, and a pass of an update, move for the layers' matrices;
                None is each matrix once.
            copied_keys: whether a step writes the KV cache in the model's format, and reads that.
        """
        parts = {name: len(spec.layers_with(name)) * rows * columns for name, (rows, columns) in spec.linear_shapes().items()}
        experts = {name: spec.experts if spec.experts and name in EXPERT_LINEARS else 1 for name in parts}
        layers = sum(size * experts[name] for name, size in parts.items())
        active = sum(size * min(experts[name], max(1, spec.experts_per_token)) for name, size in parts.items())
        head = spec.vocab * spec.width
        own = np.full(shapes.prompts, shapes.prompt_length) if prompt_lengths is None else prompt_lengths
        completions, prompts = float(lengths.sum()), float(own.sum())
        seen = float((own**2 / 2).sum() + (lengths * np.repeat(own, shapes.num_generations) + lengths**2 / 2).sum())
        widths = sum(spec.attention_shape(kind)[1] for kind in spec.layer_kinds if not is_recurrent(kind))
        attention = 4 * spec.heads * widths * seen
        forward = 2 * active * (prompts + completions) + 2 * head * completions + attention
        # dx of the linear layers and the head; dq, dk, dv of attention cost twice its forward.
        backward = forward + attention + (2 * active * (prompts + completions) + 2 * head * completions) * (shapes.lora_rank == 0)
        slots = min(shapes.slots or len(lengths), len(lengths))
        steps = float(max(lengths.max(), completions / slots))
        token = sum(
            layers * heads * (key_value_bytes(width, shapes.kv_dtype, itemsize) + 4 * width * itemsize * copied_keys)
            for layers, heads, width in spec.key_shapes
        )
        groups = slots / shapes.num_generations
        past = float((lengths**2 / 2).sum()) + steps * groups * float(own.mean())
        return StepCost(
            layer_parameters=layers,
            active_parameters=active,
            head_parameters=head,
            update_tokens=int(prompts + completions),
            update_flops=(2 if reference else 1) * forward + backward,
            rollout_flops=forward,
            rollout_steps=steps,
            weight_bytes=(layers * itemsize if decoding_layers is None else decoding_layers) + head * itemsize,
            update_weight_bytes=(layers * itemsize if update_layers is None else update_layers) + head * itemsize,
            past_bytes=past * token,
        )
