"""Quantised weights: int8 with a scale per output channel, int4, nf4 and mxfp4 with a scale per group of inputs.

`quantize` turns a matrix [I, O] into a `QuantizedWeight` of native int8, int4 or uint4 values (never two in a byte: XLA packs them
on accelerators) and scales, the arrays of `qwix.QArray(values, scale, None, qtype)`. qwix itself is not imported: its codebook
search and look-up are gathers that Pallas does not lower, and its int4 lacks the step that the sign of a scale adds here. Zero
points and double quantisation of the scales are left out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Format = Literal["int8", "int4", "nf4", "mxfp4"]

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""QLoRA's 4-bit NormalFloat (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, appendix E)."""

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of MXFP4 by their four bits (OCP Microscaling Formats 1.0, 5.3.3): a sign, two bits of exponent, one of mantissa."""

DTYPES: dict[Format, Any] = {"int8": jnp.int8, "int4": jnp.int4, "nf4": jnp.uint4, "mxfp4": jnp.uint4}
SCALE_DTYPES: dict[Format, Any] = {"int8": jnp.float32, "int4": jnp.bfloat16, "nf4": jnp.bfloat16, "mxfp4": jnp.uint8}
GROUPS = {"int4": 128, "nf4": 64, "mxfp4": 32}
"""Inputs that share a scale, at most."""

SMALLEST_GROUP = 16
"""With fewer values to a scale the format is hardly smaller than bfloat16."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A quantised weight, or a stack of them with leading dimensions: values · scale.

    Attributes:
        values: [..., I, O]; int8 and int4 count steps, uint4 is an index into `NF4` or `FP4`.
        scale: [..., I / group, O] in bfloat16, the width of a step; float32 and one group for int8. Of mxfp4 uint8, the byte b of a
            scale 2^(b - 127), as its checkpoints store it.

    Example:
        quantize(w, "int4") of a bfloat16 [4096, 14336] has values int4 [4096, 14336] and scale bfloat16 [32, 14336].
    """

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.values.shape

    @property
    def format(self) -> Format:
        """Name of the format; ValueError where the dtype belongs to none."""
        for name, dtype in DTYPES.items():
            if self.values.dtype == dtype and (self.scale.dtype == jnp.uint8) == (name == "mxfp4"):
                return name
        raise ValueError(f"quantised values are {self.values.dtype}; supported: int8, int4, and uint4 for nf4 and mxfp4")

    @property
    def group(self) -> int:
        """Number of inputs that share a scale."""
        return self.values.shape[-2] // self.scale.shape[-2]

    def astype(self, dtype: Any) -> Array:
        """The dense weight; see `dequantize`."""
        return dequantize(self, dtype)


def group_size(format: str, inputs: int, name: str = "weight") -> int:
    """Returns how many inputs share a scale: all for int8; 128 for int4 and 64 for nf4, or fewer where that does not divide I.

    For mxfp4 they are always 32.

    Args:
        format: see `Format`.
        inputs: I.
        name: of the tensor, for messages.

    Raises:
        ValueError: unknown format, or a width that no group of 16 or more divides.
    """
    if format not in get_args(Format):
        raise ValueError(f"quantization: {format!r} is unknown; choose from {', '.join(get_args(Format))}")
    if format == "int8":
        return inputs
    most = GROUPS[format]
    if format == "mxfp4":
        if inputs % most:
            raise ValueError(f"{name}: its input width {inputs} is no multiple of 32, the group of mxfp4; use int8")
        return most
    for size in (most, 64, *range(min(most, inputs), SMALLEST_GROUP - 1, -1)):
        if inputs % size == 0:
            return size
    raise ValueError(
        f"{name}: no number from {SMALLEST_GROUP} to {most} divides its input width {inputs}, so {format} has no groups for it; "
        "use int8"
    )


def quantized_shapes(format: str, shape: tuple[int, ...], name: str = "weight") -> QuantizedWeight:
    """Returns shapes and dtypes of a quantised [..., I, O] without allocating it. Raises what `group_size` raises."""
    groups = shape[-2] // group_size(format, shape[-2], name)
    values, scale = ({str(key): value for key, value in table.items()}[format] for table in (DTYPES, SCALE_DTYPES))
    return QuantizedWeight(
        jax.ShapeDtypeStruct(shape, values),  # type: ignore[arg-type] - shapes
        jax.ShapeDtypeStruct((*shape[:-2], groups, shape[-1]), scale),  # type: ignore[arg-type] - shapes
    )


def quantize(w: Float[Array, "I O"], format: str, name: str = "weight") -> QuantizedWeight:
    """Rounds a matrix to the nearest values of a format.

    int8: steps of the channel's largest magnitude / 127. int4: the element of largest magnitude in a group becomes exactly −8
    steps, its sign goes into the scale, so that all 16 values are used (root mean square error of normal weights 0.103 of
    their deviation, against 0.117 with magnitude / 7). nf4: the largest magnitude times a codebook of 16 (0.09). Scales are
    rounded to bfloat16 before the elements are, which has no visible cost. mxfp4: see `quantize_mxfp4`.

    Args:
        w: any float dtype.
        format: see `Format`.
        name: of the tensor, for messages.

    Raises:
        ValueError: as `group_size`.
    """
    shapes = quantized_shapes(format, w.shape, name)
    group = w.shape[0] // shapes.scale.shape[0]
    blocks = w.astype(jnp.float32).reshape(-1, group, w.shape[1])
    if format == "mxfp4":
        return quantize_mxfp4(blocks, w.shape)
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    largest = jnp.maximum(high, -low)
    if format == "int4":
        scale = jnp.where(-low >= high, largest, -largest) / jnp.float32(8)
    else:
        scale = largest / jnp.float32(127 if format == "int8" else 1)
    scale = jnp.where(scale == 0, jnp.float32(1), scale).astype(shapes.scale.dtype)
    steps = blocks / scale.astype(jnp.float32)
    if format == "nf4":
        middles = [(left + right) / 2 for left, right in itertools.pairwise(NF4)]
        values = sum((steps > jnp.float32(middle)).astype(jnp.int32) for middle in middles)
    else:
        bits = {"int8": 127, "int4": 7}[format]
        values = jnp.clip(jnp.round(steps), -128 if format == "int8" else -8, bits).astype(jnp.int32)
    return QuantizedWeight(jnp.asarray(values).reshape(w.shape).astype(shapes.values.dtype), scale[:, 0])


def quantize_mxfp4(blocks: Float[Array, "groups 32 O"], shape: tuple[int, ...]) -> QuantizedWeight:
    """Rounds groups to MXFP4 (OCP Microscaling Formats 1.0, 6.3): the scale's exponent is that of the largest magnitude, minus 2.

    Values that are in MXFP4 already stay exactly what they are, whatever the scale that they were stored with: with the largest of
    a group in [4, 8) scales, every smaller one is again one of the 16 values. Ties go to the value with an even last bit.
    """
    magnitudes = jnp.abs(blocks)
    exponent = jax.lax.bitcast_convert_type(jnp.max(magnitudes, axis=1, keepdims=True), jnp.int32) >> 23
    byte = jnp.maximum(exponent - 2, 1)
    scaled = magnitudes / power_of_two(byte)
    index = jnp.zeros(blocks.shape, jnp.int32)
    for position, (below, above) in enumerate(itertools.pairwise(FP4[:8])):
        middle = jnp.float32((below + above) / 2)
        index = index + ((scaled >= middle) if position % 2 else (scaled > middle)).astype(jnp.int32)
    index = jnp.where(blocks < 0, index + 8, index)
    return QuantizedWeight(index.reshape(shape).astype(jnp.uint4), byte[:, 0].astype(jnp.uint8))


def power_of_two(byte: Array) -> Float[Array, "..."]:
    """2^(byte - 127) in float32, exactly, for bytes of 1 to 254."""
    return jax.lax.bitcast_convert_type(byte.astype(jnp.int32) << 23, jnp.float32)


def decode(w: QuantizedWeight) -> Float[Array, "..."]:
    """Decodes values to float32, before the scale."""
    if w.values.dtype != jnp.uint4:
        return w.values.astype(jnp.float32)
    # A tree of four selections is vectorised, and a look-up in a table would not be.
    codebook = FP4 if w.format == "mxfp4" else NF4
    indices, choices = w.values.astype(jnp.int32), [jnp.float32(entry) for entry in codebook]
    for bit in range(4):
        high = (indices >> bit) & 1 == 1
        choices = [jnp.where(high, upper, lower) for lower, upper in zip(choices[::2], choices[1::2], strict=True)]
    return choices[0]


def dequantize(w: QuantizedWeight, dtype: Any = jnp.float32) -> Float[Array, "..."]:
    """Returns the dense weight [..., I, O], rounded once to `dtype`."""
    *stack, inputs, outputs = w.shape
    scale = power_of_two(w.scale) if w.format == "mxfp4" else w.scale.astype(jnp.float32)
    blocks = decode(w).reshape(*stack, -1, w.group, outputs) * scale[..., None, :]
    return blocks.reshape(*stack, inputs, outputs).astype(dtype)


def weight_bytes(w: QuantizedWeight) -> int:
    """Returns the weight's bytes on an accelerator, where two 4-bit values share one; on a CPU each has its own."""
    bits = 8 if w.format == "int8" else 4
    return w.values.size * bits // 8 + w.scale.size * w.scale.dtype.itemsize
