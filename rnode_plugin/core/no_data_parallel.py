"""What is said to whoever wraps a model that remembers its last solve in DataParallel."""

from __future__ import annotations

from typing import NoReturn

from ..errors import ConfigError

__all__ = ["OneProcessADevice"]


class OneProcessADevice:
    """A module that DataParallel refuses: its copies would lose penalties and NFE with the thread they ran in."""

    def _replicate_for_data_parallel(self) -> NoReturn:  # what torch's DataParallel calls for each module inside
        raise ConfigError(
            f"{type(self).__name__} does not work under DataParallel. Use one process a device: "
            "DistributedDataParallel, Lightning's strategy='ddp', or rnode-cli train --devices N."
        )
