"""Tally: counts the solves that were penalized, and averages each penalty."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from .modes import transforms_active


class Tally:
    """Counts the solves whose penalties took part in a backward pass, and averages their penalties.

    A copy of a model shares the tally, so that its solves are counted with the others.

    Attributes:
        solves: number of these solves. Solves inside a transform of ``torch.func`` are not counted.
    """

    def __init__(self) -> None:
        self.solves = 0
        self._sums: dict[str, Tensor | int] = defaultdict(int)  # stay on the device: only `means` waits for them
        self._samples: dict[str, int] = defaultdict(int)

    def __deepcopy__(self, memo: dict[int, object]) -> Tally:
        return self

    def __reduce__(self) -> tuple[type[Tally], tuple[()]]:
        return Tally, ()

    def watch(self, cost: Tensor, integrals: Mapping[str, Tensor]) -> None:
        """Count a solve once, when a backward pass reaches its ``cost``.

        Args:
            cost: the sum of eq. 17 that is added to the loss, a scalar.
            integrals: the integral of each penalty ``(B,)`` by name.
        """
        if not cost.requires_grad or transforms_active():
            return
        # a list, so that the hook can empty it: the hook lives as long as the graph, the values need not
        values: list[dict[str, Tensor]] = [{name: each.detach() for name, each in integrals.items()}]

        def count(gradient: Tensor) -> None:
            if values:  # empty in a second backward pass through the same graph
                self.solves += 1
                for name, each in values.pop().items():
                    self._sums[name] += each.sum()
                    self._samples[name] += each.numel()

        cost.register_hook(count)

    @property
    def means(self) -> dict[str, float]:
        """The mean of each penalty's integral over all samples of the counted solves, by name."""
        return {name: float(total) / max(1, self._samples[name]) for name, total in self._sums.items()}
