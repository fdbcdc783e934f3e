"""One function over many pictures, on all cores."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
