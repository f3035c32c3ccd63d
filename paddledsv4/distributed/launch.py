"""What the launcher told this process: its rank, how many there are, where they meet."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from paddledsv4.errors import UserError


@dataclass(frozen=True)
class Launch:
    """Rank ``rank`` of ``world_size`` processes that meet at ``host``:``port``."""

    rank: int = 0
    world_size: int = 1
    host: str = "127.0.0.1"
    port: int = 0

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Launch:
        """Read what ``python -m paddle.distributed.launch`` sets; a process without it is alone.

        The ranks meet at the endpoint of rank 0, a port that the launcher found free and that nobody else uses.

        Raises:
            UserError: the variables contradict each other or are malformed.
        """
        if "PADDLE_TRAINERS_NUM" not in environ:
            return cls()
        try:
            rank, world = int(environ["PADDLE_TRAINER_ID"]), int(environ["PADDLE_TRAINERS_NUM"])
            host, _, port = environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")[0].rpartition(":")
            launch = cls(rank, world, host or "127.0.0.1", int(port or 0))
        except (KeyError, ValueError):
            raise UserError(
                "PADDLE_TRAINER_ID, PADDLE_TRAINERS_NUM or PADDLE_TRAINER_ENDPOINTS is missing or malformed; start "
                "the ranks with python -m paddle.distributed.launch"
            ) from None
        if not 0 <= rank < world or (world > 1 and not launch.port):
            raise UserError(
                f"PADDLE_TRAINER_ID = {rank} of PADDLE_TRAINERS_NUM = {world} at {launch.host}:{launch.port}: start "
                "the ranks with python -m paddle.distributed.launch"
            )
        return launch
