"""Linear layers on frozen MXFP4 weights, expert by expert in one launch: y = x W^T and dx = dy W.

Rows are grouped by expert. A program has a tile of one expert's rows and of the output, and reads that expert's packed
weight and scales, whose addresses stand in a table: 32 bits are eight e2m1 numbers, every 32 numbers along a row have
an e8m0 scale. Numbers exist unpacked only in registers and, as the matrix units' operand, in shared memory. They are
those of :mod:`paddledsv4.weights.mxfp4` to the bit: bfloat16 holds every product of a number and a scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.device import compiled

# $4: eight e2m1 numbers; $5: their scale, twice in bfloat16; $0 to $3: two numbers each, in bfloat16. The magnitudes'
# upper and lower bytes are looked up in two tables of eight bytes; the sign is bit 3 of a number and 15 of the result.
_UNPACK = tl.constexpr("""{
.reg .b32 t, u, q, h, l, g, m;
and.b32 t, $4, 0x77777777;
shr.b32 u, t, 16;
shl.b32 q, $4, 4;
prmt.b32 h, 0x3F3F3F00, 0x40404040, t;
prmt.b32 l, 0xC0800000, 0xC0804000, t;
prmt.b32 g, 0x3F3F3F00, 0x40404040, u;
prmt.b32 m, 0xC0800000, 0xC0804000, u;
prmt.b32 $0, l, h, 0x5140;
prmt.b32 $1, l, h, 0x7362;
prmt.b32 $2, m, g, 0x5140;
prmt.b32 $3, m, g, 0x7362;
prmt.b32 h, q, $4, 0x4000;
prmt.b32 l, q, $4, 0x5010;
prmt.b32 g, q, $4, 0x6020;
prmt.b32 m, q, $4, 0x7030;
lop3.b32 $0, h, 0x80008000, $0, 0xEA;
lop3.b32 $1, l, 0x80008000, $1, 0xEA;
lop3.b32 $2, g, 0x80008000, $2, 0xEA;
lop3.b32 $3, m, 0x80008000, $3, 0xEA;
mul.rn.bf16x2 $0, $0, $5;
mul.rn.bf16x2 $1, $1, $5;
mul.rn.bf16x2 $2, $2, $5;
mul.rn.bf16x2 $3, $3, $5;
}""")


@triton.jit
def _low(pair):
    return pair.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _high(pair):
    return (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _number(words, position: tl.constexpr, scale):
    """One of the eight numbers, by its definition: its bits are those of a float32 times 2^-126."""
    code = words >> 4 * position
    return ((code & 7) << 22 | (code & 8) << 28).to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale


@triton.jit
def _weight(words, scales, dtype: tl.constexpr, PTX: tl.constexpr):
    """words int32 [R, N], scales uint8 [R, N / 4] -> [R, 8 N]. Without ``PTX``, by the definition in float32."""
    R: tl.constexpr = words.shape[0]
    N: tl.constexpr = words.shape[1]
    b = tl.broadcast_to(scales.to(tl.int32)[:, :, None], R, N // 4, 4).reshape(R, N)
    if PTX:
        scale = tl.where(b == 0, 0x00400040, tl.where(b == 255, 0x7FC07FC0, b << 7 | b << 23))
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            _UNPACK, "=&r,=&r,=&r,=&r,r,r", [words, scale], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        even = tl.join(tl.join(_low(p0), _low(p2)), tl.join(_low(p1), _low(p3)))
        odd = tl.join(tl.join(_high(p0), _high(p2)), tl.join(_high(p1), _high(p3)))
    else:
        scale = tl.where(b == 0, 0x00400000, tl.where(b == 255, 0x7FC00000, b << 23)).to(tl.float32, bitcast=True)
        even = tl.join(tl.join(_number(words, 0, scale), _number(words, 4, scale)),
                       tl.join(_number(words, 2, scale), _number(words, 6, scale)))
        odd = tl.join(tl.join(_number(words, 1, scale), _number(words, 5, scale)),
                      tl.join(_number(words, 3, scale), _number(words, 7, scale)))
    return tl.join(even, odd).to(dtype).reshape(R, 8 * N)


@triton.jit
def _schedule(counts, tiles, experts, slots, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Program e: the tiles of expert e among ``slots``, each with its expert (-1: no tile), first row and end row."""
    e = tl.program_id(0)
    i = tl.arange(0, EXPERTS)
    count = tl.load(counts + i, i < experts, 0).to(tl.int32)
    blocks = (count + ROWS - 1) // ROWS
    slot, row = tl.sum(tl.where(i < e, blocks, 0), 0), tl.sum(tl.where(i < e, count, 0), 0)
    mine = tl.load(counts + e).to(tl.int32)
    for k in range(0, (mine + ROWS - 1) // ROWS):
        tl.store(tiles + slot + k, e)
        tl.store(tiles + slots + slot + k, row + k * ROWS)
        tl.store(tiles + 2 * slots + slot + k, row + mine)
    if e == experts - 1:
        for k in range(tl.sum(blocks, 0), slots):
            tl.store(tiles + k, -1)


@triton.jit
def _tile(tiles, slots):
    """Expert, first row and end row of this program."""
    t = tl.program_id(1)
    return tl.load(tiles + t), tl.load(tiles + slots + t), tl.load(tiles + 2 * slots + t)


@triton.jit
def _packed(weights, scales, e):
    """Pointers to the words and to the scales of expert e; its rows begin at multiples of 16 bytes."""
    return (tl.multiple_of(tl.load(weights + e).to(tl.pointer_type(tl.int32)), 16),
            tl.load(scales + e).to(tl.pointer_type(tl.uint8)))  # fmt: skip


@triton.jit
def _store(y, tile, first, stop, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = first + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    at = i.to(tl.int64)[:, None] * width + j[None, :]
    tl.store(y + at, tile.to(y.dtype.element_ty), (i < stop)[:, None] & (j < width)[None, :])


@triton.jit
def _read(w, s, rows, column, ROWS, WORDS, BLOCKS, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """words [rows, WIDTH / 8] and scales [rows, WIDTH / 32] from ``column`` on, a multiple of 32. Beyond the ROWS rows
    of the weight its last one, unless EVEN, which says that all tiles are whole; beyond its columns zeros."""
    j, b = column // 8 + tl.arange(0, WIDTH // 8), column // 32 + tl.arange(0, WIDTH // 32)
    if EVEN:
        words = tl.load(w + rows[:, None] * WORDS + j[None, :])
        return words, tl.load(s + rows[:, None] * BLOCKS + b[None, :])
    rows = tl.minimum(rows, ROWS - 1)
    words = tl.load(w + rows[:, None] * WORDS + j[None, :], (j < WORDS)[None, :], 0)
    return words, tl.load(s + rows[:, None] * BLOCKS + b[None, :], (b < BLOCKS)[None, :], 0)


@triton.jit
def _forward(x, y, weights, scales, tiles, slots, OUT, IN, WORDS, BLOCKS, EVEN: tl.constexpr, PTX: tl.constexpr,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """ROWS x COLUMNS of y = x W^T. A row of W has WORDS words and BLOCKS scales."""
    e, first, stop = _tile(tiles, slots)
    if e < 0:
        return
    w, s = _packed(weights, scales, e)
    column = tl.program_id(0) * COLUMNS
    o = column + tl.arange(0, COLUMNS)
    words, scale = _read(w, s, o, 0, OUT, WORDS, BLOCKS, DEPTH, EVEN)
    tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    last = (IN - 1) // DEPTH * DEPTH
    for k in range(0, IN, DEPTH):
        rows = x.load([first, k])
        part = _weight(words, scale, x.dtype, PTX)
        words, scale = _read(w, s, o, tl.minimum(k + DEPTH, last), OUT, WORDS, BLOCKS, DEPTH, EVEN)
        tile = tl.dot(rows, part.T, tile, input_precision="ieee")
    _store(y, tile, first, stop, column, OUT, ROWS, COLUMNS)


@triton.jit
def _input_gradient(dy, dx, weights, scales, tiles, slots, OUT, IN, WORDS, BLOCKS, EVEN: tl.constexpr,
                    PTX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """ROWS x COLUMNS of dx = dy W."""
    e, first, stop = _tile(tiles, slots)
    if e < 0:
        return
    w, s = _packed(weights, scales, e)
    column, o = tl.program_id(0) * COLUMNS, tl.arange(0, DEPTH)
    words, scale = _read(w, s, o, column, OUT, WORDS, BLOCKS, COLUMNS, EVEN)
    tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    last = (OUT - 1) // DEPTH * DEPTH
    for k in range(0, OUT, DEPTH):
        rows = dy.load([first, k])
        part = _weight(words, scale, dy.dtype, PTX)
        words, scale = _read(w, s, tl.minimum(k + DEPTH, last) + o, column, OUT, WORDS, BLOCKS, COLUMNS, EVEN)
        tile = tl.dot(rows, part, tile, input_precision="ieee")
    _store(dx, tile, first, stop, column, IN, ROWS, COLUMNS)


def _config(dtype: str) -> dict[str, int]:
    """Tiles for the matrix units' bfloat16, small enough that a multiprocessor has two programs: one unpacks while the
    other multiplies. float32 is multiplied as it is, without the matrix units."""
    if dtype == "bfloat16":
        return {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 4, "num_stages": 3}
    return {"ROWS": 32, "COLUMNS": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 2}


def _launch(carrier: Carrier, kernel, rows: T, weights: T, scales: T, counts: T, out: int, width: int, result: int,
            depth: int) -> T:
    """``kernel`` on rows [n, depth] -> [n, result], with W [out, width]."""
    dtype, n, experts = carrier.dtype(rows), rows.shape[0], counts.shape[0]
    config = _config(dtype)
    y = carrier.empty([n, result], dtype, rows)
    if not n:
        return y
    slots = n // config["ROWS"] + experts  # at least as many as there are tiles, whatever the counts
    tiles = carrier.empty([3, slots], "int32", rows)
    carrier.launch(_schedule, (experts,), counts, tiles, experts, slots, ROWS=config["ROWS"],
                   EXPERTS=triton.next_power_of_2(experts), num_warps=1)
    carrier.launch(
        kernel, (triton.cdiv(result, config["COLUMNS"]), slots), carrier.tiles(rows, [config["ROWS"], config["DEPTH"]]),
        y, weights, scales, tiles, slots, out, width, width // 8, width // 32,
        EVEN=result % config["COLUMNS"] == 0 and depth % config["DEPTH"] == 0,
        PTX=dtype == "bfloat16" and compiled(), **config,
    )  # fmt: skip
    return y


def forward(carrier: Carrier, x: T, weights: T, scales: T, counts: T, out: int) -> T:
    """x [n, in] grouped by expert -> [n, out] in its dtype.

    weights, scales: int64 [experts], the addresses of contiguous int8 [out, in / 2] and uint8 [out, in / 32]; in is a
    multiple of 32. counts: integers [experts], the rows of each, n in all.
    """
    width = x.shape[1]
    return _launch(carrier, _forward, x, weights, scales, counts, out, width, result=out, depth=width)


def input_gradient(carrier: Carrier, dy: T, weights: T, scales: T, counts: T, width: int) -> T:
    """dy [n, out] -> dx [n, in] with in = ``width``; the rest as in :func:`forward`."""
    out = dy.shape[1]
    return _launch(carrier, _input_gradient, dy, weights, scales, counts, out, width, result=width, depth=out)
