"""paddledsv4 convert: round trips, strictness, and what it leaves behind when something goes wrong."""

import json
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from generated import CONFIG, contents, released, small_config, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import ROOT
from test_cli import run

from paddledsv4.errors import UserError
from paddledsv4.weights import fp8, mxfp4
from paddledsv4.weights.files import INDEX, read_header
from paddledsv4.weights.names import tensors
from paddledsv4.weights.source import Source, listing
from paddledsv4.weights.state import rename

FP8_EXPERTS = {"ffn.experts": "F8_E4M3"}


def convert(source: Path, target: Path, *options: str) -> Path:
    assert run("convert", source, target, "--shard-size", "0.0005", *options) == 0
    return target


def refused(capsys, source: Path, target: Path, *options: str) -> str:
    """The one line that is said; nothing is left beside the source."""
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    here = set(target.parent.iterdir())
    assert run("convert", source, target, "--to", "paddledsv4", *options) == 2
    captured = capsys.readouterr()
    said = captured.err.splitlines()
    assert [line for line in said if line.startswith("error: ")] == said[-1:]
    assert set(target.parent.iterdir()) == here and not target.exists()
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    return said[-1]


def test_released_to_ours_and_back_is_equal_to_the_byte(tmp_path):
    start = contents(released(tmp_path / "a"))
    ours = convert(tmp_path / "a", tmp_path / "b", "--to", "paddledsv4", "--verify")
    assert {"I8", "F8_E4M3", "F8_E8M0", "BF16", "F32", "I64"} == {dtype for dtype, _, _ in contents(ours).values()}
    grouped = convert(ours, tmp_path / "c", "--to", "megatron", "--verify")
    assert any(name.endswith("linear_fc1.weight7") for name in contents(grouped))
    again = convert(grouped, tmp_path / "d", "--to", "paddledsv4")
    assert contents(again) == contents(ours)
    assert contents(convert(again, tmp_path / "e", "--to", "released", "--verify")) == start
    config = small_config()
    for folder, format in ((ours, "paddledsv4"), (grouped, "megatron")):
        assert {name: entry[:2] for name, entry in contents(folder).items()} == listing(config, format)
        assert json.loads((folder / INDEX).read_text())["weight_map"].keys() == contents(folder).keys()


def test_unpacked_numbers_are_those_of_the_formats(tmp_path):
    start = released(tmp_path / "a")
    folder = convert(start, tmp_path / "b", "--to", "paddledsv4", "--dtype", "bf16", "--verify")
    packed, ours = contents(start), contents(folder)
    kinds = {"F32": "F32", "I64": "I64"}
    assert {n: d for n, (d, _, _) in ours.items()} == {
        n: kinds.get(t.kind, "BF16") for n, t in tensors(small_config(), "paddledsv4").items()
    }

    def array(name: str, kind: type) -> np.ndarray:
        dtype, shape, data = packed[name]
        return np.frombuffer(data, kind).reshape(shape)

    def bits(name: str) -> np.ndarray:
        return (np.frombuffer(ours[name][2], np.uint16).astype(np.uint32) << 16).view(np.float32)

    halves = [
        mxfp4.dequantize(array(f"layers.2.ffn.experts.3.{w}.weight", np.int8),
                         array(f"layers.2.ffn.experts.3.{w}.scale", np.uint8)) for w in ("w1", "w3")
    ]  # fmt: skip
    fc1 = bits("decoder.layers.2.mlp.experts.local_experts.3.linear_fc1.weight")
    assert (fc1 == np.concatenate(halves).reshape(-1)).all() and np.unique(fc1).size > 50
    wo_a = fp8.dequantize(array("layers.1.attn.wo_a.weight", np.uint8), array("layers.1.attn.wo_a.scale", np.uint8))
    assert (bits("decoder.layers.1.self_attention.linear_o_group_proj") == wo_a.reshape(-1)).all()
    alphas = [ours[f"decoder.layers.0.mlp_hyper_connection.alpha_{gate}"][2] for gate in ("pre", "post", "res")]
    assert b"".join(alphas) == packed["layers.0.hc_ffn_scale"][2]


def test_packing_keeps_what_the_formats_can_hold(tmp_path):
    """bf16 -> FP8, FP4 -> bf16 changes no number that came from FP8 and FP4."""
    wide = convert(released(tmp_path / "a"), tmp_path / "b", "--to", "megatron", "--dtype", "bf16")
    packed = convert(wide, tmp_path / "c", "--to", "released", "--dtype", "released", "--verify")
    assert {n: e[:2] for n, e in contents(packed).items()} == listing(small_config())
    assert contents(convert(packed, tmp_path / "d", "--to", "megatron", "--dtype", "bf16")) == contents(wide)


@pytest.mark.parametrize("scale", ["F32", "F8_E8M0"])
def test_experts_in_fp8_are_seen_by_their_dtype(tmp_path, scale):
    config = small_config()
    what = listing(config)
    for tensor in tensors(config, "released").values():
        if tensor.kind in ("FP4", "FP8"):
            what[tensor.name] = "F8_E4M3", tensor.shape
            what[tensor.name.removesuffix("weight") + "scale"] = scale, fp8.scale_shape(tensor.shape)
    start = write_checkpoint(tmp_path / "a", what, config)
    if scale == "F32":  # random numbers, but scales are positive
        tensors_of_it = contents(start)
        for name, stored in Source.open(start, config).stored.items():
            if name.endswith(".scale"):
                _write(stored, np.abs(np.frombuffer(tensors_of_it[name][2], np.float32)).tobytes())
    ours = convert(start, tmp_path / "b", "--to", "paddledsv4")
    assert contents(convert(ours, tmp_path / "c", "--to", "released")) == contents(start)


def _write(stored, data: bytes, offset: int = 0) -> None:
    with stored.file.open("r+b") as file:
        file.seek(stored.offset + offset)
        file.write(data)


def test_to_transformers_and_back(tmp_path):
    start = released(tmp_path / "a")
    hf = convert(start, tmp_path / "hf", "--to", "hf", "--dtype", "bf16", "--without-mtp", "--verify")
    assert json.loads((hf / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert contents(hf)["model.layers.0.mlp.experts.gate_up_proj"][1] == (8, 128, 128)
    direct = convert(start, tmp_path / "b", "--to", "paddledsv4", "--dtype", "bf16", "--without-mtp")
    assert contents(convert(hf, tmp_path / "c", "--to", "paddledsv4")) == contents(direct)
    arrays = {name: np.frombuffer(e[2], np.uint8).reshape(*e[1], -1) for name, e in contents(hf).items()}
    config = Source.open(hf, small_config()).config
    with pytest.raises(UserError, match="shape"):
        rename(arrays, config, "hf")  # bytes are no numbers: one dimension more
    numbers = {name: array.view(_kind(array)).squeeze(-1) for name, array in arrays.items()}
    renamed = rename(numbers, config, "hf")
    assert {name: array.tobytes() for name, array in renamed.items()} == {n: e[2] for n, e in contents(direct).items()}


def _kind(array: np.ndarray) -> str:
    return {2: "<u2", 4: "<f4", 8: "<i8"}[array.shape[-1]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--to", "hf", "--dtype", "bf16"), "leave them out with --without-mtp"),
        (("--to", "hf", "--without-mtp"), "unpack with --dtype bf16"),
        (("--from", "hf", "--to", "paddledsv4"), "holds a checkpoint of the format released, not hf"),
    ],
)
def test_what_cannot_be_asked_for(capsys, tmp_path, options, said):
    released(tmp_path / "a")
    assert run("convert", tmp_path / "a", tmp_path / "b", *options) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers.1.attn.wkv.weight": None}, "tensor layers.1.attn.wkv.weight is missing"),
        ({"layers.1.attn.wkv.scale": None}, "tensor layers.1.attn.wkv.scale is missing"),
        ({"layers.9.attn_norm.weight": ("BF16", (128,))}, "tensor layers.9.attn_norm.weight has no place"),
        ({"layers.2.ffn.gate.tid2eid": ("I64", (512, 2))}, "tensor layers.2.ffn.gate.tid2eid has no place"),
        ({"layers.1.attn.wkv.weight": ("F8_E4M3", (128, 32))}, "shape [128, 32], the config gives [32, 128]"),
        ({"layers.1.attn.wkv.scale": ("F8_E8M0", (2, 1))}, "shape [2, 1], the config gives [1, 1]"),
        ({"layers.1.attn.wkv.scale": ("BF16", (1, 1))}, "must be F8_E8M0"),
        ({"layers.1.attn_norm.weight": ("I64", (128,))}, "has dtype I64, must be one of BF16"),
        ({"layers.0.ffn.gate.tid2eid": ("F32", (512, 2))}, "has dtype F32, must be one of I64, I32"),
        ({"mtp.0.main_proj.weight": ("BF16", (128, 128))}, "tensor mtp.0.main_proj.weight belongs to an MTP layer"),
    ],
)
def test_tensors_that_do_not_fit(capsys, tmp_path, change, said):
    what = listing(small_config())
    what = {name: entry for name, entry in (what | change).items() if entry}
    source = write_checkpoint(tmp_path / "a", what)
    (tmp_path / "out").mkdir()
    error = refused(capsys, source, tmp_path / "out" / "b")
    assert said in error and str(source) in error


def test_an_unknown_kind_of_mtp_layers_can_be_left_out(tmp_path):
    what = listing(small_config()) | {"mtp.0.main_proj.weight": ("BF16", (128, 128))}
    source = write_checkpoint(tmp_path / "a", what)
    convert(source, tmp_path / "b", "--to", "paddledsv4", "--without-mtp")
    assert not any(name.startswith("mtp") for name in contents(tmp_path / "b"))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["compress_ratios"] == [0, 4, 128, 4]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("layers.1.attn.wkv.scale", b"\xff"),
        ("layers.3.ffn.experts.2.w3.scale", b"\xff"),
        ("layers.1.attn.wkv.weight", b"\x7f"),
        ("layers.1.hc_attn_base", np.float32(np.nan).tobytes()),
        ("embed.weight", b"\x80\x7f"),
    ],
)
@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_nan_is_found(capsys, tmp_path, name, bad, dtype):
    source = released(tmp_path / "a")
    stored = Source.open(source, small_config()).stored[name]
    _write(stored, bad, stored.size - len(bad))
    error = refused(capsys, source, tmp_path / "b", "--dtype", dtype)
    assert f"{stored.file}: tensor {name} has NaN or infinite numbers" in error


def test_a_file_that_is_cut_off(capsys, tmp_path):
    source = released(tmp_path / "a")
    file = source / "model-00002-of-00003.safetensors"
    last = max(read_header(file).values(), key=lambda stored: stored.offset + stored.size)
    file.write_bytes(file.read_bytes()[:-1])
    error = refused(capsys, source, tmp_path / "b")
    assert f"{file}: is cut off in tensor {last.name}, 1 of" in error
    file.write_bytes(file.read_bytes()[:5])
    assert f"{file}: is damaged" in refused(capsys, source, tmp_path / "b")


def test_links(capsys, tmp_path):
    """Links to files are followed, as a download cache has them; a loop of links is an error."""
    source = released(tmp_path / "a")
    file = source / "model-00002-of-00003.safetensors"
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    convert(source, tmp_path / "b", "--to", "megatron")
    file.unlink()
    file.symlink_to(file)
    assert run("convert", source, tmp_path / "c", "--to", "megatron") == 2
    assert f"error: {file}: cannot be read (Too many levels of symbolic links)" in capsys.readouterr().err
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert run("convert", tmp_path / "loop", tmp_path / "c", "--to", "megatron") == 2
    assert run("convert", source, tmp_path / "loop", "--to", "megatron") == 2
    assert not (tmp_path / "c").exists()


def test_an_index_that_lies(capsys, tmp_path):
    source = released(tmp_path / "a")
    index = json.loads((source / INDEX).read_text())
    for name, said in (("../b.safetensors", "not a file of this folder"), ("model-9.safetensors", "not listed for")):
        changed = index | {"weight_map": index["weight_map"] | {"embed.weight": name}}
        (source / INDEX).write_text(json.dumps(changed))
        assert said in refused(capsys, source, tmp_path / "b")
    (source / INDEX).write_text("{}")
    assert "has no weight_map" in refused(capsys, source, tmp_path / "b")


def test_an_existing_target_stays(capsys, tmp_path):
    released(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("kept")
    assert run("convert", tmp_path / "a", tmp_path / "b", "--to", "megatron") == 2
    assert "exists; choose another folder" in capsys.readouterr().err
    assert (tmp_path / "b" / "mine").read_text() == "kept"


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    folder = released(tmp_path_factory.mktemp("flips") / "a")
    file = folder / "model-00002-of-00003.safetensors"
    return folder, file, file.read_bytes(), contents(folder)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_of_a_header_is_found_or_harmless(flipped, data):
    folder, file, good, tensors_of_it = flipped
    length = struct.unpack("<Q", good[:8])[0]
    bit = data.draw(st.integers(0, 8 * (8 + length) - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bad)
    try:
        Source.open(folder, small_config()).close()
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:
        assert contents(folder) == tensors_of_it
    finally:
        file.write_bytes(good)


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "paddledsv4", "convert", *map(str, arguments)]


def test_a_full_disk(tmp_path):
    """A limit on the size of files stands for it: the write fails in the middle of a shard."""
    source, before = released(tmp_path / "a"), None
    before = contents(source)
    limited = ["bash", "-c", 'ulimit -f 400 && exec "$@"', "-"]  # blocks of 1024 bytes
    ended = subprocess.run([*limited, *command(source, tmp_path / "b", "--to", "megatron")], cwd=ROOT, text=True,
                           capture_output=True)  # fmt: skip
    assert ended.returncode == 2 and f"error: cannot write {tmp_path / 'b'}: File too large" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and contents(source) == before


def test_an_interrupted_call_goes_on(tmp_path):
    source = released(tmp_path / "a")
    expected = contents(convert(source, tmp_path / "whole", "--to", "megatron", "--dtype", "bf16"))
    options = (source, tmp_path / "b", "--to", "megatron", "--dtype", "bf16", "--shard-size", "0.0001")
    process = subprocess.Popen(command(*options), cwd=ROOT, stderr=subprocess.DEVNULL)
    hidden, finished = tmp_path / ".b.partial", []
    while process.poll() is None and len(finished) < 3:
        finished = list(hidden.glob("*.safetensors"))
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "b").exists():
        pytest.skip("it was done before it was killed")
    times = {path.name: path.stat().st_mtime_ns for path in finished}
    assert run("convert", *options) == 0
    assert contents(tmp_path / "b") == expected and not hidden.exists()
    assert {name: (tmp_path / "b" / name).stat().st_mtime_ns for name in times} == times


def test_another_conversion_starts_anew(tmp_path):
    source = released(tmp_path / "a")
    hidden = tmp_path / ".b.partial"
    hidden.mkdir()
    (hidden / "plan.json").write_text("{}")
    (hidden / "model-00001-of-00001.safetensors").write_bytes(b"other")
    assert contents(convert(source, tmp_path / "b", "--to", "released")) == contents(source)


def test_verify_sees_a_damaged_write(capsys, tmp_path, monkeypatch):
    source = released(tmp_path / "a")
    from paddledsv4.weights.writer import Folder

    publish = Folder.write_index

    def damage(folder, files):
        stored = read_header(next(folder.hidden.glob("*.safetensors")))["decoder.layers.0.input_layernorm.weight"]
        _write(stored, b"\1\2")
        publish(folder, files)

    monkeypatch.setattr(Folder, "write_index", damage)
    error = refused(capsys, source, tmp_path / "b", "--verify")
    assert "tensor decoder.layers.0.input_layernorm.weight is not what was written" in error


def test_a_dry_run_of_flash(capsys, tmp_path, monkeypatch):
    """config.json and the index are enough: its weights are elsewhere."""
    monkeypatch.setenv("COLUMNS", "200")
    flash = tmp_path / "flash"
    flash.mkdir()
    (flash / "config.json").write_text((ROOT / "tests" / "data" / "flash_config.json").read_text())
    start = time.monotonic()
    assert run("convert", flash, tmp_path / "b", "--to", "released", "--dry-run") == 0
    assert time.monotonic() - start < 60
    said = capsys.readouterr().out
    assert "69,187" in said and "159,609,485,896 bytes" in said
    names = [*listing(Source.by_rule(flash, small_config(), "released").config)]
    (flash / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001.safetensors")}))
    assert run("convert", flash, tmp_path / "b", "--to", "released", "--dry-run") == 2
    assert "missing, which a model of this config has" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["flash"]


def test_a_bundle_converts(tmp_path):
    ours = convert(CONFIG, tmp_path / "a", "--to", "released")
    back = convert(ours, tmp_path / "b", "--to", "paddledsv4")
    start, end = contents(CONFIG / "init.safetensors"), contents(back)
    assert start.keys() == end.keys()
    assert all(end[n] == e for n, e in start.items() if not n.endswith("tid2eid"))  # the released table is int64


def test_help_has_examples(capsys):
    assert run("convert", "--help") == 0
    assert "paddledsv4 convert DeepSeek-V4-Flash flash" in capsys.readouterr().out
