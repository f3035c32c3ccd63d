"""Write nan_trap_cases.safetensors from ../shared/cases: attention, rotation and rounding, without the long tables.

    python tests/data/make_nan_trap_cases.py
"""

from pathlib import Path

from safetensors import safe_open
from safetensors.paddle import save_file

HERE = Path(__file__).resolve().parent
CASES = HERE.parents[2] / "shared" / "cases"
KEPT = ("fp32.", "bf16.", "rope.x", "rope.y", "kvqat.", "idxqat.")

if __name__ == "__main__":
    with safe_open(CASES / "nan_traps_golden.safetensors", "paddle") as file:
        kept = {key: file.get_tensor(key) for key in file.keys() if key.startswith(KEPT)}
        rows = kept["rope.x"].shape[1]
        kept["rope.freqs"] = file.get_tensor("rope.compress.freqs")[:rows].contiguous()
    save_file(kept, HERE / "nan_trap_cases.safetensors")
