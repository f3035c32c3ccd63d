"""_spread with hints, and with 8 rows to a store."""
import triton
import triton.language as tl


@triton.jit
def _hinted(x, starts, lists, rows, C, BLOCK: tl.constexpr, HINT: tl.constexpr, CACHE: tl.constexpr):
    t, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + t.to(tl.int64) * C + c, c < C, 0.0, eviction_policy="evict_first")
    for k in range(tl.load(starts + t), tl.load(starts + t + 1)):
        tl.store(rows + tl.load(lists + k).to(tl.int64) * C + c, v, c < C, eviction_policy=HINT, cache_modifier=CACHE)


@triton.jit
def _eight(x, starts, lists, rows, C, BLOCK: tl.constexpr, HINT: tl.constexpr, CACHE: tl.constexpr):
    t, c, j = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, 8)
    first, last = tl.load(starts + t), tl.load(starts + t + 1)
    v = tl.load(x + (t.to(tl.int64) * C + c)[None, :] + tl.zeros([8, 1], tl.int32), (c < C)[None, :], 0.0)
    for k in range(first, last, 8):
        row = tl.load(lists + k + j, k + j < last, 0).to(tl.int64)
        tl.store(rows + row[:, None] * C + c[None, :], v, (c < C)[None, :] & (k + j < last)[:, None],
                 eviction_policy=HINT, cache_modifier=CACHE)


def spread(kernel, block, warps, hint="", cache=""):
    def f(carrier, x, starts, lists):
        tokens, width = x.shape
        rows = carrier.empty([lists.shape[0], width], carrier.dtype(x), x)
        carrier.launch(kernel, (tokens, triton.cdiv(width, block)), x, starts, lists, rows, width, BLOCK=block,
                       HINT=hint, CACHE=cache, num_warps=warps)
        return rows
    return f
