"""Instructions of the TPU kernels in the compiler's final schedule: how they are counted, and how many there may be."""

from __future__ import annotations

import importlib.util

import pytest
from tpu_instructions import CASES, count_instructions, counts_of, kind_of

SCHEDULE = """
= control target key start
LB: loop body

     0   :  { %9 = vsyncpa [#allocation5], 0 } /* Start region 1 */
  0x10 LB: > { %s1 = sadd.s32 4294967295, %s2  ;;  %p3 = scmp.ge.s32.totalorder %s1, 4 }
  0x11   : > { %4 = sbr.rel (%p3) target = $region8  ;;  %v5 = vld [vmem:[%s1] sm:$0xff] }
  0x12   : > { %v6 = vmul.f32 %v5, %v5  ;;  %7 = vst [vmem:[#allocation2] sm:$0xff] /*vst_source=*/%v6 }
  0x13   :  {} /* End region 7 */
  0x14 PF: > { %v8 = vunpack.c.0.s4.bf16 %v5  ;;  %v9 = vunpack.c.1.s4.bf16 %v5 } /* Start/End empty region 8 :: Start region 9 */
  0x15   : > { %v10 = vld [vmem:[#allocation99_spill] sm:$0xff]  ;;  %11 = vmatmul.mubr.bf16.gmra.mxu0 %v10 }
  0x16   : >> { %v12 = vpop.f32.mrf.mxu0  ;;  %v13 = vadd.f32 %v12, %v10  ;;  %v14 = vmax.xlane.f32.xlu0 %v13  ;;  %v15 = vpow2.f32 %v13 }
  0x17   : > { %16 = sbr.rel (!%p3) target = $region1 }
  0x18   :  { %17 = vsyncpa [#allocation5], 1 }
"""


def test_the_stretch_with_a_product_is_counted_and_the_rest_is_not() -> None:
    """Four bundles from the target of the first branch to the second branch; of the rest six."""
    counts = count_instructions(SCHEDULE)
    assert (counts.bundles, counts.others) == (4, 6)
    assert {kind: count for kind, count in counts.kinds.items() if count} == {
        "unpack": 2, "load": 1, "spill": 1, "matmul": 1, "result": 1, "add": 1, "permute": 1, "exp": 1,
    }  # fmt: skip
    assert counts.vector == 5


def test_kinds_go_by_the_longest_beginning() -> None:
    assert [kind_of(name) for name in ("vmax.f32", "vmax.xlane.f32.xlu1", "vadd.f32", "vadd.s32", "vmatprep.subr.bf16.mxu0")] == [
        "maximum", "permute", "add", "other", "push",
    ]  # fmt: skip


MOST: dict[str, dict[str, int]] = {}
"""Bundles of a grid step, of a head's 512 tokens: those counted with libtpu 0.0.42 and a twentieth more."""


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_no_kernel_takes_more_than_it_did(chip: str) -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the libtpu wheel, which is for Linux on x86-64")
    assert set(MOST[chip]) == set(CASES)
    found = {name: counts["bundles"] for name, counts in counts_of(chip, list(CASES)).items()}
    print(chip, found)
    assert {name: bundles for name, bundles in found.items() if bundles > MOST[chip][name] * 1.05} == {}
