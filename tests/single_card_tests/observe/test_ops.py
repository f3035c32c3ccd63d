"""Watching ops: every call is told, no bit changes, and nothing stays behind."""

from collections import Counter

import pytest
from checkpoints import numbers, small, state_bytes

from paddledsv4.observe.ops import OpObserver, tensors_in, watch_ops
from paddledsv4.observe.steps import StepObserver


class Seen(OpObserver):
    def __init__(self):
        self.calls, self.began = [], 0

    def before(self, call):
        self.began += 1

    def after(self, call, outputs):
        assert self.began == len(self.calls) + 1
        self.calls.append((call.path, call.op, len(outputs)))


def tables(model) -> list[dict]:
    return [dict(vars(layer.ops)) for layer in [model, *model.sublayers()] if hasattr(layer, "ops")]


@pytest.mark.parametrize("preset", ["paddle", "megatron"])
def test_no_bit_changes_and_nothing_stays(preset):
    plain, watched = small(preset), small(preset)
    before, seen = tables(watched.model), Seen()
    expected = numbers(plain.train(2))
    with watch_ops(watched.model, seen):
        assert numbers(watched.train(2)) == expected
    assert state_bytes(watched) == state_bytes(plain)
    assert tables(watched.model) == before
    calls = Counter(seen.calls)
    assert calls["decoder.layers.1.self_attention.core_attention", "sparse_attention", 1] == 2
    assert calls["decoder.layers.0.self_attention_hyper_connection", "hc_gates", 3] == 2
    assert calls["", "adamw", 0] == 2 * len(watched.optimizer.states)


def test_ops_and_layers_are_chosen():
    runner, seen = small(), Seen()
    with watch_ops(runner.model, seen, {"rms_norm", "rope"}, "decoder.layers.1.self_attention.*"):
        next(runner.train(1))
    assert {op for _, op, _ in seen.calls} == {"rms_norm", "rope"}
    assert all(path.startswith("decoder.layers.1.self_attention") for path, *_ in seen.calls)
    assert ("decoder.layers.1.self_attention", "rope", 1) in seen.calls


def test_two_watchers_may_leave_in_any_order():
    runner, first, second = small(), Seen(), Seen()
    before, steps = tables(runner.model), runner.train(3)
    one, two = watch_ops(runner.model, first, {"sinkhorn"}), watch_ops(runner.model, second, {"sinkhorn"})
    one.__enter__()
    next(steps)
    two.__enter__()
    next(steps)
    one.__exit__(None, None, None)
    next(steps)
    two.__exit__(None, None, None)
    a_step = len(first.calls) // 2
    assert len(first.calls) == len(second.calls) == 2 * a_step > 0
    assert tables(runner.model) == before


def test_an_op_that_fails_leaves_nothing_behind():
    class Refusing(OpObserver):
        def before(self, call):
            raise KeyboardInterrupt

    runner = small()
    before = tables(runner.model)
    with pytest.raises(KeyboardInterrupt), watch_ops(runner.model, Refusing()):
        next(runner.train(1))
    assert tables(runner.model) == before


def test_tensors_in_opens_lists_and_mappings():
    import paddle

    a, b, c = (paddle.ones([i]) for i in (1, 2, 3))
    assert [t.shape for t in tensors_in((a, [1, (b,)], {"x": c, "y": None}))] == [[1], [2], [3]]


def test_steps_are_told():
    class Told(StepObserver):
        def __init__(self):
            self.events = []

        def begin_step(self, step):
            self.events.append(("begin", step))

        def begin_microbatch(self, index):
            self.events.append(("microbatch", index))

        def end_step(self, result):
            self.events.append(("end", result.step))

    runner, told = small(gradient_accumulation_steps=2), Told()
    runner.observers.append(told)
    for result in runner.train(2):
        assert told.events[-1] == ("end", result.step)
    one = [("microbatch", 0), ("microbatch", 1)]
    assert told.events == [("begin", 1), *one, ("end", 1), ("begin", 2), *one, ("end", 2)]
