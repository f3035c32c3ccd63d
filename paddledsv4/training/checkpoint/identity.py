"""Which run a checkpoint belongs to: what must agree before training goes on, and what a layout may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from paddledsv4.config import ParallelConfig, TrainConfig

if TYPE_CHECKING:
    from paddledsv4.training.trainer import Trainer

KINDS = ("data", "expert", "tensor", "context", "pipeline", "expert_tensor_size", "sequence_parallel")


def identity(trainer: Trainer) -> dict[str, Any]:
    """What decides the numbers of the run, on any layout.

    The number of steps is left out where the learning rate does not depend on it, so that a run can be made longer.
    """
    training = trainer.train_config.model_dump(mode="json")
    training["precision"] = trainer.precision
    microbatches = training.pop("gradient_accumulation_steps") * trainer.parallel.data
    if trainer.train_config.optimizer.schedule == "constant":
        del training["steps"]
    adapted = {"lora": trainer.lora.model_dump(mode="json") | {"base": trainer.base_md5}} if trainer.lora else {}
    return adapted | {
        "model": trainer.model.config.model_dump(mode="json"),
        "training": training,
        "gradient_accumulation_steps x data": microbatches,
        "numerics": {"fingerprint": trainer.policy.fingerprint} | trainer.policy.describe(),
        "data": {"tokens": trainer.source.fingerprint},
    }


def differences(saved: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Each field that differs as "field: saved there, ... here"."""
    for name in dict.fromkeys([*saved, *here]):
        there, mine = (values.get(name, "nothing") for values in (saved, here))
        if isinstance(there, Mapping) and isinstance(mine, Mapping):
            yield from differences(there, mine, f"{prefix}{name}.")
        elif there != mine:
            yield f"{prefix}{name} ({_short(there)} saved, {_short(mine)} here)"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def layout(parallel: ParallelConfig, train: TrainConfig) -> dict[str, int]:
    """What the order of sums over the global batch depends on."""
    return {kind: getattr(parallel, kind) for kind in KINDS} | {"accumulation": train.gradient_accumulation_steps}


def other_arithmetic(saved: Mapping[str, int], here: Mapping[str, int], train: TrainConfig) -> str | None:
    """Why a run does not continue bit for bit on another layout; None where it does.

    A sum of two microbatches has no order, whether ranks or accumulation steps hold them, and the factors are powers
    of two. Three terms have one; experts see the rows of all ranks in one matrix product.
    """
    fixed = [kind for kind in KINDS if kind != "data" and saved[kind] != here[kind]]
    if fixed:
        return f"{fixed[0]} {saved[fixed[0]]} and {here[fixed[0]]} add in different orders"
    if saved["data"] == here["data"]:
        return None
    if max(saved["data"] * saved["accumulation"], here["data"] * here["accumulation"]) > 2:
        return "more than two microbatches are added in another order"
    if any(saved[kind] > 1 for kind in KINDS if kind != "data"):
        return "only data parallelism alone adds as accumulation does"
    if train.indexer_loss_coeff and train.indexer_loss_scale == "megatron":
        return "training.indexer_loss_scale = megatron weighs the indexer's loss by the layout"
    return None
