"""NumPyro's steps: all of a turn in one jitted scan, over batches that lie ready. Answers ``launch.Peer``."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from jax.example_libraries import stax
from numpyro.infer import SVI, Trace_ELBO

from benchmarks.harness.peers.turns import turns

BATCH, PIXELS, HIDDEN, LATENT, DATA, THREADS = map(int, sys.argv[1:])
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


def data():
    """Return binary data of the size asked for."""
    return (random.uniform(random.key(0), (DATA, PIXELS)) > 0.7).astype(jnp.float32)


def said():
    """Return what ran."""
    return {"version": numpyro.__version__, "jax": jax.__version__, "device": DEVICES[jax.default_backend()]}


# JAX calls CUDA devices GPUs.
DEVICES = {"cpu": "cpu", "gpu": "cuda"}


def main() -> None:
    """Take DATA / BATCH steps for each line read, and answer with their seconds, as JSON."""
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    batches = data().reshape(-1, BATCH, PIXELS)
    state = svi.init(random.key(1), batches[0])

    @jax.jit
    def steps(state, batches):
        return lax.scan(svi.update, state, batches)

    for _ in range(2):
        state, losses = steps(state, batches)
    for _ in turns(said()):
        state, losses = steps(state, batches)
        losses.block_until_ready()


if __name__ == "__main__":
    main()
