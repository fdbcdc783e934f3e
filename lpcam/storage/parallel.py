"""One function over many pictures, on all cores, or beside a pass that keeps the cores busy."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from rich.progress import track

T = TypeVar("T")


def for_each(function: Callable[[T], None], items: Sequence[T], title: str) -> None:
    """Call a function with each item, on as many threads as torch would use, with a progress bar.

    Torch itself then computes on one thread for each. Threads suffice, for the work on a picture
    lies in libraries that let other threads run: torch, codecs, the dense CRF.

    Args:
        function: What to do with an item, in any order. Its first exception is raised here, and
            items not begun by then are left.
        items: The items.
        title: Title of the progress bar.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for _ in track(pool.map(function, items), title, total=len(items)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # some of torch's libraries have one number for all threads


class Beside:
    """Calls functions on half of the cores, a bounded number of them waiting, in any order.

    What they raise is raised by a later :meth:`call`, or at the end.

    Args:
        waiting: How many may wait for each core.
    """

    def __init__(self, waiting: int = 8) -> None:
        threads = max(1, torch.get_num_threads() // 2)
        self._pool = ThreadPoolExecutor(threads)
        self._futures: deque[Future[Any]] = deque()
        self._waiting = waiting * threads

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function soon; wait first while too many wait already."""
        self._futures.append(self._pool.submit(function, *arguments))
        while len(self._futures) > self._waiting:
            self._futures.popleft().result()

    def finish(self) -> None:
        """Wait until all are done; nothing can be called after that."""
        while self._futures:
            self._futures.popleft().result()
        self._pool.shutdown()
