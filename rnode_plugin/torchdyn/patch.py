"""install() and uninstall(): torchdyn's own NeuralODE accepts ``regularizers=``, wherever it was imported."""

from __future__ import annotations

from typing import Any

from torchdyn.core.neuralde import NeuralODE as TorchdynNeuralODE

from .neural_ode import NeuralODE

__all__ = ["install", "uninstall"]

# The class itself is changed, not the names that refer to it: modules that imported it, subclasses, isinstance
# and pickle all keep working. It gets what our class defines, but for what Python itself puts into every class.
_BEHAVIOUR = {
    name: value
    for name, value in vars(NeuralODE).items()
    if name == "__init__" or not name.startswith(("__", "_abc_"))
}

_replaced: dict[str, Any] = {}
_ABSENT = object()


def install() -> None:
    """Give torchdyn's ``NeuralODE`` the arguments and the behaviour of :class:`~rnode_plugin.NeuralODE`.

    From then on each of its objects, those made before included, is solved by this package: with the same
    values, with right gradients, and with ``regularizers=``, ``trace_noise=``, ``max_nfe=`` and
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
    """Take back all that :func:`install` did; without it, nothing.

    Objects stay usable; what they were given beyond torchdyn's arguments no longer has an effect, and those with
    ``sensitivity="checkpointed"``, which torchdyn does not know, must be made anew.

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
