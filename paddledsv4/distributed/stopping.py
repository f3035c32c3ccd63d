"""SIGTERM and SIGINT: finish the step, save, end well. A second signal ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import paddle

from paddledsv4.distributed.group import Group

SIGNALS = (signal.SIGTERM, signal.SIGINT)
BURST = 1.5  # seconds in which several SIGTERM are one request: Paddle's launcher sends three within 0.6 s


class StopRequest:
    """Whether somebody asked this process to stop; see :func:`stop_signals`.

    Attributes:
        name: the first signal's name; None as long as there was none.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0

    def agreed(self, world: Group) -> bool:
        """Whether any rank was asked to. All ranks call this between the same two steps and get one answer."""
        return bool(world.all_reduce_(paddle.to_tensor([int(self.name is not None)]), "max").item())

    def receive(self, number: int) -> None:
        """A signal has come."""
        name = signal.Signals(number).name
        if self.name is None:
            self.name, self._since = name, time.monotonic()
            _say(f"{name}: stopping after this step; a second signal stops at once")
        elif number == signal.SIGINT or time.monotonic() - self._since > BURST:
            _say(f"{name} again: stopped at once; the last complete checkpoint is whole")
            os._exit(128 + number)


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """For the length of a ``with`` block, signals ask to stop instead of killing or raising.

    Python runs handlers between two of its instructions, and a collective or a kernel may take minutes; so a thread
    listens to the descriptor that the interpreter writes every signal to, at once. Outside of the main thread no
    handler can be installed, and nothing is.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(readable, request), daemon=True, name="signals")
    listener.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(writable)  # ends the thread
        listener.join()


def _listen(readable: int, request: StopRequest) -> None:
    with os.fdopen(readable, "rb", buffering=0) as pipe:
        while numbers := pipe.read(64):
            for number in numbers:
                if number in SIGNALS:
                    request.receive(number)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody may be reading any more
        sys.stderr.write(f"{text}\n")  # one call, so that no other thread's words get between
        sys.stderr.flush()
