"""Metrics of a run: no bit changes, nothing is done when off, and the files hold what was seen."""

import importlib.util
import json
import math
from dataclasses import replace

import pytest
from checkpoints import numbers, small, state_bytes

from paddledsv4.config.metrics import MetricsConfig
from paddledsv4.errors import UserError
from paddledsv4.observe.metrics.formats import check_installed
from paddledsv4.observe.metrics.log import MetricsLog, read_metrics
from paddledsv4.observe.metrics.run import with_metrics

GROUPS = {"loss", "optimizer", "speed", "router", "expert_bias", "mhc", "attention", "indexer", "memory"}


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("preset", "precision"), [("paddle", "fp32"), ("megatron", "bf16")])
def test_no_bit_changes(tmp_path, preset, precision):
    plain, watched = small(preset, precision), small(preset, precision)
    expected = numbers(plain.train(3))
    config = MetricsConfig(formats=("jsonl",), every=2)
    assert numbers(with_metrics(watched, watched.train(3), config, tmp_path)) == expected
    assert state_bytes(watched) == state_bytes(plain)
    [line] = lines(tmp_path)
    assert line["step"] == 2 and {tag.split("/")[0] for tag in line} == GROUPS | {"step"}
    assert line["loss/main"] == expected[1][1][0][0] and line["optimizer/grad_norm"] == expected[1][2]
    assert all(math.isfinite(x) for x in line.values())


def test_off_is_off(tmp_path):
    runner = small()
    results = runner.train(1)
    assert with_metrics(runner, results, MetricsConfig(), tmp_path / "new") is results
    assert not runner.observers and not (tmp_path / "new").exists()


def test_ops_are_watched_at_due_steps_only(tmp_path):
    runner = small()
    results = with_metrics(runner, runner.train(3), MetricsConfig(formats=("jsonl",), every=2), tmp_path)
    table = runner.model.decoder.layers[0].mlp.router.ops
    before = dict(vars(table))
    seen = []
    for observer in runner.observers:
        begin = observer.begin_step
        observer.begin_step = lambda step, begin=begin: (begin(step), seen.append(dict(vars(table)) != before))
    list(results)
    assert seen == [False, True, False] and dict(vars(table)) == before


def test_held_out_losses_are_written(tmp_path):
    runner = small()
    results = (replace(r, evaluation=7.5) if r.step == 2 else r for r in runner.train(3))
    list(with_metrics(runner, results, MetricsConfig(formats=("jsonl",), every=3), tmp_path))
    assert lines(tmp_path)[0] == {"step": 2, "loss/held_out": 7.5}
    assert lines(tmp_path)[1]["step"] == 3 and "loss/held_out" not in lines(tmp_path)[1]


def test_a_resumed_log_goes_on_after_its_step(tmp_path):
    first = MetricsLog(tmp_path)
    for step in (2, 4, 6):
        first.write(step, {"loss/main": step / 2, "speed/x": float("nan")})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss/ma')  # killed while writing
    second = MetricsLog(tmp_path, resumed=4)
    second.write(6, {"loss/main": 30.0})
    second.close()
    assert [(line["step"], line["loss/main"]) for line in lines(tmp_path)] == [(2, 1.0), (4, 2.0), (6, 30.0)]
    assert lines(tmp_path)[0]["speed/x"] == "nan" and math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["speed/x"])
    MetricsLog(tmp_path).close()
    assert lines(tmp_path) == []


def written_to_tensorboard(folder) -> dict[str, list]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, float(e.tensor_proto.float_val[0])) for e in events.Tensors(tag)]
            for tag in events.Tags()["tensors"]}


def written_to_visualdl(folder) -> dict[str, list]:
    from visualdl import LogReader

    [file] = folder.glob("vdlrecords.*")
    reader = LogReader(file_path=str(file))
    return {tag: [(x.id, x.value) for x in reader.get_data("scalar", tag)] for tag in reader.get_tags()["scalar"]}


@pytest.mark.parametrize(
    ("name", "read"), [("tensorboard", written_to_tensorboard), ("visualdl", written_to_visualdl)]
)
def test_event_files_hold_the_same_and_survive_a_resumption(tmp_path, name, read):
    pytest.importorskip(name)
    first = MetricsLog(tmp_path, (name,))
    first.write(1, {"loss/main": 3.5, "router/entropy/decoder.layers.1": 0.5})
    first.write(2, {"loss/main": 2.5})
    first.close()
    second = MetricsLog(tmp_path, (name,), resumed=1)
    second.write(2, {"loss/main": 1.25, "speed/x": float("inf")})
    second.close()
    expected = {"loss/main": [(1, 3.5), (2, 1.25)], "router/entropy/decoder.layers.1": [(1, 0.5)]}
    assert read(tmp_path / name) == expected | {"speed/x": [(2, math.inf)]}


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "paddledsv4\[visualdl\]"'):
        MetricsLog(tmp_path / "new", ("jsonl", "visualdl"))
    assert not (tmp_path / "new").exists()
    check_installed(["jsonl"])


def test_unknown_formats_are_refused():
    with pytest.raises(UserError, match="observe.metrics.formats.0 = 'csv': must be 'jsonl', 'tens"):
        MetricsConfig.from_dict({"formats": ["csv"]})
