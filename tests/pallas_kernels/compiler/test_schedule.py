"""Regions, loops and branches read from a schedule; the figures of a report made of them."""

import dataclasses
import re

import pytest

from pallas_kernels.compiler import hopper_report, schedule, static_cycles

# A grid of 4 steps: a branch that starts a copy (region 4), the body (5) with the first step's part (6) and a loop of
# 3 rounds (7). A comment runs over two lines, as libtpu writes some.
BUNDLES = """
PB: predicated region body
= control target key end

     0   :  { %s1 = sld [smem:[#allocation0]] /* core id */ }
   0x1   :  { %s2 = smov 0 } /* Start region 1 */
   0x2   :  { %s3 = smov 0 } /* End region 1 */
   0x3 LB: > { %p1_p0 = scmp.eq.s32.totalorder %s2, 0 } /* Start region 2 */
   0x4   : > { %9 = sbr.rel (%p1_p0) target = $region3 }
   0x5   : > { %s4 = smov 0 } /* Start region 4 :: End region 4 */
   0x6 PF: > { %s5 = smov 0 } /* Start/End empty region 3 */
   0x7   : > { %10 = sbr.rel (%p2_p1) target = $region9 }
   0x8   : > { %v1 = vmatmul.bf16.gmra.mxu0 %v0  ;;  %v2 = vmatmul.bf16.gmra.mxu1 %v0 } /* Start region 5 */
   0x9   : > { %11 = sbr.rel (%p3_p2) target = $region8 }
   0xa   : > { %v3 = vld [vmem:[%s5]] } /* Start region 6 */
   0xb   : > { %v4 = vmatmul.bf16.gmra.mxu0 %v0 } /* End region 6 */
   0xc PF: > { %s6 = smov 0 } /* Start/End empty region 8 */
   0xd LB: >> { %v5 = vmatmul.bf16.gmra.mxu0 %v0 /* a window of
second_minor_factor: 1 */ } /* Start region 7 */
   0xe   : >> { %p7_p7 = scmp.ge.s32.totalorder %s7_s1, 3 /* loop exit test */ }
   0xf   : >> { %12 = sbr.rel (!%p7_p7) target = $region7 } /* End region 7 */
  0x10   : > { %s8 = smov 0 } /* End region 5 */
  0x11 PF: > { %p8_p8 = scmp.ge.s32.totalorder %s2_s2, 6 /* loop exit test */ } /* Start/End empty region 9 */
  0x12   : > { %13 = sbr.rel (!%p8_p8) target = $region2 }
  0x13   : > { %s9 = smov 0 } /* End region 2 */
  0x14   :  { %14 = sbr.rel target = $region0 }
"""
EXPANSION = """
ordinal=0 before=260 after=300 expansion=1
ordinal=2 before=230 after=280 expansion=1
ordinal=5 before=200 after=250 expansion=1
ordinal=6 before=40 after=50 expansion=1
ordinal=7 before=90 after=100 expansion=1
"""
SLOTS = {"MXU_0 matmul": (3, 30), "MXU_1 matmul": (1, 30), "VECTOR_ALU": (150, 600)}


def report(bundles=BUNDLES):
    return static_cycles.KernelReport(
        name="kernel.1",
        pallas=True,
        regions=schedule.regions(bundles, EXPANSION),
        slots=SLOTS,
        spills=0,
        fills=0,
        bytes=0,
        cores=1,
    )


def by_ordinal(kernel):
    return {region.ordinal: region for region in kernel.regions}


def test_regions_nest_and_know_loops_and_branches():
    regions = by_ordinal(report())
    assert {ordinal: region.parent for ordinal, region in regions.items()} == {
        0: None,
        1: 0,
        2: 0,
        3: 2,
        4: 2,
        5: 2,
        6: 5,
        7: 5,
        8: 5,
        9: 2,
    }
    assert {ordinal: region.trips for ordinal, region in regions.items() if region.loop} == {0: None, 2: 6, 7: 3}
    assert [ordinal for ordinal, region in regions.items() if region.conditional] == [4, 5, 6]
    assert [regions[ordinal].matmuls for ordinal in (0, 5, 6, 7)] == [4, 4, 1, 1]
    # libtpu's cycles where it gives them, else one a bundle.
    assert [regions[ordinal].cycles for ordinal in (0, 1, 5, 7)] == [300, 2, 250, 100]


def without_outer_loop():
    return report(BUNDLES.replace("  0x14   :  { %14 = sbr.rel target = $region0 }\n", ""))


def test_grid_and_body():
    kernel = without_outer_loop()
    assert kernel.grid.ordinal == 2
    assert kernel.body.ordinal == 5
    assert kernel.steps == 4
    assert [branch.ordinal for branch in kernel.branches(kernel.body)] == [6]
    assert [branch.ordinal for branch in kernel.branches(kernel.grid, share=0)] == [4, 5]
    assert [loop.ordinal for loop in kernel.loops(kernel.body)] == [7]


def test_model_counts_each_region_as_often_as_it_runs():
    kernel = without_outer_loop()
    outside, round_the_grid, start_copy = 300 - 280 - 2, 280 - 250 - 3, 1
    empty = 2
    body, first, inner = 250 - 50 - 100 - 1, 50, 100
    fixed = outside + 2 + 6 * (round_the_grid + start_copy + empty) + 4 * (body + 1)
    assert kernel.model() == fixed + 4 * (first + 3 * inner)
    assert kernel.model({6: 1}) == fixed + first + 4 * 3 * inner
    assert kernel.model({6: 1, 7: 20}) == fixed + first + 20 * inner


def test_loops_that_hang_on_data_must_be_given():
    kernel = report(BUNDLES.replace("%s2_s2, 6", "%s2_s2, %s77").replace("$region0", "$region99"))
    assert kernel.steps is None
    with pytest.raises(LookupError, match="loop 2"):
        kernel.model()
    assert kernel.model({2: 6, 5: 4}) == without_outer_loop().model()


def test_mxu_share_counts_executions():
    kernel = without_outer_loop()
    # A tenth and a thirtieth of 300 cycles for four instructions: 5 cycles each on the mean unit.
    executed = 4 * (2 + 1 + 3)
    assert kernel.mxu() == pytest.approx(executed * 5 / kernel.model())
    assert dataclasses.replace(kernel, regions=kernel.regions[:2]).mxu() >= 0


def test_time_is_of_cycles_or_of_memory():
    chip = static_cycles.CHIPS["v5p"]
    assert static_cycles.seconds("v5p", 1.75e9) == pytest.approx(1.0)
    assert static_cycles.seconds("v5p", 1.0, moved=2 * chip.bandwidth) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("hlo", "expected"),
    [
        ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048),
        ("(f32[4]{0}, s32[]{:T(128)}, pred[3]{0})", 16 + 4 + 3),
        ("f8e4m3fn[16]{0}", 16),
    ],
)
def test_bytes_of_hlo_types(hlo, expected):
    assert static_cycles._bytes(hlo) == expected


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
ptxas info    : Compiling entry function 'entry_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for entry_mosaic_gpu_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Compile time = 791.346 ms
ptxas warning : something of note
"""


def test_ptxas_report():
    ptx = "wgmma.mma_async.sync.aligned.m64n128k16\nwgmma.fence\nwgmma.mma_async.sync.aligned.m64n128k16\n"
    kernel = hopper_report.parse(PTXAS, ptx)
    assert (kernel.registers, kernel.spill_stores, kernel.spill_loads, kernel.stack) == (168, 8, 12, 16)
    assert (kernel.barriers, kernel.static_shared_memory, kernel.wgmma) == (16, 1, 2)
    assert [re.search(r"C\d+|note", warning).group() for warning in kernel.warnings] == ["C7510", "note"]
