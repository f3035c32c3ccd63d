"""Peak memory of a step on a model of 512 small experts, each side in a process of its own."""

import pytest

from benchmarks.packed_experts import SEQUENCE, worker


@pytest.mark.slow
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_step_takes_a_third_of_the_memory_of_bfloat16_experts(everywhere):
    """0.35 of it: with adapters on attention alone, and on all experts too, whose optimizer states both sides have."""
    unpacked, packed = (worker(side, "bf16", SEQUENCE, 1, everywhere) for side in ("precision", "mxfp4"))
    print(f"peak {packed['peak'] / 1e6:.0f} MB packed, {unpacked['peak'] / 1e6:.0f} MB in bfloat16")
    assert 0 < packed["peak"] <= 0.35 * unpacked["peak"]
    experts = 512 * 98_304
    assert unpacked["resident"] - packed["resident"] == pytest.approx(experts * (16 - 4.25) / 8, rel=0.05)
