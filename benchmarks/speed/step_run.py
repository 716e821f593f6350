"""Take training steps of one checkout by turns, a block for each line read. Answers ``benchmarks.speed.versions``.

    python step_run.py THREADS

Nothing but the package of the checkout is imported, so that older versions answer too.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_vae as pv
from pyro_vae.networks import MLP

try:
    from pyro_vae.training.captured_step import captured_step
    from pyro_vae.training.step import eager_step
except ImportError:
    # As 0.1.0 names them.
    from pyro_vae.capture import captured_step
    from pyro_vae.svi import eager_step

SIZES = ((400, 20), (2000, 30), (64, 8))
BATCH, PIXELS, BLOCK = 128, 784, 10


def vae(hidden: int, latent: int) -> pv.Pair:
    """Return a Bernoulli VAE with one hidden layer on each side."""
    encoder, decoder = MLP([(PIXELS,)], 2 * latent, (hidden,)), MLP([(latent,)], PIXELS, (hidden,))
    return pv.models.VAE((PIXELS,), pv.StandardNormal(latent), pv.Bernoulli(), encoder=encoder, decoder=decoder)


def rows() -> dict[str, Callable[[], None]]:
    """Return a step of each kind for each size, by name."""
    x = [torch.rand(BATCH, PIXELS).gt(0.7).float() for _ in range(16)]
    steps: dict[str, Callable[[], None]] = {}
    makers: dict[str, Callable[..., Any]] = {
        "captured, compiled": lambda *of: captured_step(*of, compiled=True),
        "captured": captured_step,
        "eager": eager_step,
    }
    for sizes in SIZES:
        torch.manual_seed(0)
        pair = vae(*sizes)
        for name, make in makers.items():
            twin = copy.deepcopy(pair)
            step = make(twin, Trace_ELBO(), torch.optim.Adam(twin.parameters(), lr=1e-3, fused=True))
            steps[f"{'–'.join(map(str, (PIXELS, *sizes)))}, {name}"] = _taker(step, itertools.cycle(x))
    return steps


def _taker(step: Callable[[Tensor], object], feed: Iterator[Tensor]) -> Callable[[], None]:
    def take() -> None:
        step(next(feed))

    return take


def main(threads: int) -> None:
    """Say the rows' names, then answer each name that is read with the seconds of a block of its steps."""
    torch.set_num_threads(threads)
    pyro.enable_validation(False)
    steps = rows()
    for step in steps.values():
        # The first steps record and compile.
        step()
        step()
    print(json.dumps({"package": pv.__file__, "version": pv.__version__, "rows": list(steps)}), flush=True)
    for line in sys.stdin:
        step, seconds = steps[json.loads(line)], []
        # The first one finds the caches full of another row's numbers.
        step()
        for _ in range(BLOCK):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
