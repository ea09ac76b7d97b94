"""install() and uninstall(): torchdyn's own NeuralODE with the arguments and the behavior of ours."""

from __future__ import annotations

from torchdyn.core import neuralde as torchdyn_neuralde

from .neural_ode import THEIRS, NeuralODE

_Torchdyn = torchdyn_neuralde.NeuralODE

# install() changes torchdyn's class itself, not the names that refer to it. So modules that have imported it,
# subclasses, isinstance and pickle all keep working. The class gets all attributes of our class, except those that
# Python puts into every class.
_BEHAVIOR = {
    name: value
    for name, value in vars(NeuralODE).items()
    if name == "__init__" or not name.startswith(("__", "_abc_"))
}


def install() -> None:
    """Give torchdyn's ``NeuralODE`` the arguments and the behavior of :class:`~rnode_plugin.NeuralODE`.

    From then on every object of that class, also one that was made before, is solved by rnode_plugin: with the same
    values, with correct gradients, and with ``regularizers=``, ``trace_estimator=``, ``penalized=``,
    ``batch_dim=``, ``quadrature=``, ``warm_start=``, ``compile=``, ``max_nfe=`` and ``sensitivity="checkpointed"``.
    A second call changes nothing.

    It affects this process only. Solves by ``torchdyn.numerics.odeint`` and ``ODEProblem`` stay torchdyn's: take
    ``NeuralODE`` in the place of ``ODEProblem``, or :func:`~rnode_plugin.penalties_along` along the states.

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
    for name, value in _BEHAVIOR.items():
        setattr(_Torchdyn, name, value)


def uninstall() -> None:
    """Undo everything that :func:`install` did; without an install, do nothing.

    Objects remain usable, but arguments beyond torchdyn's lose their effect. Objects with
    ``sensitivity="checkpointed"``, which torchdyn does not have, must be made again.

    Example:
        >>> import inspect
        >>> from torchdyn.core import NeuralODE
        >>> install()
        >>> uninstall()
        >>> "regularizers" in inspect.signature(NeuralODE.__init__).parameters
        False
    """
    for name in _BEHAVIOR.keys() & vars(_Torchdyn).keys():
        if name in THEIRS:
            setattr(_Torchdyn, name, THEIRS[name])
        else:
            delattr(_Torchdyn, name)
