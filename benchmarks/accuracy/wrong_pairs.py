"""Wrong variants of one pair, each by the few lines that make it wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn import functional as F

import pyro_vae as pv

__all__ = ["RIGHT", "WRONG", "Right", "data"]

SIZE, LATENTS = 4, 3
WRONG: dict[str, Callable[[], pv.Pair]] = {}
RIGHT: dict[str, Callable[[], pv.Pair]] = {}


def data(count: int = 24) -> Tensor:
    """Return data of the pairs' shape."""
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(0))


def wrong(cls: type[pv.Pair]) -> type[pv.Pair]:
    """List a pair under the first line of its docstring."""
    WRONG[str(cls.__doc__).splitlines()[0].rstrip(".")] = cls
    return cls


def right(cls: type[pv.Pair]) -> type[pv.Pair]:
    """List a pair that only looks wrong."""
    RIGHT[str(cls.__doc__).splitlines()[0].rstrip(".")] = cls
    return cls


@right
class Right(pv.Pair):
    """A Gaussian VAE of four numbers and three latents."""

    x_shape = (SIZE,)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc, self.dec = nn.Linear(SIZE, 2 * LATENTS), nn.Linear(LATENTS, SIZE)

    def decode(self, z: Tensor) -> Tensor:
        return self.dec(z)

    def encode(self, x: Tensor) -> Tensor:
        return self.enc(x)

    def prior(self, x: Tensor) -> Any:
        return dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1)

    def likelihood(self, z: Tensor, x: Tensor) -> Any:
        return dist.Normal(self.decode(z), 0.5).to_event(1)

    def posterior(self, x: Tensor) -> Any:
        loc, raw = self.encode(x).chunk(2, -1)
        return dist.Normal(loc, F.softplus(raw) + 0.1).to_event(1)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", self.likelihood(z, x), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))


class WithLayer(Right):
    """Hold one more layer, ``self.layer``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = self.make()

    def make(self) -> nn.Module:
        raise NotImplementedError


# One program, two shapes: right for (B, …), another thing or an error for (K, B, …).


def decoder(name: str, decode: Callable[[Right, Tensor], Tensor]) -> None:
    """List a pair with another decoder."""
    WRONG[name] = type("Decoder", (Right,), {"decode": decode})


def layered(name: str, make: Callable[[], nn.Module], decode: Callable[[Any, Tensor], Tensor]) -> None:
    """List a pair whose decoder has one more layer."""
    WRONG[name] = type("Layered", (WithLayer,), {"make": lambda self: make(), "decode": decode})


decoder("softmax over dim 1", lambda self, z: F.softmax(self.dec(z), 1))
decoder("softmax without a dim of its own, over dim 0", lambda self, z: F.softmax(self.dec(z), 0))
decoder("F.normalize, whose dim is 1", lambda self, z: self.dec(F.normalize(z)))
decoder("a cumulative sum over dim 1", lambda self, z: self.dec(z.cumsum(1)))
decoder("latents less their mean over dim 1", lambda self, z: self.dec(z - z.mean(1, keepdim=True)))
decoder("latents taken apart by z[:, :1]", lambda self, z: self.dec(z) * torch.exp(0.5 * z[:, :1]))
decoder("the last row's latent by z[-1]", lambda self, z: self.dec(z + z[-1]))
decoder("a norm over dim 1", lambda self, z: self.dec(z) * z.pow(2).sum(1, keepdim=True))
decoder("sorted over dim 1", lambda self, z: self.dec(z.sort(1).values))
decoder("a batch flattened by view(-1, L)", lambda self, z: self.dec(z.reshape(-1, LATENTS)))
decoder("rows flattened by reshape(len(z), -1)", lambda self, z: self.dec(z.reshape(len(z), -1)))
decoder("squeeze() of whatever has size one", lambda self, z: self.dec(z).squeeze())
decoder("an einsum of two fixed letters", lambda self, z: torch.einsum("bl,ol->bo", z, self.dec.weight))
decoder("a transposed product", lambda self, z: (self.dec.weight @ z.transpose(0, 1)).transpose(0, 1))
layered("nn.Softmax(dim=1)", lambda: nn.Softmax(dim=1), lambda self, z: self.layer(self.dec(z)))
layered("nn.Flatten() of the decoder's output", nn.Flatten, lambda self, z: self.layer(self.dec(z)))
layered("BatchNorm1d in the decoder", lambda: nn.BatchNorm1d(SIZE), lambda self, z: self.layer(self.dec(z)))
layered("GroupNorm in the decoder", lambda: nn.GroupNorm(2, SIZE), lambda self, z: self.layer(self.dec(z)))
layered("a GRU whose time is the batch", lambda: nn.GRU(LATENTS, SIZE), lambda self, z: self.layer(z)[0])
layered(
    "attention over the batch",
    lambda: nn.Linear(LATENTS, LATENTS),
    lambda self, z: self.dec(F.softmax(self.layer(z) @ z.mT, -1) @ z),
)

# Coupled data.

decoder("latents divided by the batch's deviation", lambda self, z: self.dec(z / z.std()))
decoder("latents less the mean over data", lambda self, z: self.dec(z - z.mean(-2, keepdim=True)))
decoder("one datum's latent for all", lambda self, z: self.dec(z[..., :1, :].expand_as(z)))


@wrong
class CentredData(Right):
    """an encoder of x less the batch's mean."""

    def encode(self, x: Tensor) -> Tensor:
        return self.enc(x - x.mean(0))


@wrong
class StandardisedData(Right):
    """an encoder of x divided by the batch's largest value."""

    def encode(self, x: Tensor) -> Tensor:
        return self.enc(x / x.abs().max())


@wrong
class BatchStatistics(WithLayer):
    """BatchNorm without running statistics in the encoder."""

    def make(self) -> nn.Module:
        return nn.BatchNorm1d(SIZE, track_running_stats=False)

    def encode(self, x: Tensor) -> Tensor:
        return self.enc(self.layer(x) if len(x) > 1 else x)


@wrong
class ReadsItsRow(Right):
    """an encoder that reads the row's number."""

    def encode(self, x: Tensor) -> Tensor:
        return self.enc(x) + 0.3 * torch.arange(len(x)).unsqueeze(-1)


@wrong
class ParametersByRow(Right):
    """a table of parameters read by row, m[:len(x)]."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.linspace(-1, 1, 200 * 2 * LATENTS).reshape(200, -1))

    def encode(self, x: Tensor) -> Tensor:
        return self.m[: len(x)]


@wrong
class MasksByRow(Right):
    """a mask of every second row."""

    def likelihood(self, z: Tensor, x: Tensor) -> Any:
        return super().likelihood(z, x).mask(torch.arange(len(x)) % 2 == 0)


@wrong
class DropsOut(Right):
    """dropout that does not know of evaluation mode."""

    def decode(self, z: Tensor) -> Tensor:
        return F.dropout(self.dec(z), 0.5, training=True)


@wrong
class NoiseOutsideSites(Right):
    """a noise of the decoder that is no site."""

    def decode(self, z: Tensor) -> Tensor:
        return self.dec(z) + torch.randn_like(z[..., :1])


# x read in the model.


@wrong
class LibrarySize(Right):
    """a size factor read off x in the model."""

    def likelihood(self, z: Tensor, x: Tensor) -> Any:
        return dist.Normal(self.decode(z) * x.abs().sum(-1, keepdim=True), 0.5).to_event(1)


@wrong
class ScaleOfData(Right):
    """a noise scale read off x in the model."""

    def likelihood(self, z: Tensor, x: Tensor) -> Any:
        return dist.Normal(self.decode(z), x.std(-1, keepdim=True)).to_event(1)


@wrong
class PriorOfData(Right):
    """a prior whose mean is read off x."""

    def prior(self, x: Tensor) -> Any:
        return dist.Normal(0.1 * x[..., :LATENTS], 1.0).to_event(1)


@wrong
class ComparesData(Right):
    """a decoder switched by x > 0, through which NaN does not spread."""

    def likelihood(self, z: Tensor, x: Tensor) -> Any:
        return dist.Normal(self.decode(z) * (x > 0), 0.5).to_event(1)


@wrong
class SkipConnection(Right):
    """a skip connection from x to its own likelihood."""

    def likelihood(self, z: Tensor, x: Tensor) -> Any:
        return dist.Normal(self.decode(z) + 0.5 * x, 0.5).to_event(1)


@wrong
class MasksByData(Right):
    """a mask read off x in the model."""

    def likelihood(self, z: Tensor, x: Tensor) -> Any:
        return dist.Normal(self.decode(z), 0.5).mask(x > 0).to_event(1)


# Parameters outside the module.


@wrong
class Stored(Right):
    """a guide whose scale is a pyro.param."""

    def posterior(self, x: Tensor) -> Any:
        scale = pyro.param("wrong_pairs_scale", torch.ones(LATENTS), constraint=dist.constraints.positive)
        return dist.Normal(self.encode(x).chunk(2, -1)[0], scale).to_event(1)


@wrong
class Listed(Right):
    """networks in a Python list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(SIZE, 8), nn.Linear(8, 2 * LATENTS)]

    def encode(self, x: Tensor) -> Tensor:
        return self.layers[1](torch.tanh(self.layers[0](x)))


@wrong
class InDictionary(Right):
    """networks in a Python dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = {"decoder": nn.Linear(LATENTS, SIZE)}

    def decode(self, z: Tensor) -> Tensor:
        return self.layers["decoder"](z)


@wrong
class PlainTensor(Right):
    """a trainable tensor that is no nn.Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.zeros(SIZE, requires_grad=True)

    def decode(self, z: Tensor) -> Tensor:
        return self.dec(z) + self.shift


class _Elsewhere:
    net = nn.Linear(LATENTS, SIZE)


@wrong
class OfTheModule(Right):
    """a network that lives outside the pair."""

    def decode(self, z: Tensor) -> Tensor:
        return _Elsewhere.net(z)


@wrong
class Announced(Right):
    """a network announced by pyro.module alone."""

    def decode(self, z: Tensor) -> Tensor:
        return pyro.module("wrong_pairs_decoder", _Elsewhere.net)(z)


# Supports and measures.


def supports(name: str, prior: Callable[[Tensor], Any], posterior: Callable[[Tensor], Any]) -> None:
    """List a pair whose guide and prior cover different sets, or are of different measures."""
    WRONG[name] = type(
        "Supports",
        (Right,),
        {"prior": lambda self, x: prior(x), "posterior": lambda self, x: posterior(self.encode(x))},
    )


def _loc(h: Tensor) -> Tensor:
    return h[..., :LATENTS]


def _ones(x: Tensor) -> Tensor:
    return x.new_ones(LATENTS)


def _normal(h: Tensor) -> Any:
    return dist.Normal(_loc(h), 1.0).to_event(1)


def _standard(x: Tensor) -> Any:
    return dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1)


supports("an exponential prior under a normal guide", lambda x: dist.Exponential(_ones(x)).to_event(1), _normal)
supports("a beta prior under a normal guide", lambda x: dist.Beta(2 * _ones(x), 2 * _ones(x)).to_event(1), _normal)
supports("a Dirichlet prior under a normal guide", lambda x: dist.Dirichlet(_ones(x)), _normal)
supports("a uniform guide", _standard, lambda h: dist.Uniform(_loc(h) - 2, _loc(h) + 2).to_event(1))
supports("a half-normal guide", _standard, lambda h: dist.HalfNormal(1 + _loc(h).abs()).to_event(1))
supports("a guide on the sphere", _standard, lambda h: dist.ProjectedNormal(_loc(h)))
supports("a guide on angles", _standard, lambda h: dist.VonMises(_loc(h), 2.0).to_event(1))
supports("a guide on the simplex", _standard, lambda h: dist.Dirichlet(1 + _loc(h).abs()))
supports("a discrete guide", _standard, lambda h: dist.Bernoulli(logits=_loc(h)).to_event(1))
supports(
    "a guide that counts to one under a prior that counts on",
    lambda x: dist.Poisson(_ones(x)).to_event(1),
    lambda h: dist.Bernoulli(logits=_loc(h)).to_event(1),
)
supports(
    "a point mass outside the prior's support",
    lambda x: dist.Exponential(_ones(x)).to_event(1),
    lambda h: dist.Delta(-1 - _loc(h).abs()).to_event(1),
)

# Structure.


@wrong
class LacksALatent(Right):
    """a latent that the guide lacks."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("noise", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", self.likelihood(z, x), obs=x)


@wrong
class OneTooMany(Right):
    """a latent that the model lacks."""

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))
            pyro.sample("noise", dist.Normal(x.new_zeros(()), 1.0))


@wrong
class SharedLatent(Right):
    """a latent shared by all data."""

    def model(self, x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", self.likelihood(z + shift.unsqueeze(-1), x), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("shift", dist.Normal(x.new_zeros(()), 0.5))
        super().guide(x)


@wrong
class Subsamples(Right):
    """a plate that subsamples."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", 1000, subsample_size=len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", self.likelihood(z, x), obs=x)


@wrong
class Scaled(Right):
    """a likelihood scaled in the model."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            with poutine.scale(scale=10.0):
                pyro.sample("x", self.likelihood(z, x), obs=x)


@wrong
class Annealed(Right):
    """a divergence scaled in both programs."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", self.prior(x))
            pyro.sample("x", self.likelihood(z, x), obs=x)

    def guide(self, x: Tensor) -> None:
        with poutine.scale(scale=0.1):
            super().guide(x)


@wrong
class ObservesNothing(Right):
    """a model that observes nothing."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.deterministic("x", self.decode(z))


@wrong
class Sliced(Right):
    """x observed in two slices."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = self.decode(pyro.sample("z", self.prior(x)))
            pyro.sample("left", dist.Normal(loc[..., :2], 0.5).to_event(1), obs=x[:, :2])
            pyro.sample("right", dist.Normal(loc[..., 2:], 0.5).to_event(1), obs=x[:, 2:])


@wrong
class NoEvent(Right):
    """a likelihood whose columns lie in no plate."""

    def likelihood(self, z: Tensor, x: Tensor) -> Any:
        return dist.Normal(self.decode(z), 0.5)


@wrong
class OtherPlate(Right):
    """a plate of another name."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("batch", len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", self.likelihood(z, x), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("batch", len(x)):
            pyro.sample("z", self.posterior(x))


@wrong
class ScoresCoarsely(Right):
    """a likelihood of bfloat16 numbers."""

    def likelihood(self, z: Tensor, x: Tensor) -> Any:
        return dist.Normal(self.decode(z).bfloat16(), torch.tensor(0.5).bfloat16()).to_event(1)


# Pairs that only look wrong: a guard that refuses them guards too much.


def sound(name: str, make: Callable[[], nn.Module], decode: Callable[[Any, Tensor], Tensor]) -> None:
    """List a sound pair whose decoder has one more layer."""
    RIGHT[name] = type("Sound", (WithLayer,), {"make": lambda self: make(), "decode": decode})


sound("softmax over dim -1", lambda: nn.Softmax(dim=-1), lambda self, z: self.layer(self.dec(z)))
sound("LayerNorm", lambda: nn.LayerNorm(SIZE), lambda self, z: self.layer(self.dec(z)))
sound("dropout that knows of evaluation mode", nn.Dropout, lambda self, z: self.layer(self.dec(z)))
sound(
    "batch norm over all leading dimensions",
    lambda: pv.networks.MLP([(LATENTS,)], SIZE, (8,), batch_norm=True),
    lambda self, z: self.layer(z),
)
sound(
    "a GRU over a datum's latents",
    lambda: nn.GRU(1, SIZE, batch_first=True),
    lambda self, z: self.layer(z.reshape(-1, LATENTS, 1))[0][:, -1].reshape(*z.shape[:-1], SIZE),
)


@right
class RandomGuide(Right):
    """A guide that encodes a noisy x: its weights still average to p(x)."""

    def encode(self, x: Tensor) -> Tensor:
        return self.enc(x + 0.1 * torch.randn_like(x))


@right
class Factor(Right):
    """A likelihood written as pyro.factor beside an observed site."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", self.likelihood(z, x), obs=x)
            pyro.factor("penalty", -x.pow(2).sum(-1))


@right
class FrozenTeacher(Right):
    """A frozen network kept out of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = [nn.Linear(LATENTS, SIZE).requires_grad_(False)]

    def decode(self, z: Tensor) -> Tensor:
        return self.dec(z) + self.teacher[0](z)


@right
class Autoregressive(Right):
    """A likelihood whose density reads the value it scores."""

    def likelihood(self, z: Tensor, x: Tensor) -> Any:
        base = dist.Normal(self.decode(z), 0.5).to_event(1)
        lower = torch.eye(SIZE) + 0.3 * torch.ones(SIZE, SIZE).tril(-1)
        return dist.TransformedDistribution(base, [dist.transforms.LowerCholeskyAffine(torch.zeros(SIZE), lower)])
