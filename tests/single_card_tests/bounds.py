"""How far a tensor of ours may be from the recorded one.

Forward 1e-5, gradients 1e-4 in relative L2. A few gradients are sums that cancel almost completely (gates
whose scale the next norm removes: their true gradient is almost or exactly zero); there the reference itself is
further than that from the float64 result. For those, and only those, the bound is ten times the noise of float32
arithmetic, measured: the larger of the reference's and of our plain variants' distance from float64, over the tensors
of the same name in all layers. Ten, because most of them are scalars and two samples measure their noise badly: at
three times, a sound run fails one of the 26 every second time.
"""

import re

import numpy as np
from reference import errors

FORWARD_BOUND, GRADIENT_BOUND = 1e-5, 1e-4
GRADIENTS = {"activation_grads": "gradients", "param_grads": "parameter_gradients"}


def report(kind: str, rows: dict[str, float]) -> str:
    worst = sorted(rows.items(), key=lambda row: -row[1])
    return f"{kind}: {len(rows)} tensors\n" + "\n".join(f"  {error:.1e} {name}" for name, error in worst)


def kind_of(name: str) -> str:
    """The name without its layer: tensors of one kind in all layers share their noise."""
    return re.sub(r"^(decoder|mtp)\.(layers\.\d+\.)?(mtp_model_layer\.)?(self_attention|mlp)?_?", "", name)


def gradient_bounds(reference, exact_tensors, plain_tensors) -> dict[str, float]:
    """name -> relative bound. ``exact_tensors`` are ours in float64, ``plain_tensors`` a second float32 rounding."""
    own_error, noise, cancelling = errors(reference, exact_tensors), {}, set()
    sizes = {name: np.linalg.norm(tensor.astype(np.float64)) for name, tensor in reference.items()}
    for name, error in own_error.items():
        kind = kind_of(name)
        ours, exact = plain_tensors[name.removesuffix("@b0")], exact_tensors[name.removesuffix("@b0")]
        noise[kind] = max(noise.get(kind, 0.0), error * sizes[name], float(np.linalg.norm(ours - exact)))
        if error > GRADIENT_BOUND / 3:
            cancelling.add(kind)
    return {
        name: max(GRADIENT_BOUND, 10 * noise[kind_of(name)] / sizes[name])
        if kind_of(name) in cancelling
        else GRADIENT_BOUND
        for name in own_error
    }


def failures(rows: dict[str, float], bounds: dict[str, float]) -> list[str]:
    return [f"{name}: {error:.2e} > {bounds[name]:.2e}" for name, error in rows.items() if not error <= bounds[name]]
