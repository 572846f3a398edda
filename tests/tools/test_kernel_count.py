"""Counting of kernels and bytes, on a program that is written by hand."""

from __future__ import annotations

import pytest

from grpo_jax.tools.bench.kernels import TokenKernels, kernels_of
from grpo_jax.tools.kernel_count import Module, shape_bytes, tuple_elements

PROGRAM = """
HloModule jit_step, is_scheduled=true

%fused_slice (param_0: bf16[4,8,16], param_1: s32[]) -> bf16[8,16] {
  %param_0 = bf16[4,8,16]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,8,16]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %bitcast = bf16[8,16]{1,0} bitcast(%slice)
}

%fused_update (param_0.1: f32[4,32], param_1.1: f32[1,32], param_2: s32[]) -> f32[4,32] {
  %param_0.1 = f32[4,32]{1,0} parameter(0)
  %param_1.1 = f32[1,32]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = f32[4,32]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2, %zero.1)
}

%layer (state: (s32[], bf16[4,8,16], f32[4,32], f32[1,32])) -> (s32[], bf16[4,8,16], f32[4,32], f32[1,32]) {
  %state = (s32[], bf16[4,8,16]{2,1,0}, f32[4,32]{1,0}, f32[1,32]{1,0}) parameter(0)
  %number = s32[] get-tuple-element(%state), index=0
  %stack = bf16[4,8,16]{2,1,0} get-tuple-element(%state), index=1
  %cache = f32[4,32]{1,0} get-tuple-element(%state), index=2
  %row = f32[1,32]{1,0} get-tuple-element(%state), index=3
  %fusion.1 = bf16[8,16]{1,0} fusion(%stack, %number), kind=kLoop, calls=%fused_slice
  %gemm = (bf16[8,8]{1,0}, s8[4194304]{0}) custom-call(%fusion.1, %fusion.1), custom_call_target="__cublas$lt$matmul"
  %fusion.2 = f32[4,32]{1,0} fusion(%cache, %row, %number), kind=kLoop, calls=%fused_update
  %done = s32[] bitcast(%number)
  ROOT %tuple = (s32[], bf16[4,8,16]{2,1,0}, f32[4,32]{1,0}, f32[1,32]{1,0}) tuple(%done, %stack, %fusion.2, %row)
}

%below (state.1: (s32[], bf16[4,8,16], f32[4,32], f32[1,32])) -> pred[] {
  %state.1 = (s32[], bf16[4,8,16]{2,1,0}, f32[4,32]{1,0}, f32[1,32]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%one (p: f32[6]) -> f32[6] {
  %p = f32[6]{0} parameter(0)
  ROOT %copy = f32[6]{0} copy(%p)
}

%other (q: f32[6]) -> f32[6] {
  %q = f32[6]{0} parameter(0)
  %copy.1 = f32[6]{0} copy(%q)
  ROOT %copy.2 = f32[6]{0} copy(%copy.1)
}

%token (s: (s32[], bf16[4,8,16], f32[4,32], f32[1,32], f32[6])) -> (s32[], bf16[4,8,16], f32[4,32], f32[1,32], f32[6]) {
  %s = (s32[], bf16[4,8,16]{2,1,0}, f32[4,32]{1,0}, f32[1,32]{1,0}, f32[6]{0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %x = f32[6]{0} get-tuple-element(%s), index=4
  %inside = (s32[], bf16[4,8,16]{2,1,0}, f32[4,32]{1,0}, f32[1,32]{1,0}) tuple(%n, %n, %n, %n)
  %while.1 = (s32[], bf16[4,8,16]{2,1,0}, f32[4,32]{1,0}, f32[1,32]{1,0}) while(%inside), condition=%below, body=%layer, TRIPS
  %yes = pred[] constant(true)
  %cond.1 = f32[6]{0} conditional(%yes, %x, %x), true_computation=%one, false_computation=%other
  ROOT %out = (s32[], bf16[4,8,16]{2,1,0}, f32[4,32]{1,0}, f32[1,32]{1,0}, f32[6]{0}) tuple(%n, %n, %n, %n, %cond.1)
}

ENTRY %main (a: f32[6]) -> f32[6] {
  %a = f32[6]{0} parameter(0)
  %first = f32[6]{0} copy(%a)
  %start = (s32[], bf16[4,8,16]{2,1,0}, f32[4,32]{1,0}, f32[1,32]{1,0}, f32[6]{0}) tuple(%first)
  %while.2 = (s32[], bf16[4,8,16]{2,1,0}, f32[4,32]{1,0}, f32[1,32]{1,0}, f32[6]{0}) while(%start), condition=%below, body=%token
  ROOT %result = f32[6]{0} get-tuple-element(%while.2), index=4
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"4"}}')


def test_a_loops_kernels_count_as_often_as_it_runs() -> None:
    (token,) = Module.parse(PROGRAM).loops
    (layer,) = token.inner
    assert (layer.body, layer.trip_count, layer.kernels) == ("layer", 4, 3)
    # Four layers of three kernels, and the larger branch.
    assert (token.body, token.trip_count, token.kernels) == ("token", None, 4 * 3 + 2)
    assert [loop.body for loop in token.walk()] == ["token", "layer"]


def test_what_the_host_waits_for_is_named() -> None:
    (token,) = Module.parse(PROGRAM).loops
    assert token.waits == ("cond.1",)
    assert token.inner[0].waits == ()


def test_bytes_are_those_of_slices_and_updates() -> None:
    """A slice of 256 bytes, a product that reads two of 256 and writes 128, and an update of a row of 128."""
    (token,) = Module.parse(PROGRAM).loops
    layer = 2 * 256 + (2 * 256 + 128) + 2 * 128 + 4 + 4  # and the layer's number, twice
    assert token.inner[0].bytes == layer
    assert token.bytes == 4 * layer + 2 * 2 * 24


def test_a_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Module.parse("HloModule nothing")


def test_sizes_of_shapes() -> None:
    assert shape_bytes("bf16[2,3]{1,0}") == 12
    assert shape_bytes("(s4[5], pred[], f8e4m3fn[3])") == 2.5 + 1 + 3 + 0.5  # the half byte is rounded up
    assert tuple_elements("((bf16[2,3]{1,0}, s32[]), f32[4]{0})") == ["(bf16[2,3]{1,0}, s32[])", " f32[4]{0}"]


def test_a_pallas_kernel_reads_one_layer_of_a_stack() -> None:
    """Of an array of 4 layers of 256 bytes; another array of 64 bytes and the result of 128 count in full."""
    kernel = """
ENTRY %main (a: bf16[4,8,16], b: f32[16]) -> f32[32] {
  %a = bf16[4,8,16]{2,1,0} parameter(0)
  %b = f32[16]{0} parameter(1)
  ROOT %kernel = f32[32]{0} custom-call(%a, %b), custom_call_target="mosaic_gpu_v2"
}
"""
    for layers, expected in ((4, 256), (0, 1024)):
        module = Module.parse(kernel, layers)
        (launch,) = module.launches("main")
        assert module.moved_bytes("main", launch) == expected + 64 + 128


def test_the_kernels_of_a_token_in_the_text_of_a_rollout() -> None:
    assert kernels_of(PROGRAM, 4, "a GPU") == TokenKernels(token=4 * 3 + 2, layer=3, waits=1, device="a GPU")
    assert kernels_of(PROGRAM, 5, "a GPU").layer is None  # no loop over five layers
