"""One-hot rows: a prior, and the relaxation for a guide."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_vae.distributions.one_hot import OneHots, RelaxedOneHots
from pyro_vae.networks.annealed import Annealed

__all__ = ["GumbelSoftmax", "OneHotPrior"]


class OneHotPrior(nn.Module):
    """Return p(z) = Π_g Categorical(π_g), uniform or given.

    Args:
        groups: G, number of categorical variables.
        categories: C, values of each.
        probabilities: π, (G, C), or (C,) for all groups; uniform without them.

    Raises:
        ValueError: for G < 1, C < 2, and probabilities that are not positive or do not sum to one.

    >>> OneHotPrior(20, 10)().log_prob(torch.eye(10).repeat(2, 1))
    tensor(-46.0517)
    """

    logits: Tensor

    def __init__(self, groups: int, categories: int, probabilities: Tensor | None = None) -> None:
        super().__init__()
        if groups < 1 or categories < 2:
            raise ValueError(f"groups is {groups}, categories {categories}; at least one group of two categories")
        self.groups, self.categories = groups, categories
        rows = torch.full((groups, categories), 1.0 / categories) if probabilities is None else probabilities
        rows = rows if rows.is_floating_point() else rows.to(torch.get_default_dtype())
        if tuple(rows.shape) not in ((categories,), (groups, categories)):
            raise ValueError(
                f"probabilities has shape {tuple(rows.shape)}, expected ({categories},) or ({groups}, {categories})"
            )
        sums = rows.sum(-1)
        # Rounding of a sum of C numbers below one.
        if not (rows > 0).all() or not ((sums - 1).abs() <= categories * torch.finfo(rows.dtype).eps).all():
            raise ValueError(
                f"probabilities must be positive and each group's sum to 1; they sum to {sums.flatten().tolist()}: "
                "divide them by probabilities.sum(-1, keepdim=True)"
            )
        self.register_buffer("logits", rows.log().expand(groups, categories).contiguous())

    def forward(self) -> OneHots:
        return OneHots(self.logits)


class GumbelSoftmax(nn.Module):
    """Relax one-hot rows at a temperature τ: their draws then have gradients.

    Args:
        temperature: τ > 0, a number or an :class:`~pyro_vae.Annealed` one.
        straight_through: round draws to one-hot rows, with the relaxed draws' gradients.

    Raises:
        ValueError: for a temperature that is not positive at its start or end.

    Reference:
        Jang, Gu and Poole (2017), Categorical reparameterization with Gumbel-softmax, ICLR; Maddison, Mnih and Teh
        (2017), The concrete distribution, ICLR.

    >>> GumbelSoftmax(0.5)(torch.zeros(3, 20, 10)).rsample().shape
    torch.Size([3, 20, 10])
    """

    def __init__(self, temperature: float | Annealed = 1.0, *, straight_through: bool = False) -> None:
        super().__init__()
        self.temperature = temperature if isinstance(temperature, Annealed) else Annealed(temperature, temperature, 0)
        if not min(self.temperature.start, self.temperature.end) > 0:
            raise ValueError(
                f"temperature goes from {self.temperature.start} to {self.temperature.end}; it must be positive: "
                "for one-hot draws, leave the relaxation out"
            )
        self.straight_through = straight_through

    def forward(self, logits: Tensor) -> RelaxedOneHots:
        return RelaxedOneHots(logits, self.temperature(), self.straight_through)
