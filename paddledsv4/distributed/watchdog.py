"""Nobody waits for ever: a rank that fails says why to the others, and a wait that is too long ends the process."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from paddledsv4.distributed.launch import Launch

PATIENCE = 5  # seconds beyond the backend's own limit, and between another rank's failure and the end of a wait
FAILURE = "failure"  # the key in the store under which the first rank that fails leaves its message


class Watchdog:
    """Watches the collectives of this process from a thread of its own.

    The backend's own time limit ends most waits with an exception. This ends the rest: when a wait exceeds
    ``timeout`` + PATIENCE seconds, or when another rank has left a failure, the process prints one line and exits.

    Args:
        store: the ranks' common key-value store.
        connect: makes another client of the store, for the thread.
    """

    def __init__(self, launch: Launch, timeout: int, store, connect: Callable):
        self.launch, self.timeout, self.store = launch, timeout, store
        self._wait: tuple[str, float] | None = None
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, args=(connect,), daemon=True, name="watchdog").start()

    @contextlib.contextmanager
    def waiting(self, operation: str) -> Iterator[None]:
        """The block waits for other ranks."""
        self._wait = (operation, time.monotonic())
        try:
            yield
        finally:
            self._wait = None

    def fail(self, message: str) -> None:
        """Tell the other ranks why this one stops; the first message stays."""
        with contextlib.suppress(RuntimeError):
            if not self.store.check([FAILURE]):
                own = f"rank {self.launch.rank}: "
                self.store.set(FAILURE, own + message.removeprefix(own))
            if self.launch.rank == 0:
                time.sleep(2)  # the store lives in this process: let the others read first

    def failure(self) -> str | None:
        """What another rank left, if the store still answers."""
        with contextlib.suppress(RuntimeError):
            if self.store.check([FAILURE]):
                return self.store.get(FAILURE).decode()
        return None

    def explain(self, operation: str, seconds: float, error: Exception) -> str:
        """One sentence about a collective that failed after so many seconds."""
        time.sleep(0.5)  # a rank that fails by itself needs a moment to say so
        said = self.failure()
        if said:
            return f"rank {self.launch.rank}: stopped because another rank did: {said}"
        late = seconds >= self.timeout - 1
        what = f"waited {seconds:.0f} s in vain: a rank hangs or is out of step" if late else "lost a rank: it died"
        return f"rank {self.launch.rank}: {operation} {what}; see the logs of the other ranks"

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def _watch(self, connect: Callable) -> None:
        store = None
        while not self._stopped.wait(1.0):
            wait = self._wait
            if wait is None:
                continue
            operation, since = wait
            seconds = time.monotonic() - since
            if seconds > self.timeout + PATIENCE:
                self._end(f"{operation} took more than {seconds:.0f} s; see the logs of the other ranks")
            if seconds < PATIENCE:
                continue
            with contextlib.suppress(RuntimeError):
                store = store or connect()
                if store.check([FAILURE]):
                    self._end(f"stopped because another rank did: {store.get(FAILURE).decode()}")

    def _end(self, message: str) -> None:
        print(f"error: rank {self.launch.rank}: {message}", file=sys.stderr, flush=True)
        os._exit(2)
