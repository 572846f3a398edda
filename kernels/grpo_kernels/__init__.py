"""Operations of GRPO training with a plain JAX reference each and Pallas kernels; `kernels/README.md` lists them.

Example:
    from grpo_kernels import head_logprob
    logp, entropy, lse = head_logprob(hidden, head, ids, implementation="xla")
"""

from grpo_kernels.numerics import NO_WINDOW
from grpo_kernels.ops.decode_attention import KVCache, SlotMap, decode_attention
from grpo_kernels.ops.gated_delta_rule import DeltaPlan, gated_delta_rule, gated_delta_step, plan_delta_rule
from grpo_kernels.ops.group_advantages import group_advantages
from grpo_kernels.ops.group_attention import AttentionPlan, KeyRanges, Limits, group_attention, plan_attention, prompt_ranges
from grpo_kernels.ops.group_attention.names import ATTENTION_RESULT
from grpo_kernels.ops.grpo_loss import LossSettings, grpo_loss
from grpo_kernels.ops.head_logprob import head_logprob
from grpo_kernels.ops.head_sample import Draws, head_sample
from grpo_kernels.ops.quantized_matmul import (
    QuantizedWeight,
    dequantize,
    quantize,
    quantized_matmul,
    quantized_shapes,
    weight_bytes,
)
from grpo_kernels.target import Implementation, Target, tracing_for

__all__ = [
    "ATTENTION_RESULT",
    "NO_WINDOW",
    "AttentionPlan",
    "DeltaPlan",
    "Draws",
    "Implementation",
    "KVCache",
    "KeyRanges",
    "Limits",
    "LossSettings",
    "QuantizedWeight",
    "SlotMap",
    "Target",
    "decode_attention",
    "dequantize",
    "gated_delta_rule",
    "gated_delta_step",
    "group_advantages",
    "group_attention",
    "grpo_loss",
    "head_logprob",
    "head_sample",
    "plan_attention",
    "plan_delta_rule",
    "prompt_ranges",
    "quantize",
    "quantized_matmul",
    "quantized_shapes",
    "tracing_for",
    "weight_bytes",
]
