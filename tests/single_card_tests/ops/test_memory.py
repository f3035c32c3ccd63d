"""The native sparse attention never holds [rows, batch * positions, D] as the reference's gather does."""

import subprocess
import sys

SCRIPT = """
from paddledsv4.host import prepare_host
prepare_host()
import paddle
from paddledsv4.numerics.registry import load_all
from paddledsv4.ops import sparse_attention as module
module.CHUNK_NUMBERS = 1 << 20
ops = load_all()
s, b, heads, d, window, topk = {length}, 2, 4, 32, 32, 16
q, kv, entries = paddle.randn([s, b, heads, d]), paddle.randn([s, b, d]), paddle.randn([s // 4, b, d])
for x in (q, kv, entries):
    x.stop_gradient = False
index = ops["indexer_topk"].variants["paddle"].function(paddle.randn([b, s, s // 4]), topk, 4)
stat = paddle.base.core.host_memory_stat_peak_value
paddle.base.core.host_memory_stat_reset_peak_value("Allocated", 0)
before = paddle.base.core.host_memory_stat_current_value("Allocated", 0)
out = ops["sparse_attention"].variants["paddle"].function(q, kv, entries, index, paddle.zeros([heads]), window, 4, 0.2)
out.sum().backward()
print(stat("Allocated", 0) - before)
"""


def peak_bytes(length: int) -> int:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(length=length)], capture_output=True, text=True, check=True
    )
    return int(run.stdout.split()[-1])


def test_memory_grows_with_rows_times_selected():
    short, long = peak_bytes(512), peak_bytes(2048)
    rows, positions, d = 2048 * 2, 2048 + 512, 32
    reference_gather = rows * 2 * positions * d * 4
    print(f"512 tokens {short / 1e6:.1f} MB, 2048 {long / 1e6:.1f} MB, one gather {reference_gather / 1e6:.0f} MB")
    assert long < 6 * short  # four times the rows; the reference would take sixteen times as much
    assert long < reference_gather / 20
