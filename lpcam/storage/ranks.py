"""The processes of a distributed job: which one this is, and how they keep together.

Where Lightning starts them it joins them when its first trainer runs; before that there is nothing
to wait for, for each process comes by the same way to the trainer that joins them. Those that
torchrun or Slurm starts are joined at the beginning.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from lpcam.errors import InputError

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
    if joined():
        import torch

        torch.distributed.barrier()


def agree(value: T) -> T:
    """What the first process says, in all of them."""
    if not joined():
        return value
    import torch

    said: list[Any] = [value]
    torch.distributed.broadcast_object_list(said)
    return said[0]


def dealt(count: int) -> range:
    """Which of so many items are this process's; all, where no others are joined yet."""
    if not joined():
        return range(count)
    import torch

    return range(rank(), count, torch.distributed.get_world_size())


def gathered(make: Callable[[], T]) -> list[T]:
    """What a function gives in each of the processes, in all of them.

    Raises:
        InputError: It did in one of them; so no other waits for that one.
    """
    if not joined():
        return [make()]
    import torch

    said: Any
    try:
        said = make()
    except InputError as error:
        said = error
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, said)
    for one in found:
        if isinstance(one, InputError):
            raise one
    return found


def joined() -> bool:
    """Whether the processes of a job can talk already; never in a job of one."""
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()
