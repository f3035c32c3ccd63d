"""Write tiny_fp32_samples.safetensors from ../shared: up to 256 elements of every recorded tensor.

    python tests/data/make_samples.py
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "single_card_tests"))

from reference import FULL_TRACE, SAMPLES, sample_positions

if __name__ == "__main__":
    samples = {}
    for kind in ("forward", "activation_grads", "param_grads"):
        for name, tensor in load_file(FULL_TRACE / f"{kind}.safetensors").items():
            samples[f"{kind}/{name}"] = np.ascontiguousarray(tensor.reshape(-1)[sample_positions(name, tensor.size)])
    save_file(samples, SAMPLES)
    print(f"{SAMPLES}: {len(samples)} tensors, {SAMPLES.stat().st_size / 1e3:.0f} kB")
