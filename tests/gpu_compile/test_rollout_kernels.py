"""Kernels and bytes of a token on an H200, counted in the compiled rollout of Llama-3.1-8B: `make test-gpu-compile`."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from compiled_rollout import LAYERS, WIDTH, compiled_segment, size_of

from grpo_jax.rollout.decode import gpu_options
from grpo_jax.tools.kernel_count import Loop, Module
from grpo_kernels.ops import decode_attention

NEW_ENOUGH = jax.__version_info__ >= (0, 11, 2)
TWO_BLOCKS = (512, 512)


def counted(h200: Any, *, merge: bool = False, past_sizes: tuple[int, ...] = TWO_BLOCKS) -> tuple[Loop, Loop, float]:
    """Returns the loops of tokens and layers, and a token's bytes over those of weights, keys and values."""
    prepared = {"join": True, "merge": merge}
    segment = compiled_segment(h200, refilled=False, options=gpu_options("none"), prepared=prepared, past_sizes=past_sizes)
    (token,) = Module.parse(segment.compiled.as_text(), LAYERS).loops
    (layer,) = (loop for loop in token.walk() if loop.trip_count == LAYERS)
    embedding = segment.weights["params"]["embed"]["embedding"]  # a token reads its rows of it
    read = size_of((segment.weights, segment.prompts, segment.past_blocks, segment.segment_cache)) - size_of((embedding,))
    print(f"H200 {merge=} {past_sizes}: {layer.kernels} kernels a layer, {token.bytes / read:.2f} of the bytes, {token.waits=}")
    assert embedding.shape[1] == WIDTH
    return token, layer, token.bytes / read


@pytest.mark.skipif(not NEW_ENOUGH, reason="jax before 0.11.2 copies each layer's part of all arrays")
@pytest.mark.parametrize(("merge", "kernels", "share"), [(False, 39, 1.30), (True, 30, 1.27)])
def test_with_attention_by_xla(merge: bool, kernels: int, share: float, h200: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """71 kernels a layer with separate weights and seven past blocks."""
    monkeypatch.setattr(decode_attention, "MOSAIC_GPU_BY_DEFAULT", False)
    token, layer, bytes_over_read = counted(h200, merge=merge)
    assert layer.kernels <= kernels
    assert bytes_over_read < share
    assert token.waits == ()


@pytest.mark.skipif(not NEW_ENOUGH, reason="the kernels need jax 0.11.2")
@pytest.mark.parametrize(("merge", "kernels"), [(False, 22), (True, 13)])
@pytest.mark.parametrize("past_sizes", [TWO_BLOCKS, (32, 32, 32, 32, 128, 256, 512)], ids=str)
def test_with_attention_by_pallas(
    merge: bool, kernels: int, past_sizes: tuple[int, ...], h200: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of past blocks changes nothing. Nothing is counted as less than the arrays in full, also not unfilled columns.

    22: four products of the base and eight of adapters, attention's two, the rotated queries, the write of keys and values, two
    norms and the slice of their scales, the feed-forward's gate, the second sum of hidden states, and the loop's counter. Merged
    adapters save their products and that sum.
    """
    monkeypatch.setattr(decode_attention, "MOSAIC_GPU_BY_DEFAULT", True)
    token, layer, bytes_over_read = counted(h200, merge=merge, past_sizes=past_sizes)
    assert layer.kernels <= kernels
    assert bytes_over_read < 1.15
    assert token.waits == ()
