"""Real processes of a distributed job, without Lightning's trainer."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pytorch_lightning.utilities import rank_zero_only

from lpcam.storage.ranks import agree, barrier, dealt, gathered, is_main_process
from tests.conftest import ROOT

# Each process of a job prints what it finds. The second comes later, and finishes later.
PROCESS = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from lpcam.errors import InputError
from lpcam.storage.ranks import agree, dealt, gathered, is_main_process
from lpcam.storage.store import Stage

root, port, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
print(is_main_process(), agree(f"said by {rank}"))
stage = Stage(root, "maps", {"k": 1})
for _ in range(2):
    with stage.build(together=True) as folder:
        if folder:
            time.sleep(0.5 * rank)
            (folder / f"{rank}.txt").touch()
    print(folder is not None, sorted(path.name for path in stage.folder.glob("*.txt")))
print(list(dealt(5)), gathered(lambda: 10 * rank))

def fail():
    if rank == 1:
        raise InputError("the second's mistake")

try:
    gathered(fail)
except InputError as error:
    print(error)
dist.destroy_process_group()
"""


def environment(**ranks: str) -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "PYTHONPATH": str(ROOT), **ranks}


@pytest.mark.slow
def test_processes_finish_a_stage_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    # Of two machines with one process each: both are the first there.
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), port, rank],
            env=environment(RANK=rank, LOCAL_RANK="0"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        printed = [job.communicate(timeout=120)[0].splitlines() for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    both = "['0.txt', '1.txt']"
    for lines, first in zip(printed, (True, False), strict=True):
        assert lines == [
            f"{first} said by 0",
            f"True {both}",
            f"False {both}",
            f"{[0, 2, 4] if first else [1, 3]} [0, 10]",
            "the second's mistake",
        ]


@pytest.mark.parametrize("rank", [0, 1, 8])
def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    assert is_main_process() == (rank == 0)
    barrier()
    assert agree(rank) == rank
    assert list(dealt(3)) == [0, 1, 2]
    assert gathered(lambda: rank) == [rank]


@pytest.mark.slow
def test_the_environment_tells_the_rank_before_any_trainer() -> None:
    code = "from lpcam.storage.ranks import is_main_process; print(is_main_process())"
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment(**rank), stdout=subprocess.PIPE, text=True
        )
        for rank in ({"LOCAL_RANK": "1"}, {"SLURM_PROCID": "3"})
    ]
    assert [job.communicate(timeout=120)[0].strip() for job in jobs] == ["False", "False"]
