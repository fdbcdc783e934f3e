"""The processes of a distributed job: which one this is, and how they keep together.

Lightning starts them, and joins them when its first trainer runs. Before that there is nothing to
wait for: each process comes by the same way to the trainer that joins them.
"""

from typing import Any, TypeVar

T = TypeVar("T")


def is_main_process() -> bool:
    """Whether this is the first, or only, process of the job."""
    return rank() == 0


def rank() -> int:
    """Which process of the job this is."""
    from pytorch_lightning.utilities import rank_zero_only

    # Lightning sets it, from the environment at first and from its trainers later.
    return int(vars(rank_zero_only)["rank"])


def barrier() -> None:
    """Wait until every process has come here."""
    if _joined():
        import torch

        torch.distributed.barrier()


def agree(value: T) -> T:
    """What the first process says, in all of them."""
    if not _joined():
        return value
    import torch

    said: list[Any] = [value]
    torch.distributed.broadcast_object_list(said)
    return said[0]


def _joined() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()
