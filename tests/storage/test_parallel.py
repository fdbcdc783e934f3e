from collections.abc import Iterator
from threading import Barrier, Event, Timer, get_ident
from time import sleep

import pytest
import torch

from lpcam.storage.parallel import Beside, for_each


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


@pytest.mark.usefixtures("three_threads")
def test_calls_beside_are_all_made_and_few_wait() -> None:
    """Three cores: one thread, and two calls wait at most."""
    done: list[int] = []
    beside = Beside(waiting=2)
    go = Event()

    def note(item: int) -> None:
        go.wait(20)
        done.append(item)

    for item in range(2):
        beside.call(note, item)
    assert not done
    Timer(0.2, go.set).start()
    for item in range(2, 20):
        beside.call(note, item)
        assert len(done) >= item - 2
    beside.finish()
    assert sorted(done) == list(range(20))


def test_what_a_call_beside_raises_is_raised() -> None:
    beside = Beside()
    beside.call(int, "7")
    beside.call(int, "seven")
    with pytest.raises(ValueError, match="seven"):
        beside.finish()
