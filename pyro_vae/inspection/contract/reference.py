"""A run with particles and data, which runs of other shapes and on other data must agree with."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.inspection.contract.agreement import PARTICLES, View, agree
from pyro_vae.inspection.contract.scores import densities, runs, scores
from pyro_vae.inspection.contract.watch import Watch, axis_fault, first_line, watched
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import run_guide, run_model, site_of_x

__all__ = ["Reference"]


class Reference:
    """One run with several particles and data, which runs of other shapes must agree with.

    Args:
        pair: the pair.
        batch: a few data and their conditions.

    Raises:
        ValueError: for a pair that runs with one particle only.
    """

    def __init__(self, pair: Pair, batch: tuple[Tensor, ...]) -> None:
        self.pair, self.batch = pair, batch
        try:
            self._run()
        except Exception as failure:
            if not runs(pair, batch, 1):
                raise
            raise ValueError(axis_fault(watched(pair, self._run), failure, (PARTICLES, len(batch[0])))) from failure

    def _run(self) -> None:
        torch.manual_seed(0)
        guide = run_guide(self.pair, *self.batch, num_particles=PARTICLES)
        self.guide, self.noise = guide, not scores(guide)
        self.terms, self.model, self.values = self._scored_again(seed=0)

    def _scored_again(self, seed: int) -> tuple[dict[str, Tensor], dict[str, Site], dict[str, Tensor]]:
        drawn = {name: site.drawn for name, site in self.guide.items()}
        return densities(self.pair, self.batch, drawn, PARTICLES, self.noise, seed)

    def check_shapes(self) -> None:
        """Compare the reference with a run without particles, and with each datum alone."""
        everything = tuple(range(len(self.batch[0])))
        self._compare(View(everything, particles=False))
        if len(everything) > 1:
            for row in everything:
                self._compare(View((row,), particles=True))

    def check_masked_latents_are_not_read(self) -> None:
        """Move latents where masks leave them out; what the model scores must stay."""
        masked = {name: site.scored for name, site in self.guide.items() if not site.is_point_mass}
        moved = dict(self.values)
        for name, scored in masked.items():
            if scored is not None:
                # Another particle's draw: a value that the site can take, for any support.
                value, dim = self.values[name], self.guide[name].particle_dim
                moved[name] = torch.where(scored, value, value.roll(1, value.dim() + dim))
        if all(scored is None for scored in masked.values()):
            return
        torch.manual_seed(0)
        sites = run_model(self.pair, *self.batch, num_particles=PARTICLES, values=moved)
        for name, site in self.model.items():
            if not agree(site.log_prob, sites[name].log_prob):
                raise ValueError(
                    f"site '{name}' reads latents that a mask leaves out: they have no prior there, and log p(x) means "
                    "nothing; mask what reads them too, or read zeros in their place"
                )

    def check_reads_x_only_as_obs(self) -> None:
        """Run the model on other data with the same latents; no distribution may change."""
        # The value of x's site is the same: a site may depend on it, e.g. a label on its image.
        x = site_of_x(self.model, self.batch[0])
        held = {**self.values, x.name: x.drawn}
        for other in _other_data(self.batch[0]):
            try:
                torch.manual_seed(0)
                sites = run_model(
                    self.pair, other, *self.batch[1:], num_particles=PARTICLES, values=held, draw=(x.name,)
                )
                changed = next(
                    (
                        name
                        for name, site in self.model.items()
                        # A factor is a term, not a distribution: there x enters as it does at obs=.
                        if not site.is_factor
                        # A value that is held does not gain the axis of particles.
                        and not agree(
                            *torch.broadcast_tensors(site.log_prob, sites[name].replace(drawn=_scored(site)).log_prob)
                        )
                    ),
                    None,
                )
            except Exception:
                # The run says nothing about x: the other data are no data, e.g. outside a layer's range.
                continue
            if changed is not None:
                raise ValueError(
                    f"the model reads x outside obs=: the distribution at site '{changed}' changes with it, and log "
                    "p(x) means nothing; pass the part that it needs as a condition"
                )

    def _compare(self, view: View) -> None:
        batch = tuple(tensor[list(view.rows)] for tensor in self.batch)
        values = {name: view.of_value(site, site.drawn) for name, site in self.guide.items()}
        count = PARTICLES if view.particles else None

        def run() -> dict[str, Tensor]:
            return densities(self.pair, batch, values, count, self.noise)[0]

        try:
            terms = run()
        except Exception as failure:
            if not runs(self.pair, self.batch, PARTICLES):
                raise
            raise ValueError(self._fails(view, watched(self.pair, run), failure)) from failure
        wrong = [name for name, term in terms.items() if not agree(view.of_terms(self.terms[name]), term)]
        if not wrong:
            return
        random = self._random()
        if any(name.startswith("model") for name in random):
            raise ValueError(
                "the model draws random numbers outside pyro.sample in evaluation mode: its log-densities at given "
                "latents change from run to run; make them a site, or draw them only while self.training"
            )
        # A guide may draw more than its latents: its weights still average to p(x).
        if wrong := [name for name in wrong if name not in random]:
            reference = watched(self.pair, lambda: self._scored_again(seed=0))
            raise ValueError(self._differs(view, wrong[0], reference.first_difference(watched(self.pair, run), view)))

    def _fails(self, view: View, watch: Watch, failure: Exception) -> str:
        place = f"{watch.failed}: " if watch.failed else ""
        if not view.particles:
            return (
                f"the pair runs with K draws per datum, (K, B, …), but fails without that axis, on (B, …), the shape "
                f"of training ({place}{first_line(failure)}); count dimensions from the right"
            )
        return (
            f"the pair fails on a single datum ({place}{first_line(failure)}), the batch that log_likelihood runs; "
            "keep the batch dimension at size one, e.g. squeeze(-1) in place of squeeze()"
        )

    def _differs(self, view: View, name: str, module: str) -> str:
        place = f", first in module {module}" if module else ""
        if view.particles:
            return (
                f"data are coupled: the log-density of the {name} for one datum changes with the others of its batch, "
                f"or with its row{place}; use LayerNorm or GroupNorm for BatchNorm, reduce from the right (dim=-1), "
                "and use no statistics over the batch"
            )
        return (
            f"the pair means another thing on (B, …), as in training, than on (K, B, …), as in evaluation: at the same "
            f"latents the log-density of the {name} differs{place}; index and reduce from the right (dim=-1, z[..., 0])"
        )

    def _random(self) -> list[str]:
        """Return the sites that score the same latents otherwise from another seed."""
        again, *_ = self._scored_again(seed=1)
        return [name for name, term in again.items() if not agree(self.terms[name], term)]


def _scored(site: Site) -> Tensor:
    return site.drawn if site.observation is None else site.observation


def _other_data(x: Tensor) -> list[Tensor]:
    """Return data that differ from ``x`` in every entry, as far as its type allows."""
    # NaN spreads from whatever reads it by arithmetic, not through comparisons; moved entries do the reverse.
    moved = x.roll(1, 0)
    moved = moved.reshape(len(x), -1).roll(1, -1).reshape(x.shape)
    return [moved, torch.full_like(x, torch.nan)] if x.is_floating_point() else [moved]
