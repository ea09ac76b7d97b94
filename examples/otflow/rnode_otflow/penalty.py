"""OT-Flow's penalty, which reads the potential of a field."""

from __future__ import annotations

from torch import Tensor

from rnode_plugin.core.field_evaluation import FieldEvaluation
from rnode_plugin.errors import ConfigError
from rnode_plugin.regularizers import About, Source, rate

__all__ = ["hjb"]


@rate(
    "hjb",
    needs={"field"},
    divided_by_dims=False,
    about=About(
        "abs(∂Φ/∂t − ‖∇Φ‖²/2) for a potential field f = −∇Φ, not divided by D",
        cost="one pass over the potential",
        source=Source("OT-Flow", "Onken et al.", 2021),
    ),
)
def hjb(evaluation: FieldEvaluation) -> Tensor:
    """``|dPhi/dt - ||grad Phi||^2 / 2|`` for a potential field ``f = -grad Phi`` (OT-Flow; Onken et al., 2021).

    It is 0 if Phi solves the Hamilton-Jacobi-Bellman equation, as the potential of the optimal transport does.
    ``evaluation.net`` is the module of the solve, whose ``potential_rate(t, z)`` is ``dPhi/dt (B,)``.
    """
    net = evaluation.net
    if not hasattr(net, "potential_rate"):
        raise ConfigError(
            f"'hjb' is for a field with `potential_rate(t, z)`, such as PotentialField, not {type(net).__name__}."
        )
    # with f = -grad Phi, ||grad Phi||^2 is the squared speed
    return (net.potential_rate(evaluation.t, evaluation.z) - evaluation.dz.flatten(1).square().sum(1) / 2).abs()
