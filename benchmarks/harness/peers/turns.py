"""Take a turn whenever another process asks for one, and answer with its seconds: see ``launch.Peer``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO


def turns(said: dict[str, Any], started: float | None = None, answers: TextIO = sys.stdout) -> Iterator[None]:
    """Yield once for each turn that is asked for, and answer with the seconds until the next is wanted.

    Args:
        said: what to answer first, when the script is ready.
        started: when its first turn began, which ends as the iteration begins.
        answers: where to write.
    """
    first = {} if started is None else {"first_seconds": round(time.perf_counter() - started, 2)}
    print(json.dumps(said | first), file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        yield
        print(json.dumps([time.perf_counter() - start]), file=answers, flush=True)
