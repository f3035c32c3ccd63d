"""Capture of a Megatron job, on a fake Megatron with the classes that it watches."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fake_megatron  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from align.bundle import load_bundle  # noqa: E402
from align.capture.megatron import capture, find, to_numpy  # noqa: E402
from align.hashing import tensor_md5  # noqa: E402
from align.losslog import loss_md5  # noqa: E402
from paddledsv4.errors import UserError  # noqa: E402


@pytest.fixture
def megatron(monkeypatch):
    return fake_megatron.install(monkeypatch)


def train(megatron, steps=3, microbatches=2, wrong_labels=False, mask=None, decay=1.0):
    """A training script; returns (mean loss of every microbatch, gradient norm of every step, model)."""
    torch.manual_seed(0)
    model = megatron.GPTModel(fake_megatron.config())
    settings = SimpleNamespace(adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.1, clip_grad=1.0)
    optimizer = megatron.FP32Optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), settings)
    losses, norms = [], []
    for _ in range(steps):
        optimizer.optimizer.zero_grad()
        for _ in range(microbatches):
            rows = torch.randint(0, 40, (2, 25))
            labels = rows[:, :-1] if wrong_labels else rows[:, 1:]
            ones = torch.ones(labels.shape) if mask is None else mask
            per_token = model(rows[:, :-1], None, None, labels=labels, loss_mask=ones)
            (per_token.mean() / microbatches).backward()
            losses.append((per_token.detach() * ones).reshape(-1).sum() / ones.sum().int())
        norms.append(optimizer.step()[1].item())
        optimizer.param_groups[0]["lr"] *= decay
    return losses, norms, model


def log(path):
    return [line for line in map(json.loads, (path / "losses.jsonl").read_text().splitlines()) if "run" not in line]


def test_a_job_becomes_a_bundle(megatron, tmp_path, capsys):
    alone, norms, trained = train(megatron)
    capture(tmp_path / "job", steps=3, trace_steps=(1, 3), microbatches=(0, 1))
    losses, _, _ = train(megatron)
    assert "3 steps in" in capsys.readouterr().err
    assert [x.item() for x in losses] == [x.item() for x in alone]
    bundle = load_bundle(tmp_path / "job")
    assert bundle.training.optimizer.lr == 1e-3 and bundle.training.gradient_accumulation_steps == 2
    assert bundle.model.vocab_size == 40 and bundle.source["torch"] == torch.__version__
    recorded = log(tmp_path / "job")
    assert [r["main_md5"] for r in recorded if "main_md5" in r] == [loss_md5(x.item()) for x in alone]
    assert [float(r["mtp_loss"]) for r in recorded if "mtp_loss" in r] == pytest.approx([2 * x.item() for x in alone])
    assert [float(r["grad_norm"]) for r in recorded if "grad_norm" in r] == pytest.approx(norms)
    assert len(bundle.losses().main) == 6
    torch.manual_seed(0)
    initial = megatron.GPTModel(fake_megatron.config())
    for name, tensor in initial.state_dict().items():
        np.testing.assert_array_equal(bundle.init()[name], tensor.numpy())
    final = [to_numpy(p).tobytes() for _, p in sorted(trained.named_parameters())]
    assert recorded[-1]["final_weights_md5"] == tensor_md5(np.frombuffer(b"".join(final), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_traces_bear_their_names(megatron, tmp_path):
    capture(tmp_path / "job", steps=1)
    train(megatron, steps=1)
    forward = load_file(tmp_path / "job/trace/forward.safetensors")
    at = "decoder.layers.0.self_attention_hyper_connection"
    np.testing.assert_array_equal(forward["decoder.layers.0.in"], forward["embedding.out"].swapaxes(0, 1))
    np.testing.assert_array_equal(forward[f"{at}.h_pre"], 0.5 * forward["decoder.layers.0.in"])
    np.testing.assert_array_equal(forward[f"{at}.h_post"], 0.25 * forward["decoder.layers.0.in"])
    np.testing.assert_array_equal(forward["decoder.mhc_multistream"], forward["decoder.layers.0.out"])
    assert forward["decoder.layers.0.mlp.router.map"].sum(1).tolist() == [2] * 48
    gradients = load_file(tmp_path / "job/trace/activation_grads.safetensors")
    assert gradients["logits"].shape == (24, 2, 40) and f"{at}.h_post" not in gradients
    choices = json.loads((tmp_path / "job/trace/choices.json").read_text())
    assert choices["decoder.layers.0.mlp.router.map"]["margin"]["min"] > 0
    state = json.loads((tmp_path / "job/trace/optimizer.json").read_text())
    after = json.loads((tmp_path / "job/trace/after_step1.json").read_text())["params"]
    assert {n: state[f"master/{n}"][2] for n in after} == after


def test_nothing_stays_when_it_is_over(megatron, tmp_path):
    before = [dict(vars(c)) for c in (megatron.GPTModel, megatron.FP32Optimizer, megatron.MTPLossLoggingHelper)]
    functions = {n: f for n, f in vars(sys.modules["megatron.core.everything"]).items() if callable(f)}
    capture(tmp_path / "job", steps=1)
    _, _, model = train(megatron, steps=2)
    assert [dict(vars(c)) for c in (megatron.GPTModel, megatron.FP32Optimizer, megatron.MTPLossLoggingHelper)] == before
    assert {n: f for n, f in vars(sys.modules["megatron.core.everything"]).items() if callable(f)} == functions
    assert not any(m._forward_hooks or m._forward_pre_hooks or "compute_mappings" in vars(m) for m in model.modules())
    assert len(log(tmp_path / "job")) == 2 + 1 + 1


def test_a_job_that_ends_early_gives_what_it_did(megatron, tmp_path):
    running = capture(tmp_path / "job", steps=5)
    train(megatron, steps=2)
    assert not (tmp_path / "job").exists()
    running.finish()  # what the end of the process calls
    assert load_bundle(tmp_path / "job").training.steps == 2


def test_a_job_that_never_trains_writes_nothing(megatron, tmp_path, capsys):
    capture(tmp_path / "job").finish()
    assert "no training step" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_a_bundle_cannot_say_is_told(megatron, tmp_path, monkeypatch, capsys):
    """A rate that changes, a sharded optimizer, and a tensor that passes nowhere; silence where there is none of it."""
    seen = {"steps": 2, "names": ("embedding*", "logits")}
    capture(tmp_path / "plain", **seen)
    train(megatron, steps=2)
    assert "note" not in capsys.readouterr().err
    capture(tmp_path / "decayed", **seen)
    train(megatron, steps=2, decay=0.5)
    assert "went from 0.0005 to 0.001" in capsys.readouterr().err
    capture(tmp_path / "said", **seen, training={"optimizer": {"schedule": "linear"}})
    train(megatron, steps=2, decay=0.5)
    assert "note" not in capsys.readouterr().err
    assert load_bundle(tmp_path / "said").training.optimizer.schedule == "linear"
    megatron.FP32Optimizer = type("DistributedOptimizer", (megatron.FP32Optimizer,), {})
    monkeypatch.setattr("align.capture.job.parallel_sections", lambda *_: ({"world_size": 1, "data": 2}, {"data": 0}))
    running = capture(tmp_path / "other", steps=2)
    train(megatron, steps=1)
    notes = list(running.record.notes)
    assert "no parameter gradients" in notes[0]
    assert "4 names of the trace were never seen" in notes[1] and "self_attention_hyper_connection.proj" in notes[1]
    assert not list(running.record.folder.hidden.glob("trace/param_grads*"))
    running.done = True
    running.record.folder.discard()
    [undo() for undo in reversed(running._undo)]


def test_globs_and_kinds(megatron, tmp_path):
    capture(tmp_path / "job", steps=1, names=("decoder.layers.*", "output_layer.*"), what=("forward", "param_grads"))
    train(megatron, steps=1)
    assert {p.stem for p in (tmp_path / "job/trace").iterdir()} == {"forward", "param_grads", "after_step1"}
    forward = load_file(tmp_path / "job/trace/forward.safetensors")
    assert all(n.startswith("decoder.layers.") for n in forward) and "decoder.layers.0.in" in forward


def test_mistakes_are_one_sentence(megatron, tmp_path):
    for options, says in [
        ({"steps": 1, "trace_steps": (2,)}, "trace_steps names step 2"),
        ({"what": ("weights",)}, "weights"),
    ]:
        with pytest.raises(UserError, match=says):
            capture(tmp_path / "job", **options)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/bundle.json").write_text("{}")
    with pytest.raises(UserError, match="there already"):
        capture(tmp_path / "taken")
    for options, job, says in [
        ({"names": ("nope.*",)}, {}, "nope"),
        ({}, {"wrong_labels": True}, "one token ahead"),
        ({}, {"mask": torch.cat([torch.zeros(2, 1), torch.ones(2, 23)], 1)}, "mask all ones"),
    ]:
        running = capture(tmp_path / "job", **options)
        with pytest.raises(UserError, match=says):
            train(megatron, **job)
        running.finish()
        assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_class_that_is_not_there_is_named(megatron, tmp_path, monkeypatch):
    monkeypatch.delattr(sys.modules["megatron.core.models.gpt.gpt_model"], "GPTModel")
    with pytest.raises(UserError, match="no class GPTModel"):
        capture(tmp_path / "job")
    with pytest.raises(UserError, match="cannot be imported: call it in a Megatron job"):
        find(("megatron_that_is_not_installed.core", "GPTModel"))


def test_bfloat16_is_its_bits():
    assert to_numpy(torch.tensor([1.0, -2.0], dtype=torch.bfloat16)).tolist() == [0x3F80, 0xC000]
    turned = torch.arange(6.0).reshape(2, 3).t()
    assert to_numpy(turned).flags.c_contiguous and to_numpy(turned).tolist() == turned.tolist()


def test_the_kernels_are_recorded_where_align_can(megatron, tmp_path, monkeypatch):
    able = SimpleNamespace(record=lambda module: {"torch": module.__version__})
    for name, module in (("with", able), ("without", None)):
        monkeypatch.setitem(sys.modules, "align.fingerprint", module)
        capture(tmp_path / name, steps=1, what=("forward",))
        train(megatron, steps=1)
    assert load_bundle(tmp_path / "with").source["kernel_fingerprint"] == {"torch": torch.__version__}
    assert "kernel_fingerprint" not in load_bundle(tmp_path / "without").source
