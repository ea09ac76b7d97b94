"""The attributes through which torchdyn hands time, control and noise to layers: filled and given back.

A layer has such a placeholder if it is torchdyn's own, or if the attribute is a plain one that holds None. A
submodule's own ``t`` or ``_control``, whatever it is, is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torchdyn.nn import DataControl, DepthCat
from torchdyn.nn.galerkin import GalLayer

from .state_layout import StateLayout, is_cnf

__all__ = ["CONTROL", "Slots", "find_slots"]

CONTROL = "_control"
"""torchdyn's private name for the initial state that a layer reads; a test fails by name when it goes."""


class Slot(NamedTuple):
    """One attribute of one module."""

    attributes: dict[str, Any]
    name: str

    def fill(self, value: Any) -> None:
        self.attributes[self.name] = value

    def detach(self) -> None:
        self.fill(self.attributes[self.name].detach())


@dataclass
class Slots:
    """The placeholders of one field and the values of one solve.

    Attributes:
        times: filled with the time of each evaluation.
        values: filled with what belongs to the solve, the noise and the control.
        borrowed: of modules that are not torchdyn's; they hold None again after each evaluation.
        results: weights that Galerkin layers compute and keep.
    """

    times: list[Slot] = field(default_factory=list)
    values: list[tuple[Slot, Tensor]] = field(default_factory=list)
    borrowed: list[Slot] = field(default_factory=list)
    results: list[Slot] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.times or self.values or self.borrowed or self.results)

    def fill(self, t: Tensor) -> None:
        """Set all of them for an evaluation at ``t``."""
        for slot in self.times:
            slot.fill(t)
        for slot, value in self.values:
            slot.fill(value)

    def clear(self, t: Tensor) -> None:
        """Leave no graph on a module: it would keep memory, and deepcopy refuses it."""
        if t.requires_grad:
            for slot in self.times:
                slot.fill(t.detach())
        for slot in self.results:
            slot.detach()
        for slot in self.borrowed:
            slot.fill(None)


def find_slots(vf: nn.Module, x: Tensor, layout: StateLayout) -> Slots:
    """The placeholders of ``vf`` with the values of a solve that starts at ``x``.

    Noise is drawn and the control is taken in the order of the modules, as torchdyn does: a layer behind a CNF
    has a control without the CNF's trace, in the shape of the CNF's event.
    """
    slots, ahead, shape = Slots(), layout.cost, None
    for module in vf.modules():
        _add_time(slots, module)
        if is_cnf(module):
            _add_noise(slots, module, x, ahead)
            ahead += 1
            shape = getattr(module, "event_shape", None)
        _add_control(slots, module, x, ahead, shape)
        if isinstance(module, GalLayer):
            slots.results += [Slot(vars(module), name) for name in ("weight", "bias") if name in vars(module)]
    return slots


def _add_time(slots: Slots, module: nn.Module) -> None:
    slot = Slot(vars(module), "t")
    if isinstance(module, DepthCat):
        slots.times.append(slot)
    elif _holds_none(module, "t"):
        slots.times.append(slot)
        slots.borrowed.append(slot)


def _add_noise(slots: Slots, cnf: Any, x: Tensor, ahead: int) -> None:
    if cnf.noise_dist is not None:
        noise = cnf.noise_dist.sample((x.shape[0],)).to(x)
    else:
        draw = getattr(cnf, "draw_noise", None)  # our CNF knows its estimator and needs no distribution
        noise = None if draw is None else draw(x[:, ahead + 1 :])
    if noise is not None:
        slots.values.append((Slot(vars(cnf), "noise"), noise))


def _add_control(slots: Slots, module: nn.Module, x: Tensor, ahead: int, shape: tuple[int, ...] | None) -> None:
    own = isinstance(module, DataControl)
    if not (own or _holds_none(module, CONTROL)):
        return
    control = x[:, ahead:].detach()
    slot = Slot(vars(module), CONTROL)
    slots.values.append((slot, control if shape is None else control.reshape(len(control), *shape)))
    if not own:
        slots.borrowed.append(slot)


def _holds_none(module: nn.Module, name: str) -> bool:
    attributes = vars(module)
    return name in attributes and attributes[name] is None
