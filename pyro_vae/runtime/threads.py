"""One call at a time: Pyro's handlers, torch's generators and the modes of modules belong to the whole process."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["one_at_a_time"]

P = ParamSpec("P")
R = TypeVar("R")


class _Turn:
    """A lock of the process; a thread that holds it may take it again.

    >>> with TURN, TURN:
    ...     pass
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin with a free lock: in a forked process the thread that held it does not exist."""
        self.lock = threading.RLock()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


TURN = _Turn()


def _after_fork() -> None:
    # A process forked inside a call goes on inside it and releases the lock once more: it keeps what it holds.
    if not _held_here():
        TURN.renew()


def _held_here() -> bool:
    held: bool = TURN.lock._is_owned()  # type: ignore[attr-defined]
    return held


os.register_at_fork(after_in_child=_after_fork)


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Let calls from several threads wait for each other; nested calls of one thread do not wait.

    Pyro's stack of handlers, torch's generators and modules' training flags are shared by all threads. Calls that wait
    return the bits of calls in sequence. A call must not wait for another thread that makes such a call: both would
    wait for ever.

    >>> @one_at_a_time
    ... def double(x): return 2 * x
    >>> double(3)
    6
    """

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with TURN:
            return function(*args, **kwargs)

    return alone
