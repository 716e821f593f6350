"""NumPyro's step: a whole epoch in one jitted scan, as its own VAE example runs it. Answers ``peers.Peer``."""

from __future__ import annotations

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from jax.example_libraries import stax
from numpyro.infer import SVI, Trace_ELBO

BATCH, PIXELS, HIDDEN, LATENT, STEPS, THREADS = map(int, sys.argv[1:])
SILU = stax.elementwise(jax.nn.silu)


def encoder():
    """Return the network x → (μ, σ before softplus)."""
    return stax.serial(stax.Dense(HIDDEN), SILU, stax.Dense(2 * LATENT))


def model(x):
    """Sample z ~ N(0, I), x ~ Bernoulli(decoder(z))."""
    decode = numpyro.module(
        "decoder", stax.serial(stax.Dense(HIDDEN), SILU, stax.Dense(PIXELS)), input_shape=(len(x), LATENT)
    )
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([LATENT]).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)


def guide(x):
    """Sample z ~ N(μ(x), σ(x))."""
    encode = numpyro.module("encoder", encoder(), input_shape=(len(x), PIXELS))
    loc, raw = jnp.split(encode(x), 2, axis=-1)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(loc, jax.nn.softplus(raw) + 1e-4).to_event(1))


def main() -> None:
    """Take STEPS steps for each line read, and answer with the seconds of one, as JSON."""
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    batches = (random.uniform(random.key(0), (STEPS, BATCH, PIXELS)) > 0.7).astype(jnp.float32)
    state = svi.init(random.key(1), batches[0])

    @jax.jit
    def epoch(state, batches):
        return lax.scan(lambda state, x: svi.update(state, x), state, batches)

    for _ in range(2):
        state, losses = epoch(state, batches)
    print(json.dumps({"version": numpyro.__version__, "jax": jax.__version__}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        state, losses = epoch(state, batches)
        losses.block_until_ready()
        print(json.dumps([(time.perf_counter() - start) / STEPS]), flush=True)


if __name__ == "__main__":
    main()
