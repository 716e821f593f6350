"""Internals of torch and Pyro that capture relies upon, in one table.

torch and Pyro may change these names without notice. After an update of either, run ``tests/capture`` first: it looks
up every name of :data:`INTERNALS`. Tested with torch 2.14 and 2.15 and with pyro-ppl 1.9.
"""

from __future__ import annotations

from types import CodeType

import pyro
from pyro.infer.util import Dice
from pyro.ops.provenance import ProvenanceTensor

__all__ = ["INTERNALS", "NON_FAKE_TENSOR", "PYRO_SKIPS_ZEROS", "PYRO_WARNS", "TESTED", "ProvenanceTensor"]

# Versions that the tests have run with.
TESTED = {"torch": ("2.14", "2.15"), "pyro": ("1.9",)}

# What each name is needed for.
INTERNALS = {
    "torch.fx.experimental.proxy_tensor.make_fx": "traces a program on tensors without values",
    "torch._inductor.standalone_compile": "compiles a traced program",
    "torch._inductor.config.patch": "sets options of the compiler",
    "torch._inductor.config.fallback_random": "compiled programs draw the noise of eager ones",
    "torch._inductor.cpp_builder.get_cpp_compiler": "finds out whether there is a C++ compiler",
    "torch._inductor.ir": "names the logger of the compiler",
    "torch._dynamo.utils.counters": "counts hits of the compiler's cache on disk",
    "torch._ops.OpOverload": "is the type of an operation in a traced program",
    "torch.nn.Module.named_buffers": "stands for nn.Module._parameters and nn.Module._buffers, which are swapped",
    "torch.optim.Optimizer.register_step_pre_hook": "fills Optimizer._optimizer_step_pre_hooks, which is read",
    "torch.optim.Optimizer.register_step_post_hook": "fills Optimizer._optimizer_step_post_hooks, which is read",
    "torch.optim.optimizer._global_optimizer_pre_hooks": "tells whether hooks run before every optimiser's step",
    "torch.optim.optimizer._global_optimizer_post_hooks": "tells whether hooks run after every optimiser's step",
    "torch._foreach_add_": "counts the steps of fused Adam",
    "torch._fused_adam_": "is the kernel of fused Adam",
    "torch.UntypedStorage._cdata": "tells whether two tensors share memory",
    "pyro.util.warn_if_nan": "asks for a tensor's value, to warn of NaN",
    "pyro.util.warn_if_inf": "asks for a tensor's value, to warn of infinities",
    "pyro.infer.util.Dice.compute_expectation": "asks for a tensor's value, to skip outcomes of probability 0",
    "pyro.ops.provenance.ProvenanceTensor": "marks draws without rsample in TraceGraph_ELBO",
}

# Pyro's warnings of NaN and infinities. A step refuses a loss that is not finite itself.
PYRO_WARNS: frozenset[CodeType] = frozenset({pyro.util.warn_if_nan.__code__, pyro.util.warn_if_inf.__code__})
# TraceEnum_ELBO skips outcomes of probability 0. Without that they give 0 · (−∞) = NaN, which a step refuses too.
PYRO_SKIPS_ZEROS: CodeType = Dice.compute_expectation.__code__
# Part of torch's message about a tensor from outside the program; its AssertionError has no type of its own.
NON_FAKE_TENSOR = "convert all Tensors to FakeTensors"
