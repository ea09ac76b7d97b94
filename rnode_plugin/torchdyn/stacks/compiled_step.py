"""CompiledSteps: the steps of a NeuralODE whose field is a recognised stack, each one graph of torch.compile.

The graph holds the stages, their products with the Jacobian and the penalties. Nothing in it differentiates, so
torch.compile has one derivative to take: it has neither forward-mode AD nor a double backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchdyn.core.defunc import DEFunc, DEFuncBase

from ...core.augmented import Dynamics
from ...core.regularizers import Regularizer, kind_of
from ...core.tensors.transforms_active import transforms_active
from ...core.trace_estimators import Exact, Hutchinson, get_estimator
from ...errors import ConfigError
from ...fields.kernels.compile import compiled, works
from ...fields.recognise import RecognisedStack, recognise
from ...fields.traced import TracedStack
from ...solvers.steps.step import Step, StepTaker, step_taker
from ...solvers.steps.tableaus import Method
from ...types import BoundDynamics, Rates
from ..cnf import CNF
from ..wrapped.velocity import Counter, counters

__all__ = ["CompiledSteps", "check_compile"]

_STACKS = (
    "a nested nn.Sequential of nn.Linear (and torchdyn's DepthCat) with one kind of activation between them: Tanh, "
    "Softplus, ELU, SiLU or GELU; or a CNF of one with the trace estimator 'exact', 'gaussian' or 'rademacher'"
)


def check_compile(
    vector_field: Any,
    *,
    regularizers: Iterable[Regularizer],
    trace_noise: str,
    sensitivity: str,
    known_solver: bool,
    whole_state: bool,
) -> None:
    """Refuse what ``compile=True`` cannot compile.

    Args:
        vector_field: as given to NeuralODE.
        regularizers, trace_noise, sensitivity: of the NeuralODE.
        known_solver: whether the solver is one of those that have a name.
        whole_state: whether the state is that of the field: order 1, no ``integral_loss``, no ``penalized``.

    Raises:
        ConfigError: which says what to do.
    """
    if sensitivity.endswith("adjoint"):
        raise ConfigError(
            f"compile=True compiles steps and their gradient, and sensitivity={sensitivity!r} has a solve of its "
            "own for it: use 'autograd' or 'checkpointed'."
        )
    if not known_solver:
        raise ConfigError("compile=True needs a solver with a name, such as 'rk4' or 'dopri5', not an object.")
    if not whole_state:
        raise ConfigError("compile=True does not work with order > 1, integral_loss or penalized.")
    for each in regularizers:
        if kind_of(each) not in ("rate", "span") or not set(getattr(each, "needs", ())) <= {"vjp"}:
            raise ConfigError(
                f"compile=True compiles penalties that are rates of the velocity and of one product with the "
                f"Jacobian, such as 'kinetic' and 'jacfrob', not {each.name!r}."
            )
    if _stack_of(vector_field) is None or not _is_one_product(get_estimator(trace_noise)):
        raise ConfigError(
            f"compile=True compiles {_STACKS}. For another field give torch.compile(field) instead, which compiles "
            "its evaluation."
        )


@dataclass
class CompiledSteps:
    """The compiled steps of one NeuralODE.

    Attributes:
        checked: the penalties that an evaluation without torch.compile has checked: their shapes and dtypes, and
            that they do not write into the state.
    """

    checked: set[tuple[str, ...]] = field(default_factory=set)

    def works(self) -> bool:
        """Whether steps can be compiled here; otherwise all goes on as without ``compile=True``."""
        return works() and not transforms_active()

    def bind(
        self, vf: Any, x: Tensor, regularizers: Sequence[Regularizer], trace_noise: str
    ) -> tuple[BoundDynamics, Callable[[Method], StepTaker]]:
        """The rates of a solve from ``x``, and what makes its steps.

        Raises:
            ConfigError: if ``x`` is not a state of the field, and under autocast.
        """
        wrapped: Any = vf.vf if type(vf) is DEFunc else vf
        field: Any = wrapped.vf if type(wrapped) is DEFuncBase else wrapped
        stack = _stack_of(field)
        if stack is None:
            raise ConfigError(f"the vector field has changed, and compile=True compiles {_STACKS}.")
        cnf = field if isinstance(field, CNF) else None
        event = x if cnf is None else x[:, 1:]
        if not stack.fits(event):
            raise ConfigError(
                f"compile=True needs a state (B, D) that the layers take, in their dtype; this one is "
                f"{tuple(x.shape)}, {x.dtype}."
            )
        if torch.is_autocast_enabled(x.device.type):
            raise ConfigError("compile=True computes in the dtype of the state: leave out either it or autocast.")
        if cnf is None:
            rates = _of_state(TracedStack(stack), x, regularizers, trace_noise)
        else:
            rates = _of_cnf(TracedStack(stack), cnf, event, regularizers)
        counted, names = counters(vf), tuple(each.name for each in regularizers)
        learns = any(p.requires_grad for layer in stack.layers for p in layer.module.parameters())

        def evaluate(t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
            _count(counted, 1)
            return rates(t, z, products=products)

        def make(method: Method) -> StepTaker:
            def take(z: Tensor, t: Tensor, dt: Tensor, first: Rates | None, product_stage: int | None) -> Step:
                if names not in self.checked:
                    rates(t, z)
                    self.checked.add(names)
                if learns and torch.is_grad_enabled() and not z.requires_grad:
                    z = z.detach().requires_grad_()  # the later steps' do: one graph serves all
                # times come as scalars, with one entry and as views of others: again, one graph serves all
                times = (t.reshape(()).clone(), dt.reshape(()).clone())
                step = compiled(_step, whole=True)(rates, method, z, *times, first)
                _count(counted, step.nfe)
                return step

            return take

        return evaluate, make


def _step(rates: BoundDynamics, method: Method, z: Tensor, t: Tensor, dt: Tensor, first: Rates | None) -> Step:
    """What torch.compile sees."""
    return step_taker(rates, method)(z, t, dt, first, None)


def _of_state(
    stack: TracedStack, x: Tensor, regularizers: Sequence[Regularizer], trace_noise: str
) -> BoundDynamics:
    dynamics = Dynamics(stack, regularizers=regularizers, estimator=trace_noise, divergence=False)
    return dynamics.bind(dynamics.draw(x))


def _of_cnf(stack: TracedStack, cnf: CNF, event: Tensor, regularizers: Sequence[Regularizer]) -> BoundDynamics:
    dynamics = Dynamics(stack, regularizers=regularizers, estimator=cnf.trace_estimator)  # pyright: ignore[reportArgumentType]
    noise = cnf.draw_noise(event) if cnf.noise_dist is None else cnf.noise_dist.sample((len(event),)).to(event)

    def rates(t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        found = dynamics.evaluate(t, z[:, 1:], noise)
        assert found.dlogdet is not None
        return Rates(torch.cat([-found.dlogdet[:, None], found.dz], 1), None, found.penalties)

    return rates


def _stack_of(vector_field: Any) -> RecognisedStack | None:
    if not isinstance(vector_field, CNF):
        return recognise(vector_field)
    flat = vector_field.event_shape is None or len(vector_field.event_shape) == 1
    hooked = vector_field._forward_hooks or vector_field._forward_pre_hooks
    if vector_field.order != 1 or not flat or hooked or not _is_one_product(vector_field.trace_estimator):
        return None
    return recognise(vector_field.net)


def _is_one_product(estimator: Any) -> bool:
    return isinstance(estimator, Exact) or (isinstance(estimator, Hutchinson) and estimator.count == 1)


def _count(counted: Iterable[Counter], evaluations: int) -> None:
    for counter in counted:
        counter["nfe"] += evaluations
