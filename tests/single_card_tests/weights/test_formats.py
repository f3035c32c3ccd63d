"""FP8, FP4 and bfloat16 against recorded results of other implementations and against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ROOT

from align.tensors import read_tensors
from paddledsv4.weights import bfloat16, fp8, mxfp4

GOLDEN = ROOT / "tests" / "data" / "mxfp4_samples.safetensors"  # of ../shared/cases/mxfp4_golden.safetensors


def assert_same(ours: np.ndarray, recorded: np.ndarray) -> None:
    assert ours.dtype.itemsize == recorded.dtype.itemsize and ours.shape == recorded.shape
    assert ours.tobytes() == recorded.tobytes()


def check_golden(golden: dict[str, np.ndarray]) -> None:
    for name in (name for name in golden if name.endswith(".packed") and name != "quant.packed"):
        case = name.removesuffix(".packed")
        values = mxfp4.dequantize(golden[name], golden[f"{case}.scales_u8"])
        for result in (f"{case}.dequant_f32", f"{case}.dequant_bf16", f"{case}.weight_dequant"):
            if result in golden:
                wide = golden[result].dtype == np.float32
                assert_same(values if wide else bfloat16.encode(values), golden[result])
    packed, scales = mxfp4.quantize(golden["quant.in_f32"])
    assert_same(packed, golden["quant.packed"])
    assert_same(scales, golden["quant.scales_u8"])
    assert_same(mxfp4.dequantize(packed, scales), golden["quant.roundtrip_f32"])


def test_fp4_equals_the_recorded_bits():
    check_golden(read_tensors(GOLDEN, widen=False))


def test_fp4_equals_all_recorded_bits(shared):
    check_golden(read_tensors(shared / "cases" / "mxfp4_golden.safetensors", widen=False))


def test_the_order_of_nibbles_shows():
    golden = read_tensors(GOLDEN, widen=False)
    swapped = golden["allbytes.packed"].view(np.uint8)
    golden["allbytes.packed"] = (swapped >> 4 | swapped << 4).view(np.int8)
    with pytest.raises(AssertionError):
        check_golden(golden)


def test_fp4_scale_bytes_0_and_255():
    packed = np.full((2, 16), 0x22, np.int8)  # ones
    values = mxfp4.dequantize(packed, np.array([[0], [255]], np.uint8))
    assert values[0, 0] == np.float32(2.0**-127) and np.isnan(values[1]).all()


def test_e4m3_is_its_definition():
    for code, value in {0x00: 0, 0x01: 2**-9, 0x07: 7 * 2**-9, 0x08: 2**-6, 0x38: 1, 0x7E: 448, 0xFE: -448}.items():
        assert fp8.E4M3[code] == value
    assert np.flatnonzero(np.isnan(fp8.E4M3)).tolist() == [0x7F, 0xFF]
    codes = np.delete(np.arange(256), [0x7F, 0xFF]).astype(np.uint8)
    assert (fp8.encode(fp8.E4M3[codes]) == codes).all()


@settings(deadline=None, max_examples=200)
@given(st.floats(-500, 500, width=32))
def test_e4m3_rounds_to_the_nearest_even(value):
    table = np.delete(fp8.E4M3, [0x7F, 0xFF]).astype(np.float64)
    distance = np.abs(table - np.clip(value, -448, 448))
    code = int(fp8.encode(np.array([value], np.float32))[0])
    assert abs(float(fp8.E4M3[code]) - np.clip(value, -448, 448)) == distance.min()
    if (np.unique(table[distance == distance.min()])).size > 1:
        assert code % 2 == 0


@pytest.mark.parametrize("scale", ["F8_E8M0", "F32"])
@pytest.mark.parametrize("shape", [(128, 256), (130, 70), (1, 1)])
def test_fp8_blocks(scale, shape):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape).astype(np.float32) * np.exp2(rng.integers(-30, 30, (shape[0], 1))).astype("f4")
    codes, scales = fp8.quantize(values, scale)
    assert codes.shape == shape and scales.shape == fp8.scale_shape(shape)
    back = fp8.dequantize(codes, scales)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            largest = np.abs(values[block]).max()
            assert np.abs(back[block] - values[block]).max() <= largest / 448 * (2 if scale == "F8_E8M0" else 1) * 16
            assert np.abs(fp8.E4M3[codes[block]]).max() >= (224 if scale == "F8_E8M0" else 448)
    assert_same(fp8.dequantize(*fp8.quantize(back, scale)), back)  # what the format can hold stays


def test_zeros_stay_zeros():
    zeros = np.zeros((64, 64), np.float32)
    assert not fp8.dequantize(*fp8.quantize(zeros)).any() and not mxfp4.dequantize(*mxfp4.quantize(zeros)).any()


def test_bfloat16_rounds_to_even():
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 2.0**-133], np.float32)
    assert bfloat16.decode(bfloat16.encode(values)).tolist() == [1, 1, 1 + 2**-6, 1 + 2**-7, -1, 2.0**-133]


def test_tables_give_the_bits_of_products():
    """Every code with every scale, in float32 and rounded to bfloat16; one wrong entry would show."""
    scales, codes = np.arange(255, dtype=np.uint8), np.tile(np.arange(256, dtype=np.uint8), (255 * 128, 1))
    with np.errstate(over="ignore"):
        expected = np.repeat(fp8.E4M3[None] * fp8.E8M0[:255, None], 128, 0)
        pairs = (mxfp4.PAIRS[None] * fp8.E8M0[:255, None, None]).reshape(255, 512)
    blocks = np.repeat(scales[:, None], 2, 1)
    wide, narrow = (fp8.dequantize(codes, blocks, narrow=n) for n in (False, True))
    assert_same(wide, expected)
    number = ~np.isnan(expected)
    assert_same(narrow[number], bfloat16.encode(expected[number]))
    assert np.isnan(bfloat16.decode(narrow[~number])).all()
    packed, per_block = codes[:255].view(np.int8), np.repeat(scales[:, None], 16, 1)
    assert_same(mxfp4.dequantize(packed, per_block), pairs)
    assert_same(mxfp4.dequantize(packed, per_block, narrow=True), bfloat16.encode(pairs))
