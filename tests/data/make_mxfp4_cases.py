"""Write mxfp4_cases.safetensors from ../shared/cases: the grouped GEMMs, and one of the four adapter cases.

    python tests/data/make_mxfp4_cases.py
"""

from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
CASES = HERE.parents[2] / "shared" / "cases"
KEPT = {"mxfp4_golden": ("gmm_fp32.",),
        "mxfp4_lora_golden": ("fp32.limit10.",)}  # fmt: skip

if __name__ == "__main__":
    kept = {}
    for name, beginnings in KEPT.items():
        with safe_open(CASES / f"{name}.safetensors", "np") as file:
            kept |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(beginnings)}
    save_file(kept, HERE / "mxfp4_cases.safetensors")
