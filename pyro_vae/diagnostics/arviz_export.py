"""Export to ArviZ: latents, weights, predictions and data with named dimensions, and models to compare."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae._version import __version__
from pyro_vae.diagnostics.arviz_containers import elpd_data, inference_data
from pyro_vae.inspection import Inspection
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.inspection.observed import dependent_on_draws
from pyro_vae.likelihood.estimate import LogLikelihood
from pyro_vae.likelihood.posterior import DrawsFrom, fitted_draws, guided
from pyro_vae.likelihood.psis import trust_threshold
from pyro_vae.likelihood.weights import WeightStream, WeightSummary
from pyro_vae.pair.modes import chunks, drawing, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import DATA, PARTICLES, Site
from pyro_vae.pair.trace import PairTrace, run_model, trace_pair
from pyro_vae.runtime.memory import MEBIBYTE, chunk_sizes
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["to_arviz", "to_elpd"]

# An event with three axes is an image, here as in the networks.
IMAGE_AXES = ("channel", "row", "column")


@one_at_a_time
@takes_arrays
def to_arviz(
    pair: Pair,
    *batch: Tensor,
    num_particles: int = 1000,
    num_draws: int = 500,
    memory: int = 512 * MEBIBYTE,
    seed: int | None = None,
    proposal: DrawsFrom = "guide",
) -> Any:
    """Draw latents from p(z | x) by resampling, and export them to ArviZ with weights and predictions.

    z_k ~ q(z | x), k = 1 … K;   draws are particles resampled with probabilities w_k / Σ w, w_k = p(x, z_k)/q(z_k | x)

    ``posterior`` follows p(z | x), not the guide, if the weights are reliable. Check ``pareto_k`` in ``sample_stats``:
    trust a datum up to ``pareto_k_threshold``. Resampling is systematic: under equal weights no particle is drawn
    twice. Draws are in the order of their particles. A particle drawn several times then shows as autocorrelation,
    which ArviZ's ``ess`` and ``mcse`` count. If the guide fixes a site to a point mass, ``constant_data`` holds that
    site, and ``posterior`` is conditional on it.

    Compare models by :func:`to_elpd`, on data that the parameters were not fitted to. ``log_likelihood`` holds the
    estimate of log p(x_i), with the latents integrated out, equal for all draws. ``loo`` needs this quantity: given the
    parameters the data are independent, and p(x_i | all other data) is p(x_i). From log p(x_i | z_i) ``loo`` would take
    a harmonic mean of likelihoods. Its variance is infinite as soon as x_i tells as much about z_i as the prior does.
    ArviZ's ``loo`` on this export gives the same sum, but sees a tail in equal weights: it reports k̂ = ∞, and ArviZ 1
    raises an error.

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K, draws of the proposal per datum.
        num_draws: S, draws of the posterior per datum, at most K.
        memory: bytes for a chunk of data and particles, beside the result.
        seed: of the draws; fresh entropy without one.
        proposal: in place of q(z | x), as for :func:`~pyro_vae.posterior`.

    Returns:
        An ``arviz.InferenceData``, with ArviZ 1 an ``xarray.DataTree``, of one chain. Dimensions are ``chain`` (1),
        ``draw`` (S), ``datum`` (B), and those of each site: ``z_dim_0`` for a vector, ``x_channel``, ``x_row``,
        ``x_column`` for an image. Its groups:

        * ``posterior``: each latent site;
        * ``posterior_predictive``: x drawn at each draw of the latents, and so are other data that depend on them;
        * ``log_likelihood``: log p(x), in nats, or the quantity named by the attribute ``quantity``;
        * ``sample_stats``: ``log_weights`` (particle_index, datum) in nats; ``particle`` (chain, draw, datum), the
          index of each draw's particle; per datum ``pareto_k``, ``ess`` and ``standard_error`` (of log p(x), nats);
        * ``observed_data``, and ``constant_data`` for conditions and fixed sites, if any.

    Raises:
        ValueError: for bad data, S outside 1 … K, and data that no particle explains.

    Reference:
        Kumar, Carroll, Hartikainen and Martin (2019), ArviZ, JOSS 4; Vehtari, Gelman and Gabry (2017), Practical
        Bayesian model evaluation using leave-one-out cross-validation and WAIC, Statistics and Computing 27; Neal
        (2008), The harmonic mean of the likelihood.

    >>> import pyro_vae as pv
    >>> data = to_arviz(pv.models.LinearGaussianVAE(4, 2), torch.zeros(3, 4), num_particles=50, num_draws=20)
    >>> dict(data.posterior["z"].sizes)
    {'chain': 1, 'draw': 20, 'datum': 3, 'z_dim_0': 2}
    """
    if not 1 <= num_draws <= num_particles:
        raise ValueError(
            f"num_draws is {num_draws}, num_particles {num_particles}: draws are taken among the particles, at least "
            "one and no more than there are"
        )
    inspection = guided(pair, batch, proposal)
    pair, batch = inspection.pair, to_pair(inspection.pair, batch)
    # Data that latents explain are predicted; a label at the root of the model stays as it is.
    predicted = (inspection.x.name, *(dependent_on_draws(pair, *batch) if len(batch) > 1 else ()))
    with drawing(pair, seed):
        exporter = _Exporter(inspection, num_particles, num_draws, predicted, is_fitted=proposal == "auto")
        data, exporter.chunk = chunk_sizes(exporter.propose, batch, num_particles, memory)
        parts = [exporter.export(chunk, i * data) for i, chunk in enumerate(chunks(batch, data))]
    return inference_data(_groups(parts, batch[1:], num_particles, inspection.quantity, inspection.x.name))


@one_at_a_time
def to_elpd(log_likelihood: LogLikelihood) -> Any:
    """Export held-out log-likelihoods to ArviZ, as an expected log predictive density.

    elpd = Σ_i log p(x_i),   standard error √(B Var_i log p(x_i))

    Pass the results of several models to ArviZ's ``compare``; it takes the error of a difference from paired terms.
    ``plot_khat`` shows k̂ of the importance weights behind each log p(x_i). ArviZ's standard errors leave out the Monte
    Carlo error: see ``LogLikelihood.mean_monte_carlo_error``.

    The parameters are known and every datum has separate latents. The leave-one-out predictive density of a datum is
    therefore p(x_i), and the effective number of parameters is 0.

    Args:
        log_likelihood: of data that the parameters were not fitted to. Use the same data, in the same order, for all
            models in a comparison.

    Returns:
        ArviZ's ``ELPDData``. From a lower bound on log p(x) it is a lower bound too.

    Raises:
        ValueError: for a joint density, e.g. "log p(x, y)": it is no density of x.

    >>> import pyro_vae as pv
    >>> pair = pv.models.LinearGaussianVAE(4, 2)
    >>> elpd = to_elpd(pv.log_likelihood(pair, torch.zeros(3, 4), num_particles=50))
    >>> elpd.n_data_points
    3
    """
    import xarray

    if log_likelihood.beside:
        raise ValueError(
            f"this is {log_likelihood.quantity}: {log_likelihood.beside}; models are compared by log p(x): estimate it "
            "by a model that observes x alone and a guide with densities, e.g. with labels as conditions that no site "
            "observes"
        )
    terms = log_likelihood.per_datum.double().numpy()
    pareto_k = log_likelihood.pareto_k.numpy()
    fields = {
        "se": float(np.sqrt(len(terms) * terms.var())),
        "n_samples": log_likelihood.num_particles,
        "n_data_points": len(terms),
        "warning": bool((pareto_k > log_likelihood.threshold).any()),
        "pareto_k": xarray.DataArray(pareto_k, dims="datum"),
        "scale": "log",
        "good_k": log_likelihood.threshold,
    }
    return elpd_data(float(terms.sum()), xarray.DataArray(terms, dims="datum", name="loo_i"), fields)


class _Named(NamedTuple):
    """A tensor with the names of its axes."""

    value: Tensor
    dims: tuple[str, ...]


class _Part(NamedTuple):
    """The export of b data: tensors by site, log-weights (K, b), the particle of each draw (S, b)."""

    posterior: dict[str, _Named]
    predictive: dict[str, _Named]
    observed: dict[str, _Named]
    fixed: dict[str, _Named]
    log_weights: Tensor
    particle: Tensor
    summary: WeightSummary


class _Exporter:
    """Draw particles of the proposal, resample them and predict from them, ``chunk`` particles at a time."""

    def __init__(
        self, inspection: Inspection, num_particles: int, num_draws: int, predicted: tuple[str, ...], *, is_fitted: bool
    ) -> None:
        self.inspection, self.pair, self.chunk = inspection, inspection.pair, 1
        self.num_particles, self.num_draws = num_particles, num_draws
        self.predicted, self.is_fitted = predicted, is_fitted

    def propose(self, batch: tuple[Tensor, ...], size: int) -> tuple[PairTrace, Tensor]:
        """Return a run of guide and model, and its log-weights (size, b)."""
        trace = trace_pair(self.pair, *batch, num_particles=size)
        return trace, trace.terms.log_weights

    def export(self, batch: tuple[Tensor, ...], first: int) -> _Part:
        """Return the export of some data, of which the first has index ``first``."""
        stream = WeightStream(len(batch[0]), self.num_particles, batch[0].device)
        trace, values, log_weights = self._fitted(batch) if self.is_fitted else self._guided(batch)
        stream.add(log_weights)
        summary = stream.summary()
        if (bad := ~torch.isfinite(summary.log_mean)).any():
            raise ValueError(
                f"all {self.num_particles} weights of datum {first + int(bad.nonzero()[0])} are zero, infinite or NaN: "
                "no draw of the proposal explains it; run pv.log_likelihood on that datum alone to see the reason"
            )
        particle = _resample(log_weights, self.num_draws)
        data = torch.arange(len(batch[0]), device=particle.device)
        draws = {name: value[particle, data] for name, value in values.items()}
        return _Part(
            {name: _named(draws[name], site) for name, site in trace.latents.items()},
            self._predict(batch, draws, trace),
            {
                name: _unvarying(site.value, site)
                for name, site in trace.model.items()
                if site.is_observed and not site.is_factor
            },
            {name: _unvarying(draws[name], trace.guide[name]) for name in draws if name in trace.point_masses},
            log_weights,
            particle,
            summary,
        )

    def _guided(self, batch: tuple[Tensor, ...]) -> tuple[PairTrace, dict[str, Tensor], Tensor]:
        """Return a run of the programs, and K draws of the guide by site with their log-weights (K, b)."""
        values: dict[str, list[Tensor]] = {}
        parts = []
        for size in self._chunks(self.num_particles):
            trace, weights = self.propose(batch, size)
            parts.append(weights.double())
            for name, site in trace.guide.items():
                values.setdefault(name, []).append(site.value)
        return trace, {name: torch.cat(each) for name, each in values.items()}, torch.cat(parts)

    def _fitted(self, batch: tuple[Tensor, ...]) -> tuple[PairTrace, dict[str, Tensor], Tensor]:
        """Return the same of draws from proposals fitted to the data."""
        trace, _ = self.propose(batch, 1)
        drawn = list(fitted_draws(self.inspection, batch, self.num_particles))
        values = {name: torch.cat([each.latents[name] for each in drawn], 1) for name in trace.guide}
        return trace, values, torch.cat([each.log_weights for each in drawn], 1)

    def _chunks(self, total: int) -> list[int]:
        return [min(self.chunk, total - start) for start in range(0, total, self.chunk)]

    def _predict(self, batch: tuple[Tensor, ...], draws: dict[str, Tensor], trace: PairTrace) -> dict[str, _Named]:
        """Draw x, and the other observed sites that depend on latents, given the latents."""
        found: dict[str, list[Tensor]] = {}
        start = 0
        for size in self._chunks(self.num_draws):
            some = {name: trace.guide[name].as_drawn(value[start : start + size]) for name, value in draws.items()}
            sites = run_model(self.pair, *batch, num_particles=size, values=some, draw=self.predicted)
            for name in self.predicted:
                found.setdefault(name, []).append(sites[name].value)
            start += size
        return {name: _named(torch.cat(parts), sites[name]) for name, parts in found.items()}


def _resample(log_weights: Tensor, num_draws: int) -> Tensor:
    """Resample particles systematically, with one offset per datum: (S, B) indices for log-weights (K, B)."""
    cumulative = log_weights.softmax(0).cumsum(0)
    steps = torch.arange(num_draws, dtype=cumulative.dtype, device=cumulative.device).unsqueeze(-1)
    offset = torch.rand(cumulative.shape[1], dtype=cumulative.dtype, device=cumulative.device)
    # Scaled by the rounded sum: every point then lies below the end of the last particle.
    points = (steps + offset) / num_draws * cumulative[-1]
    found = torch.searchsorted(cumulative.mT.contiguous(), points.mT.contiguous(), right=True).mT
    return found.clamp(max=len(cumulative) - 1)


def _named(value: Tensor, site: Site) -> _Named:
    """Name the axes of a value that is laid out as the site's: draws, data, other plates, event."""
    names = {PARTICLES: "draw", DATA: "datum"}
    count = len(site.fn.event_shape)
    event = IMAGE_AXES if count == 3 else [f"dim_{i}" for i in range(count)]
    return _Named(value, (*(names.get(p, p) for p in site.plates), *(f"{site.name}_{axis}" for axis in event)))


def _unvarying(value: Tensor, site: Site) -> _Named:
    """Name the axes of a value that is equal at every draw, without the axis of draws."""
    named = _named(value, site)
    return _Named(named.value[0], named.dims[1:])


def _groups(
    parts: list[_Part], conditions: tuple[Tensor, ...], num_particles: int, quantity: str, x: str
) -> dict[str, Any]:
    """Return ArviZ's groups as data sets over all data."""
    import xarray

    def joined(select: str) -> dict[str, Any]:
        sites = {}
        for name, (_, dims) in getattr(parts[0], select).items():
            whole = torch.cat([getattr(part, select)[name].value for part in parts], dims.index("datum")).cpu().numpy()
            sites[name] = (("chain", *dims), whole[None]) if dims[0] == "draw" else (dims, whole)
        return sites

    summary = WeightSummary(*(torch.cat(fields, -1) for fields in zip(*(part.summary for part in parts), strict=True)))
    particle = torch.cat([part.particle for part in parts], 1).cpu().numpy()
    log_weights = torch.cat([part.log_weights for part in parts], 1).cpu().numpy()
    observed, constant = joined("observed"), joined("fixed")
    for i, condition in enumerate(conditions):
        axes = (f"condition_{i}_dim_{j}" for j in range(condition.dim() - 1))
        constant[f"condition_{i}"] = (("datum", *axes), condition.cpu().numpy())
    marginal = np.broadcast_to(summary.log_mean.numpy(), (1, *particle.shape))
    groups = {
        "posterior": joined("posterior"),
        "posterior_predictive": joined("predictive"),
        "log_likelihood": {x: (("chain", "draw", "datum"), marginal)},
        "sample_stats": {
            "log_weights": (("particle_index", "datum"), log_weights),
            "particle": (("chain", "draw", "datum"), particle[None]),
            "pareto_k": ("datum", summary.pareto_k.numpy()),
            "ess": ("datum", summary.ess.numpy()),
            "standard_error": ("datum", summary.standard_error.numpy()),
        },
        "observed_data": observed,
        "constant_data": constant,
    }
    attributes = {
        "inference_library": "pyro_vae",
        "inference_library_version": __version__,
        "quantity": quantity,
        "num_particles": num_particles,
        "pareto_k_threshold": trust_threshold(num_particles),
    }
    sets = {name: xarray.Dataset(variables, attrs=attributes) for name, variables in groups.items() if variables}
    return {
        name: group.assign_coords({dim: np.arange(n) for dim, n in group.sizes.items()}) for name, group in sets.items()
    }
