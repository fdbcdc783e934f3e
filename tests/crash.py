"""Kills programs for real: a child process dies before the nth time that it touches the disk.

Counted is what a crash can cut in two: files opened for writing, renames, new folders, deletions.
Before the nth the process leaves half a file where one was about to be written, and kills itself by
SIGKILL. Starting Python with torch takes longer than the tiny runs of a test, so one process loads
everything, and each run is a fork of it.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.conftest import ROOT

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
WRITING = os.O_WRONLY | os.O_RDWR


def arm(root: str, kill: int, count: Path) -> None:
    """Count what this process does below a folder, and die before the event of a number.

    Args:
        root: The folder.
        kill: The number of the event; 0 for none.
        count: Gets the number of events.
    """
    seen = 0
    done = False

    def look(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen, done
        if done or event not in EVENTS or not str(arguments[0]).startswith(root):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        seen += 1
        if seen == kill:
            done = True
            path = Path(str(arguments[0]))
            if event == "open" and path.suffix != ".lock":
                path.write_bytes(b"half")
            count.write_text(f"{event} {path.name}")
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)

    def tell() -> None:
        nonlocal done
        done = True
        count.write_text(str(seen))

    arm.tell = tell  # type: ignore[attr-defined]


def serve() -> None:
    """Run what stands in each line of the standard input, in a fork; answer with its status."""
    import lpcam.programs.outputs
    import lpcam.programs.run
    import lpcam.stages.classifier
    import lpcam.sweeps.summary  # noqa: F401

    for line in sys.stdin:
        program, root, kill, arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(f"{root}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = 1
            try:
                arm(root, kill, Path(f"{root}.count"))
                sys.argv = [f"{program}.py", *arguments]
                runpy.run_module(f"lpcam.programs.{program}", run_name="__main__", alter_sys=True)
                status = 0
            except SystemExit as ended:
                status = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
            arm.tell()  # type: ignore[attr-defined]
            sys.stdout.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Crashing:
    """Runs programs in child processes that may be killed."""

    def __enter__(self) -> Self:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        code = "from tests.crash import serve; serve()"
        self.server = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.kill()
        self.server.communicate()

    def run(self, program: str, root: Path, *arguments: str, kill: int = 0) -> str:
        """Run a program.

        Args:
            program: ``train`` or ``infer``.
            root: The folder of everything that it writes.
            arguments: Its overrides.
            kill: The number of the event before which it dies; 0 for never.

        Returns:
            The event that it died before, or how many there were.
        """
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps([program, str(root), kill, arguments]) + "\n")
        self.server.stdin.flush()
        status = int(self.server.stdout.readline())
        said = Path(f"{root}.count").read_text()
        assert status == (0 if said.isdigit() else -signal.SIGKILL), Path(f"{root}.log").read_text()
        return said
