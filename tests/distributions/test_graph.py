"""Graph convolutions, the distribution over edges and the balanced loss, against their dense and enumerated forms."""

from __future__ import annotations

import math
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

import pyro_vae as pv
from pyro_vae.distributions import graph as graphs
from pyro_vae.distributions.graph import InnerProductGraph
from pyro_vae.models import VGAE
from pyro_vae.networks.graph import GraphConvolutions
from pyro_vae.objectives.graph import BalancedGraphLoss

# Sums of a few hundred terms in another order.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def random_graphs(count: int, size: int) -> Tensor:
    upper = (torch.rand(count, size, size) < 0.4).triu(1)
    return upper | upper.mT


def all_graphs(size: int) -> Tensor:
    """Return every undirected graph on a few nodes, (2^P, N, N)."""
    pairs = torch.triu_indices(size, size, 1)
    graphs_ = torch.zeros(2 ** pairs.shape[1], size, size, dtype=torch.bool)
    for graph, bits in zip(graphs_, product([False, True], repeat=pairs.shape[1]), strict=True):
        graph[pairs[0], pairs[1]] = torch.tensor(bits)
    return graphs_ | graphs_.mT


@pytest.mark.parametrize("with_features", [False, True])
def test_convolutions_are_the_dense_products(with_features: bool) -> None:
    x = torch.randn(6, 4) if with_features else torch.eye(6)
    net, a = GraphConvolutions(6, 3, hidden=5, features=x if with_features else None), random_graphs(2, 6)
    a[0, 2], a[0, :, 2] = False, False
    for b in range(2):
        loops = a[b] + torch.eye(6)
        d = torch.diag(loops.sum(1) ** -0.5)
        dense = d @ loops @ d @ torch.relu(d @ loops @ d @ x @ net.first) @ net.second
        torch.testing.assert_close(net(a)[b], dense, **ROUNDING)


def test_an_isolated_node_sees_itself_alone() -> None:
    net, a = GraphConvolutions(5, 3, features=torch.randn(5, 4)), random_graphs(1, 5)
    a[0, 2], a[0, :, 2] = False, False
    alone = torch.relu(net.features[2] @ net.first) @ net.second
    torch.testing.assert_close(net(a)[0, 2], alone, **ROUNDING)
    no_edges = torch.zeros(1, 5, 5, dtype=torch.bool)
    torch.testing.assert_close(net(no_edges)[0], torch.relu(net.features @ net.first) @ net.second, **ROUNDING)


def test_renaming_the_nodes_renames_the_outputs() -> None:
    x, a, order = torch.randn(6, 4), random_graphs(1, 6), torch.randperm(6)
    net = GraphConvolutions(6, 3, features=x)
    renamed = GraphConvolutions(6, 3, features=x[order])
    renamed.load_state_dict(net.state_dict())
    torch.testing.assert_close(renamed(a[:, order][:, :, order]), net(a)[:, order], **ROUNDING)


def test_the_probabilities_of_all_graphs_sum_to_one() -> None:
    everything = all_graphs(4)
    log_p = InnerProductGraph(torch.randn(4, 2)).log_prob(everything)
    torch.testing.assert_close(log_p.logsumexp(0), torch.tensor(0.0), **ROUNDING)


def test_a_product_over_ordered_pairs_is_no_probability() -> None:
    # As printed, i = j included: at z = 0 every factor is a half, and nine of them remain for eight graphs.
    everything = all_graphs(3)
    log_p = torch.distributions.Bernoulli(logits=torch.zeros(3, 3)).log_prob(everything.double()).sum((-2, -1))
    assert log_p.exp().sum() == pytest.approx(8 / 512)


@pytest.mark.parametrize("pairs_at_once", [1, 40, 10_000])
def test_blocks_of_rows_give_the_sum_over_pairs_and_its_gradient(
    pairs_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "PAIRS_AT_ONCE", pairs_at_once)
    z, a = torch.randn(3, 2, 7, 2, requires_grad=True), random_graphs(2, 7)
    linked, unlinked = torch.tensor([3.0, 5.0]), torch.tensor([2.0, 0.5])
    logits = z @ z.mT
    bernoulli = torch.distributions.Bernoulli(logits=logits).log_prob(a.to(z).expand_as(logits)).triu(1)
    for weights, factor in (((None, None), 1.0), ((linked, unlinked), None)):
        if factor is None:
            factor = torch.where(a, linked[:, None, None], unlinked[:, None, None])
        dense = (factor * bernoulli).sum((-2, -1))
        ours = InnerProductGraph(z).weighted_log_prob(a, *weights)
        torch.testing.assert_close(ours, dense, **ROUNDING)
        slopes = torch.randn(3, 2)
        gradients = [torch.autograd.grad((slopes * f).sum(), z, retain_graph=True)[0] for f in (ours, dense)]
        torch.testing.assert_close(*gradients, **ROUNDING)


def test_one_set_of_nodes_scores_many_graphs() -> None:
    z, a = torch.randn(5, 2, requires_grad=True), random_graphs(4, 5)
    together = InnerProductGraph(z).log_prob(a)
    torch.testing.assert_close(together, torch.stack([InnerProductGraph(z).log_prob(one) for one in a]), **ROUNDING)
    assert torch.autograd.grad(together.sum(), z)[0].shape == z.shape


def test_draws_are_graphs_with_the_links_probabilities() -> None:
    graph = InnerProductGraph(torch.randn(4, 2))
    draws = graph.sample((4000,))
    assert graph.support.check(draws).all()
    p = graph.mean
    assert ((draws.double().mean(0) - p).abs() <= 4 * (p * (1 - p) / 4000).sqrt()).all()


@pytest.mark.parametrize(
    "mistake", [lambda a: a.triu(), lambda a: a | torch.eye(4, dtype=torch.bool)], ids=["asymmetric", "self-loops"]
)
def test_what_is_no_undirected_graph_has_no_probability(mistake) -> None:
    a = random_graphs(1, 4) | (torch.ones(4, 4, dtype=torch.bool).triu(2) | torch.ones(4, 4, dtype=torch.bool).tril(-2))
    graph = InnerProductGraph(torch.zeros(4, 2), validate_args=True)
    graph.log_prob(a)
    with pytest.raises(ValueError, match="support"):
        graph.log_prob(mistake(a))


@pytest.mark.parametrize("self_links", [True, False])
def test_the_balanced_loss_is_the_published_one(self_links: bool) -> None:
    size, a = 6, random_graphs(1, 6)
    pair = VGAE(size, pv.StandardNormal(2), torch.randn(size, 3))
    torch.manual_seed(5)
    ours = BalancedGraphLoss(self_links=self_links).loss(pair.model, pair.guide, a)
    torch.manual_seed(5)
    q = pair.q_z(a)
    z = q.to_event(1).rsample()[0]
    # The published loss: a weighted mean over the N² ordered pairs, and a divergence divided by N². Nodes are their own
    # neighbours in its target, but not in its count of edges.
    target, edges, ordered = a[0].to(z) + torch.eye(size), a.sum(), size * (size - 1)
    weight, norm = (ordered - edges) / edges, ordered / (2 * (ordered - edges))
    entries = torch.nn.functional.binary_cross_entropy_with_logits(
        z @ z.mT, target, pos_weight=weight, reduction="none"
    )
    divergence = torch.distributions.kl_divergence(q, pv.StandardNormal(2)()).sum()
    published = (norm * (entries if self_links else entries * (1 - torch.eye(size))).sum() + divergence) / size**2
    # The cross-entropy of both (i, j) and (j, i) times norm is that of i < j times 2 norm.
    assert float(published.detach()) * size**2 == pytest.approx(ours, rel=1e-10)


def test_minus_the_balanced_loss_lies_below_the_elbo() -> None:
    a = random_graphs(2, 6)
    pair = VGAE(6, pv.StandardNormal(2))
    for seed in range(5):
        values = []
        for loss in (BalancedGraphLoss(), TraceMeanField_ELBO()):
            torch.manual_seed(seed)
            values.append(-loss.loss(pair.model, pair.guide, a))
        assert values[0] < values[1]


def test_a_balanced_loss_weighs_both_kinds_of_pairs_alike() -> None:
    # At z = 0 every pair costs log 2, and each kind has the weight of all pairs.
    def guide(a: Tensor) -> Tensor:
        return pyro.sample("z", dist.Normal(torch.zeros(1, 8, 2), 1.0).to_event(2))

    def model(a: Tensor) -> None:
        pyro.sample("a", InnerProductGraph(0 * guide(a)), obs=a)

    loss = BalancedGraphLoss(self_links=False).loss(model, guide, random_graphs(1, 8))
    assert loss == pytest.approx(2 * 28 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("value", [False, True])
def test_a_graph_without_edges_or_without_gaps_has_no_balance(value: bool) -> None:
    a = torch.full((1, 4, 4), value) & ~torch.eye(4, dtype=torch.bool)
    pair = VGAE(4, pv.StandardNormal(2))
    with pytest.raises(ValueError, match="lacks one of the two"):
        pv.fit(pair, a, epochs=1, batch_size=1, loss=BalancedGraphLoss(), progress=False)


@pytest.mark.parametrize("sizes", [{"hidden": 0}, {"outputs": 0}])
def test_convolutions_without_width_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        GraphConvolutions(**{"num_nodes": 4, "outputs": 2} | sizes)
