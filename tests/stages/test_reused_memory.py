"""Freed memory is used again during a pass, and given back after it."""

import resource
import subprocess
import sys
from textwrap import dedent

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")

SCRIPT = dedent(
    """
    import resource
    import torch
    from lpcam.stages.memory import reused_memory

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.ones(2**24)  # 64 MB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    plain, size = faults(), resident()
    with reused_memory():
        faults()  # the heap grows to what is needed
        inside = faults()
    print(plain, inside, resident() - size)
    """
)


def test_pages_are_touched_once_inside_and_given_back_after() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    plain, inside, grown = map(int, done.stdout.split())
    pages = 2**26 // resource.getpagesize()
    if plain < pages:
        pytest.skip("this allocator keeps memory by itself")
    assert inside < pages / 4
    assert grown < 2**25
