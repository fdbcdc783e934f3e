from collections.abc import Iterator
from threading import Barrier, get_ident
from time import sleep

import pytest
import torch

from lpcam.storage.parallel import for_each


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_items_are_done_at_the_same_time() -> None:
    together = Barrier(3)  # breaks unless three threads wait at it

    def meet(item: int) -> None:
        seen[item] = (get_ident(), torch.get_num_threads())
        together.wait(timeout=20)

    seen: dict[int, tuple[int, int]] = {}
    for_each(meet, range(9), "Meeting")
    assert sorted(seen) == list(range(9))
    assert len({thread for thread, _ in seen.values()}) == 3
    assert {threads for _, threads in seen.values()} == {1}
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_an_exception_ends_it() -> None:
    begun = []

    def fail(item: int) -> None:
        begun.append(item)
        sleep(0.001)
        if item == 5:
            raise ValueError("five")

    with pytest.raises(ValueError, match="five"):
        for_each(fail, range(10_000), "Failing")
    assert len(begun) < 10_000
    assert torch.get_num_threads() == 3


def test_nothing_to_do() -> None:
    for_each(print, [], "Nothing")
