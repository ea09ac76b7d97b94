"""History: the penalties and step lengths of a model's last solves."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError
from .integrals import Integrals, weighted_sum
from .regularizers import NONE, Regularizers
from .schedules import Lambda


class History(Mapping[str, Tensor]):
    """The penalties and step lengths that a model or a block of solves keeps of its solves.

    As a mapping it is the integral of each penalty ``(B,)`` by name, differentiable, for the last solve or summed
    over several. A copied or unpickled history contains no solve, which also keeps graphs out of a deepcopy of the
    model.

    Args:
        regularizers: the regularizers of the model or the block.
        longest_safe_steps: see below.
        absent: advice for the error that is raised before the first solve.

    Attributes:
        is_collecting: whether a :meth:`collecting` block is open, in which each solve counts.
        longest_safe_steps: of a model that begins warm, the longest step that would have passed in the last solve
            of an adaptive solver, ``{block: {direction: step}}``, from which the next such solve of this block
            begins. The directions of time are ``"forward"`` and ``"backward"``, and ``"forward adjoint"`` and
            ``"backward adjoint"`` for the backward pass of a continuous adjoint. Copies keep the steps,
            a ``state_dict`` does not have them, and ``model.history.longest_safe_steps.clear()`` forgets them.
            None: each solve begins with the first step of its solver.
    """

    def __init__(
        self,
        regularizers: Regularizers = NONE,
        *,
        longest_safe_steps: dict[int, dict[str, float]] | None = None,
        absent: str = "call the model first.",
    ) -> None:
        self.regularizers, self.longest_safe_steps = regularizers, longest_safe_steps
        self._absent = absent
        self._kept: list[Integrals] = []
        self.is_collecting = False
        self._begun = False  # whether a solve has begun but not ended
        self._announced = False  # whether a solve has ever begun

    # both leave out the solves, because deepcopy refuses tensors with a graph
    def __deepcopy__(self, memo: dict[int, object]) -> History:
        steps = copy.deepcopy(self.longest_safe_steps, memo)
        return History(copy.deepcopy(self.regularizers, memo), longest_safe_steps=steps, absent=self._absent)

    def __reduce__(self) -> tuple[Any, ...]:
        kept = {"longest_safe_steps": self.longest_safe_steps, "absent": self._absent}
        return functools.partial(History, **kept), (self.regularizers,)

    def __repr__(self) -> str:
        return f"History({', '.join(self)})"

    @contextmanager
    def collecting(self) -> Iterator[History]:
        """Collect the penalties of every solve in the block, and keep them after the block until the next solve.

        A solve under ``torch.no_grad()`` that integrated no penalties, such as one for a log line, does not count.

        Raises:
            ConfigError: inside another such block.
        """
        if self.is_collecting:
            raise ConfigError("a block is already collecting these penalties; leave it first.")
        self.discard()
        self.is_collecting = True
        try:
            yield self
        finally:
            self.is_collecting = False

    def begin(self) -> None:
        """Start a new solve and discard the previous one, unless a ``collecting`` block is active."""
        self._begun = self._announced = True
        if not self.is_collecting:
            self.discard()

    def discard(self) -> None:
        """Forget the solves so far."""
        self._kept = []

    def add(self, integrals: Integrals) -> None:
        """Keep the integrals of a solve. This ends the solve that :meth:`begin` has started."""
        if not (self._announced or self.is_collecting):  # a model that never calls `begin`
            self.discard()
        self._begun = False
        self._kept.append(integrals)

    def warm_start(self, t_span: Tensor | Sequence[float], *, block: int = 0) -> dict[str, Any]:
        """The arguments with which ``Solver.solve`` begins warm; none for a model that does not.

        After the solve :meth:`keep_step` keeps its longest safe step. The step of a continuous adjoint's backward
        pass is kept by the pass itself, which runs later.

        Args:
            t_span: the times of the solve, ``(T,)``.
            block: the number of the neural ODE in the model.
        """
        if (place := self._steps_of(t_span, block)) is None:
            return {}
        steps, way = place
        adjoint = f"{way} adjoint"
        return {
            "safe_step": steps.get(way),
            "adjoint_safe_step": steps.get(adjoint),
            "keep_adjoint_step": functools.partial(steps.__setitem__, adjoint),
        }

    def keep_step(self, step: float | None, t_span: Tensor | Sequence[float], *, block: int = 0) -> None:
        """Keep the ``longest_safe_step`` of a solution; arguments as for :meth:`warm_start`."""
        if step is not None and (place := self._steps_of(t_span, block)) is not None:
            steps, way = place
            steps[way] = step

    def _steps_of(self, t_span: Tensor | Sequence[float], block: int) -> tuple[dict[str, float], str] | None:
        """The safe steps of a block and the direction of a solve; None if the solve does not begin warm.

        Inside of torch.compile no solve begins warm, and none is kept.
        """
        if self.longest_safe_steps is None or torch.compiler.is_compiling():
            return None
        times = torch.as_tensor(t_span)
        way = "forward" if times.numel() == 0 or bool(times.flatten()[-1] >= times.flatten()[0]) else "backward"
        return self.longest_safe_steps.setdefault(block, {}), way

    def __getitem__(self, name: str) -> Tensor:
        return self.as_dict()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.regularizers.by_name)

    def __len__(self) -> int:
        return len(self.regularizers)

    def as_dict(self) -> dict[str, Tensor]:
        """The integrals ``(B,)`` by name, summed over solves, which must have batches of one size.

        Without regularizers the dictionary is empty.

        Raises:
            ConfigError: if there was no solve yet, and for solves with batches of several sizes.
        """
        rows = [solve.by_name for solve in self._readable()]
        if not rows[1:]:
            return dict(rows[0]) if rows else {}
        sizes = sorted({len(value) for row in rows for value in row.values()})
        if sizes[1:]:
            raise ConfigError(
                f"{len(rows)} solves had batches of {' and '.join(map(str, sizes))} samples, so their penalties "
                "have no sum per sample: use the scalar sum over all solves, loss() or a model's reg_loss()."
            )
        return {name: torch.stack([row[name] for row in rows]).sum(0) for name in rows[0]}

    def loss(self, *, step: int | None = None, **lambdas: Lambda) -> Tensor:
        """The sum of :meth:`Integrals.loss` over the solves: a scalar in nats/dim.

        Without regularizers it is 0, even before the first call.

        Args:
            step, lambdas: as there.

        Raises:
            ConfigError: if there was no solve yet, and as there.
        """
        return weighted_sum(self._readable(), self.regularizers, step, lambdas)

    def _readable(self) -> list[Integrals]:
        """The solves whose penalties are summed."""
        # without regularizers a sum over nothing, before a call as after it
        return [solve.check() for solve in self._solves()] if self.regularizers else []

    def _solves(self) -> list[Integrals]:
        """The solves that count."""
        kept = self._kept
        if not kept:
            if self._begun:
                raise ConfigError(
                    "there are no penalties: the last call ended in an error before they were complete. Its error "
                    "names the cause. Call the model again."
                )
            raise ConfigError(f"there are no penalties yet: {self._absent}")
        # leave out solves for a log line; if there are no others, the error is about them
        asked = [solve for solve in kept if solve.with_gradients or not solve.missing]
        return asked or kept

    @property
    def nfe(self) -> int:
        """The sum of :attr:`Integrals.nfe` over the solves, also without regularizers.

        Raises:
            ConfigError: as :meth:`as_dict` does with regularizers.
        """
        return sum(solve.nfe for solve in self._solves())


def refuse_data_parallel(self: object) -> NoReturn:
    """Refuse DataParallel for a module, since its copies run in threads, and penalties and NFE would be lost.

    A class of modules has it as ``_replicate_for_data_parallel``, which torch calls for each module inside.
    """
    raise ConfigError(
        f"{type(self).__name__} does not work under DataParallel. Use one process per device: "
        "DistributedDataParallel, Lightning's strategy='ddp', or rnode-cli train --devices N."
    )
