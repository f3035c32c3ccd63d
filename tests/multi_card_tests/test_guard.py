"""One rank of two gets a NaN: both stop at that step with the same sentence, and the step before stays."""

import pytest
from ranks import run_ranks

from paddledsv4.numerics.policy import installed
from paddledsv4.observe.reproduction import read

AT = "decoder.layers.0.self_attention.core_attention: sparse_attention"
FULL = {
    "experts": f"experts rank 1: step 3, microbatch 1: {AT} gave out",
    "tensor": f"tensor rank 1: step 3, microbatch 1: backward of {AT} gave the gradient of query",
}


@pytest.mark.skipif(not installed("torch"), reason="gloo needs paddledsv4[torch]")
def test_both_stop_before_the_step(tmp_path):
    ended = run_ranks(2, tmp_path, script="guard_jobs.py", limit=300)
    assert all(rank.code == 2 and "Traceback" not in rank.errors for rank in ended), ended
    assert ended[0].output == ended[1].output  # word for word
    for said, (name, expected) in zip(ended[0].output.splitlines(), FULL.items(), strict=True):
        assert said.startswith(expected), said
        (file,) = (tmp_path / name).glob("nonfinite-*")
        assert said.endswith(f"see align repro {file}") and file.name == "nonfinite-step3-rank1.safetensors"
        assert read(file).origin.rank == 1
    (error,) = {line for rank in ended for line in rank.errors.splitlines() if line.startswith("error: ")}
    assert error.startswith("error: step 3, microbatch 1, rank 1: the main loss is nan"), error
    for name in ("experts", "tensor", "losses"):
        saved = tmp_path / name / "saved"
        assert sorted(p.name for p in saved.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
