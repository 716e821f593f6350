"""The table of pitfalls: every row has a test that shows the mistake by an exact case, and every such test a row."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

ROWS = {
    1: "a point mass on a continuous site does not bound log p(x)",
    2: "a plate that subsamples scales inside the logarithm",
    3: "importance weights of a batch are not weights of its data",
    4: "TraceMeanField_ELBO is wrong for guides in another order than the model",
    5: "a plain module in Pyro's SVI is not trained",
    6: "eager SVI reads tensors at every site and optimises every tensor by itself",
    7: "a Pyro program is no graph for torch.compile; JitTrace_ELBO stands on torch.jit.trace",
    8: "autograd through log-weights is wrong for guides that are not reparameterised",
    9: "a mixture has no rsample: fine as a prior, not in a guide",
    10: "estimators of the likelihood: means in the wrong place, signs, counts, priors, updates on test data",
    11: "a mean over pixels is another β",
    12: "gray values have no Bernoulli likelihood",
    13: "a learned scale without a floor runs to zero",
    14: "loading a pickled checkpoint runs it",
    15: "batch statistics couple the data of a batch",
    16: "equal weights have no tail",
    17: "a bound registered as the divergence",
    18: "a scale fitted to each batch flatters",
    19: "two stochastic bounds are no interval",
    20: "a marginal over corruptions contains the draw's own",
    21: "a latent that the guide lacks is never paid for",
    22: "recordings bake in numbers and sizes",
    23: "Adam hides a wrong scale of the gradient",
}
TESTS = Path(__file__).parents[1]


def numbered_tests() -> dict[int, list[str]]:
    """Return the names of the tests test_NN_… by row, from the files' own text."""
    found: dict[int, list[str]] = {}
    for path in TESTS.rglob("test_pitfalls*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and (match := re.match(r"test_(\d\d)_", node.name)):
                found.setdefault(int(match[1]), []).append(node.name)
    return found


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    assert sorted(numbered_tests()) == list(ROWS)


def test_what_the_example_draws_are_rows_of_the_table() -> None:
    wrong = runpy.run_path(str(TESTS.parent / "examples" / "evaluation" / "plot_pitfalls.py"))["WRONG"]
    assert len(wrong) >= 5
    assert {int(name.split(":")[0]) for name in wrong} <= set(ROWS)
