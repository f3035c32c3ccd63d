"""Every metric against a value computed by hand, and what a wrong formula would give."""

import numpy as np
import paddle
import pytest
from checkpoints import small

from paddledsv4.observe.metrics import memory
from paddledsv4.observe.metrics.collect import Collector
from paddledsv4.observe.metrics.gauge import layer_of
from paddledsv4.observe.metrics.memory import host_memory
from paddledsv4.observe.metrics.mixing import sum_errors
from paddledsv4.observe.metrics.routing import RouterLoad, spread
from paddledsv4.observe.metrics.shares import attention_weights, recall, sampled_rows


def collected(runner, steps: int = 1, every: int = 1) -> dict[str, float]:
    collector = Collector(runner, every)
    runner.observers.append(collector)
    list(runner.train(steps))
    return collector.values


def test_spread_of_tokens():
    uneven = spread(np.array([4, 0, 2, 2]))
    assert uneven["max_over_mean"] == 2 and uneven["empty_share"] == 0.25
    assert uneven["entropy"] == pytest.approx(0.75)  # of 1/2, 1/4, 1/4: 1.5 ln 2, over ln 4
    assert spread(np.full(8, 3)) == {"max_over_mean": 1, "empty_share": 0, "entropy": pytest.approx(1)}
    assert spread(np.array([0, 5])) == {"max_over_mean": 2, "empty_share": 0.5, "entropy": 0}


def test_router_load_counts_every_microbatch_and_every_router():
    runner = small(gradient_accumulation_steps=3)
    collector = Collector(runner, 1)
    runner.observers.append(collector)
    next(runner.train(1))
    [load] = [gauge for gauge in collector.gauges if isinstance(gauge, RouterLoad)]
    config, train = runner.model.config, runner.train_config
    assignments = 3 * train.micro_batch_size * train.sequence_length * config.num_experts_per_tok
    assert len(load.counts) == 3 and all(counts.sum() == assignments for counts in load.counts.values())
    bias = next(router.expert_bias.numpy() for router in runner.model.learned_routers())
    here = next(load.counts[path] for path in load.counts if path.startswith("decoder.layers.1."))
    np.testing.assert_array_equal(np.sign(bias), np.sign(here.mean() - here))  # what the model itself counted
    rate = train.expert_bias_update_rate
    assert collector.values["expert_bias/max/decoder.layers.1"] == pytest.approx(rate)
    assert collector.values["expert_bias/min/decoder.layers.1"] == pytest.approx(-rate)
    assert collector.values["expert_bias/mean/decoder.layers.1"] == pytest.approx(float(bias.mean()))
    assert "expert_bias/mean/decoder.layers.0" not in collector.values  # routes by hash


def test_sum_errors_tell_rows_from_columns():
    h = paddle.to_tensor([[[0.5, 0.5], [0.4, 0.6]], [[1.0, 0.0], [0.0, 1.0]]])
    np.testing.assert_allclose(sum_errors(h), [0, 0.1], atol=1e-7)
    np.testing.assert_allclose(sum_errors(h.transpose([0, 2, 1])), [0.1, 0], atol=1e-7)
    assert np.isnan(sum_errors(h * float("nan"))).all()


def test_mixing_error_falls_with_the_iterations():
    few, many = (collected(small(hc_sinkhorn_iters=n, hc_eps=1e-12)) for n in (1, 20))
    for layer in ("decoder.layers.0", "decoder.layers.1", "mtp.layers.0"):
        # it ends on columns: only rows are left over
        assert few[f"mhc/column_sum_error/{layer}"] < 1e-6 < 1e-5 < few[f"mhc/row_sum_error/{layer}"]
        assert many[f"mhc/row_sum_error/{layer}"] < few[f"mhc/row_sum_error/{layer}"] / 10


def attention_inputs(seed: int = 0, n: int = 10, sink: float = 0.0):
    """query [8, 2, 3, 4] of the last positions of 10, kv, compressed [5, 2, 4], at ratio 2."""
    rng = np.random.default_rng(seed)
    shapes = ((8, 2, 3, 4), (n, 2, 4), (5, 2, 4))
    query, kv, compressed = (rng.normal(size=shape) for shape in shapes)
    selected = np.array([[[0, -1], [1, 0], [0, 1], [2, 0], [2, 1], [3, 1], [0, 3], [4, 2]]] * 2, np.int32)
    return query, kv, compressed, selected, np.full(3, sink) + np.arange(3)


def weights_by_loops(query, kv, compressed, selected, sink, window, ratio, scale, offset):
    """The definition, query by query: sink's weights [s, b, H], dense mass and choice [s, b, g]."""
    s, b, heads, _ = query.shape
    compressed = np.zeros((0, b, 4)) if compressed is None else compressed
    share, mass, chosen = np.zeros((s, b, heads)), np.zeros((s, b, len(compressed))), np.zeros((s, b, len(compressed)))
    for r, i, h in np.ndindex(s, b, heads):
        last = len(kv) - s + r
        near = [np.exp(query[r, i, h] @ kv[k, i] * scale) for k in range(max(last - window + 1, 0), last + 1)]
        complete = min((r + offset + 1) // ratio, len(compressed))
        far = [np.exp(query[r, i, h] @ compressed[c, i] * scale) for c in range(complete)]
        rest = np.exp(sink[h])
        picked = range(len(far)) if selected is None else [c for c in selected[i, r] if c >= 0]
        share[r, i, h] = rest / (rest + sum(near) + sum(far[c] for c in picked))
        mass[r, i, : len(far)] += np.array(far) / (rest + sum(near) + sum(far))
        chosen[r, i, list(picked)] = 1
    return share, mass, chosen


@pytest.mark.parametrize("kind", ["window", "compressed", "selected"])
def test_attention_weights_are_those_of_the_definition(kind):
    query, kv, compressed, selected, sink = attention_inputs()
    compressed, selected = (None if kind == "window" else compressed), (selected if kind == "selected" else None)
    tensors = [None if x is None else paddle.to_tensor(x) for x in (query, kv, compressed, selected, sink)]
    rows = np.array([0, 3, 4, 7])
    share, mass, chosen = attention_weights(*tensors, 3, 2, 0.5, 2, rows)
    by_hand = weights_by_loops(query, kv, compressed, selected, sink, 3, 2, 0.5, 2)
    np.testing.assert_allclose(share.numpy(), by_hand[0][rows], rtol=1e-12)
    assert (mass is None) == (chosen is None) == (kind != "selected")
    if mass is not None:
        np.testing.assert_allclose(mass.numpy(), by_hand[1][rows], rtol=1e-12, atol=1e-15)
        np.testing.assert_array_equal(chosen.numpy(), by_hand[2][rows])
    inside = weights_by_loops(query, kv, compressed, selected, sink, 4, 2, 0.5, 2)
    assert not np.allclose(share.numpy(), inside[0][rows])  # a window of one key more would be seen


def test_the_sink_takes_one_share_among_equals():
    """Queries of zeros: every key, and a sink of 0, has the same weight; one of ln 3 weighs three times as much."""
    _, kv, compressed, selected, _ = attention_inputs(n=8)
    query, sink = paddle.zeros([8, 2, 1, 4], "float64"), paddle.zeros([1], "float64")
    tensors = [paddle.to_tensor(x) for x in (kv, compressed, selected)]
    keys = np.array([1, 2, 3, 3, 3, 3, 3, 3]) + (selected[0] >= 0).sum(1)  # a window of 3, and what is selected
    for logit, weight in ((0.0, 1), (np.log(3), 3)):
        share, *_ = attention_weights(query, *tensors, sink + logit, 3, 2, 0.5, 0, np.arange(8))
        np.testing.assert_allclose(share.numpy()[:, 0, 0], weight / (weight + keys))


def test_recall_of_entries_and_of_weight():
    mass = paddle.to_tensor([[[0.1, 0.4, 0.3, 0.0]], [[0.2, 0.1, 0.4, 0.3]]])
    chosen = paddle.to_tensor([[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 1.0]]])
    rows = np.array([6, 7])
    # at ratio 2, positions 6 and 7 have 3 and 4 complete entries; best are 1 2 and 2 3, chosen 0 1 and 2 3
    np.testing.assert_allclose(recall(mass, chosen, rows, 2, 0, 2), [0.5 + 1, 0.5 / 0.7 + 1, 2], rtol=1e-6)
    np.testing.assert_allclose(recall(mass, chosen, rows, 2, 0, 3)[2], 1)  # only the second has a choice then
    np.testing.assert_array_equal(recall(mass, chosen, rows, 2, 0, 4), [0, 0, 0])


def test_recall_of_the_best_choice_is_one_and_of_the_worst_least():
    query, kv, compressed, _, sink = attention_inputs()
    _, mass, _ = weights_by_loops(query, kv, compressed, None, sink, 3, 2, 0.5, 2)
    rows, found = np.array([3, 5, 6, 7]), {}
    for name, sign in (("best", -1), ("worst", 1)):
        order = np.argsort(np.where(mass > 0, sign * mass, np.inf), -1)[..., :2]
        selected = np.where(np.take_along_axis(mass, order, -1) > 0, order, -1).transpose(1, 0, 2).astype(np.int32)
        tensors = map(paddle.to_tensor, (query, kv, compressed, selected, sink))
        _, dense, chosen = attention_weights(*tensors, 3, 2, 0.5, 2, rows)
        found[name] = recall(dense, chosen, rows, 2, 2, 2)
    np.testing.assert_allclose(found["best"], [8, 8, 8])  # 4 queries of 2 sequences
    assert (found["worst"] < 5).tolist() == [True, True, False]


def test_indexer_loss_is_told_without_its_coefficient():
    one, two = (collected(small(indexer_loss_coeff=c)) for c in (0.01, 0.5))
    assert one["indexer/loss/decoder.layers.1"] == pytest.approx(two["indexer/loss/decoder.layers.1"], rel=1e-5)
    assert one["indexer/loss/decoder.layers.1"] > 0
    assert not any(tag.startswith("indexer/loss") for tag in collected(small(indexer_loss_coeff=0.0)))


def test_a_sample_of_queries_is_spread_and_always_the_same():
    np.testing.assert_array_equal(sampled_rows(5), np.arange(5))
    rows = sampled_rows(1000)
    assert len(set(rows)) == 64 and (np.diff(rows) > 0).all() and rows[0] < 100 and rows[-1] > 900
    np.testing.assert_array_equal(rows, sampled_rows(1000))


def test_host_memory_is_what_the_system_says(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t  307200 kB\nVmRSS:\t  204800 kB\nThreads:\t2\n")
    monkeypatch.setattr(memory, "STATUS", status)
    assert host_memory() == (200, 300)
    monkeypatch.setattr(memory, "STATUS", tmp_path / "nowhere")
    now, peak = host_memory()
    assert np.isnan(now) and peak > 50
    monkeypatch.undo()
    assert 50 < host_memory()[0] <= host_memory()[1]


def test_layers_of_paths():
    assert layer_of("mtp.layers.0.mtp_model_layer.mlp.router") == "mtp.layers.0"
    assert layer_of("decoder.layers.2.mlp_hyper_connection") == "decoder.layers.2"
    assert layer_of("decoder.layers.2.self_attention.core_attention") == "decoder.layers.2"
