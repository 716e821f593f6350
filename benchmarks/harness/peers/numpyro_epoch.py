"""Run epochs as NumPyro's VAE example does: one jitted scan, in a new order, without the short last batch.

Answers ``launch.Peer``.
"""

from __future__ import annotations

import jax
import numpyro
from jax import lax, random
from numpyro.infer import SVI, Trace_ELBO

from benchmarks.harness.peers.numpyro_step import BATCH, DATA, data, guide, model, said
from benchmarks.harness.peers.turns import turns


def main() -> None:
    """Take an epoch for each line read, and answer with its seconds, as JSON."""
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    x, steps = data(), DATA // BATCH
    state = svi.init(random.key(1), x[:BATCH])

    @jax.jit
    def epoch(state, x, key):
        rows = random.permutation(key, len(x))[: steps * BATCH].reshape(steps, BATCH)
        return lax.scan(lambda state, part: svi.update(state, x[part]), state, rows)

    key = random.key(2)
    for _ in range(2):
        state, losses = epoch(state, x, key)
    for _ in turns(said()):
        key, part_key = random.split(key)
        state, losses = epoch(state, x, part_key)
        losses.block_until_ready()


if __name__ == "__main__":
    main()
