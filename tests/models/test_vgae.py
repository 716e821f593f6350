"""The graph auto-encoder keeps the contract; on three nodes its likelihood is known by quadrature."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.distributions.graph import InnerProductGraph
from pyro_vae.models import VGAE
from pyro_vae.objectives.graph import BalancedGraphLoss
from pyro_vae.testing import PairContract


def two_graphs() -> Tensor:
    path = pv.data.make_graph(torch.tensor([[0, 1], [1, 2]]), 4)
    return torch.stack([path.adjacency(), pv.data.make_graph(torch.tensor([[3, 1], [2, 0]]), 4).adjacency()])


class TestVGAE(PairContract):
    def make_pair(self) -> pv.Pair:
        return VGAE(4, pv.StandardNormal(2))

    def make_batch(self) -> tuple[Tensor, ...]:
        return (two_graphs(),)


class TestVGAEWithFeatures(TestVGAE):
    def make_pair(self) -> pv.Pair:
        return VGAE(4, pv.StandardNormal(2), torch.randn(4, 3), hidden=5)


class TestVGAEWithMixturePrior(TestVGAE):
    def make_pair(self) -> pv.Pair:
        return VGAE(4, pv.MixtureOfGaussians(3, 2))


def three_nodes() -> tuple[VGAE, Tensor, Tensor]:
    """Return a pair with one latent per node, all eight graphs on three nodes, and their exact log p(A)."""
    points, masses = np.polynomial.hermite_e.hermegauss(40)
    points, masses = torch.from_numpy(points), torch.from_numpy(masses / masses.sum())
    z = torch.cartesian_prod(points, points, points).unsqueeze(-1)
    log_mass = torch.cartesian_prod(masses, masses, masses).log().sum(-1)
    upper = torch.tensor(list(product([False, True], repeat=3)))
    graphs = torch.zeros(8, 3, 3, dtype=torch.bool)
    graphs[:, [0, 0, 1], [1, 2, 2]] = upper
    graphs = graphs | graphs.mT
    log_p = torch.stack([torch.logsumexp(log_mass + InnerProductGraph(z).log_prob(graph), 0) for graph in graphs])
    return VGAE(3, pv.StandardNormal(1)), graphs, log_p


def test_the_exact_probabilities_of_all_graphs_sum_to_one() -> None:
    _, graphs, log_p = three_nodes()
    torch.testing.assert_close(log_p.logsumexp(0), torch.tensor(0.0), rtol=0, atol=1e-12)
    # Of three nodes on a line, two have the same sign: the triangle is likelier than any path of the same nodes.
    assert log_p[graphs.flatten(1).sum(1) == 6] > log_p[graphs.flatten(1).sum(1) == 4].max()


def test_importance_sampling_finds_the_exact_likelihood_and_the_elbo_lies_below() -> None:
    pair, graphs, exact = three_nodes()
    ll = pv.log_likelihood(pair, graphs, num_particles=20_000, seed=1, proposal="guide")
    assert ll.quantity == "log p(x)"
    assert ll.discrete
    assert ll.per_datum.shape == (8,)
    assert (ll.ess > 400).all()
    assert ((ll.per_datum - exact).abs() <= 4 * ll.standard_error).all()
    weights = pv.log_terms(pair, graphs, num_particles=2000).log_weights.detach()
    assert (weights.mean(0) + 4 * weights.std(0) / 2000**0.5 < exact).all()


def test_training_closes_the_gap_but_for_the_guides_form() -> None:
    pair, graphs, exact = three_nodes()
    triangle, log_p = graphs[-1:], exact[-1]

    def elbo() -> float:
        return float(pv.log_terms(pair, triangle, num_particles=5000).log_weights.detach().mean())

    with torch.no_grad():
        pair.q_z.network.second.mul_(8)
    before = elbo()
    # The model has no parameters here, so that training can but tighten the bound.
    pv.fit(pair, triangle, epochs=60, batch_size=1, lr=0.05, capture=False, progress=False)
    # Nodes may be all positive or all negative, which no single Gaussian says: some gap stays.
    assert before + 0.1 < elbo() < float(log_p) - 0.05


def test_one_graph_is_one_datum() -> None:
    pair, graph = VGAE(4, pv.StandardNormal(2)), two_graphs()[:1]
    terms = pv.site_terms(pair, graph, num_particles=5)
    assert all(term.log_model.shape == (5, 1) for term in terms.values())
    assert pv.posterior(pair, graph, num_particles=7).latents["z"].shape == (7, 1, 4, 2)
    assert pv.reconstruct(pair, graph, num_particles=7).mean.shape == (7, 1, 4, 4)
    assert torch.isnan(torch.tensor(pv.log_likelihood(pair, graph, num_particles=3).mean_standard_error))


def test_bits_per_dimension_are_bits_per_pair_of_nodes() -> None:
    pair, graphs, exact = three_nodes()
    ll = pv.log_likelihood(pair, graphs, num_particles=20_000, seed=1, proposal="guide")
    assert ll.num_dimensions == 3
    # All eight graphs alike take a bit for each pair, and any code that is not uniform more than that.
    bits = -float(exact.mean()) / (3 * math.log(2))
    assert bits > 1
    assert ll.bits_per_dimension == pytest.approx(bits, abs=4 * float(ll.standard_error.max()) / (3 * math.log(2)))


def test_generated_graphs_are_graphs() -> None:
    drawn = pv.generate(VGAE(5, pv.StandardNormal(2)), 30, seed=0).x
    assert drawn.dtype == torch.bool
    assert drawn.shape == (30, 5, 5)
    assert (drawn == drawn.mT).all()
    assert not drawn.diagonal(dim1=-2, dim2=-1).any()


def test_two_cliques_are_told_apart() -> None:
    clique = ~torch.eye(5, dtype=torch.bool)
    graph = pv.data.graph_of(torch.block_diag(clique, clique) > 0)
    split = pv.data.split_links(graph, validation=0.1, test=0.1, seed=1)
    pair, x = VGAE(10, pv.StandardNormal(4)), split.train.adjacency().unsqueeze(0)
    pv.fit(pair, x, epochs=150, batch_size=1, loss=BalancedGraphLoss(), lr=0.02, capture=False, progress=False)
    linked = torch.cat([split.validation, split.test], 1)
    unlinked = torch.cat([split.validation_absent, split.test_absent], 1)
    assert pair.link_probability(x, linked).min() > pair.link_probability(x, unlinked).max()


def test_nodes_without_links_or_words_work() -> None:
    features = torch.randn(4, 3)
    features[3] = 0
    pair, x = VGAE(4, pv.StandardNormal(2), features), torch.zeros(1, 4, 4, dtype=torch.bool)
    assert torch.isfinite(pv.log_likelihood(pair, x, num_particles=3).per_datum).all()
    run = pv.fit(pair, x, epochs=2, batch_size=1, progress=False)
    assert run.metrics[-1]["loss"] > 0


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (two_graphs().triu(), r"values outside the support of site 'x' \(a symmetric matrix"),
        (two_graphs() | torch.eye(4, dtype=torch.bool), "values outside the support of site 'x'"),
        (two_graphs().double(), "is torch.float64, the pair computes with torch.bool"),
        (two_graphs()[:, :3, :3], r"has shape \(2, 3, 3\)"),
    ],
)
def test_what_is_no_graph_is_refused_before_a_step(x: Tensor, message: str) -> None:
    pair = VGAE(4, pv.StandardNormal(2))
    with pytest.raises(ValueError, match=message):
        pv.fit(pair, x, epochs=1, batch_size=2, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_nodes": 1}, "at least two nodes"),
        ({"features": torch.zeros(3, 2)}, "N = 4"),
        ({"features": torch.zeros(4)}, "N = 4"),
        ({"features": torch.full((4, 2), torch.nan)}, "NaN or infinite"),
    ],
)
def test_pairs_that_cannot_be_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VGAE(**{"num_nodes": 4, "prior": pv.StandardNormal(2), **arguments})
