"""install() and uninstall(): torchdyn's own NeuralODE accepts ``regularizers=``, wherever it was imported."""

from __future__ import annotations

from typing import Any

from torchdyn.core.neuralde import NeuralODE as TorchdynNeuralODE

from .neural_ode import NeuralODE

__all__ = ["install", "uninstall"]

# The class itself is changed, not the names that refer to it: modules that imported it, subclasses, isinstance
# and pickle all keep working. It gets what our class defines, except what Python itself puts into every class.
_BEHAVIOUR = {
    name: value
    for name, value in vars(NeuralODE).items()
    if name == "__init__" or not name.startswith(("__", "_abc_"))
}

_replaced: dict[str, Any] = {}
_ABSENT = object()


def install() -> None:
    """Give torchdyn's ``NeuralODE`` the arguments and the behaviour of :class:`~rnode_plugin.NeuralODE`.

    From then on this package solves each of its objects, also those made before: with the same values, with
    correct gradients, and with ``regularizers=``, ``trace_noise=``, ``penalized=``, ``max_nfe=``, ``compile=`` and
    ``sensitivity="checkpointed"``. A second call changes nothing.

    It works in this process alone; ``rnode-cli exec SCRIPT`` calls it before a script that cannot be changed.

    Example:
        >>> import torch
        >>> from torchdyn.core import NeuralODE
        >>> install()
        >>> from rnode_plugin.fields import linear_field
        >>> model = NeuralODE(linear_field(2), solver="rk4", regularizers=["kinetic"])
        >>> _ = model(torch.randn(8, 2), torch.linspace(0, 1, 5))
        >>> tuple(model.regularization["kinetic"].shape)
        (8,)
        >>> uninstall()
    """
    if _replaced:
        return
    for name, value in _BEHAVIOUR.items():
        _replaced[name] = vars(TorchdynNeuralODE).get(name, _ABSENT)
        setattr(TorchdynNeuralODE, name, value)


def uninstall() -> None:
    """Undo all that :func:`install` did; without an install, do nothing.

    Objects stay usable. What they were given beyond torchdyn's arguments no longer has an effect. Those with
    ``sensitivity="checkpointed"``, which torchdyn does not know, must be made again.

    Example:
        >>> import inspect
        >>> from torchdyn.core import NeuralODE
        >>> install()
        >>> uninstall()
        >>> "regularizers" in inspect.signature(NeuralODE.__init__).parameters
        False
    """
    for name, value in _replaced.items():
        if value is _ABSENT:
            delattr(TorchdynNeuralODE, name)
        else:
            setattr(TorchdynNeuralODE, name, value)
    _replaced.clear()
