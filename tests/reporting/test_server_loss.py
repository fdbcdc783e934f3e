"""W&B's server is away or dies on the way: a bounded wait, and nothing is lost."""

import http.server
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lpcam.reporting import tracking, wandb_content
from tests.reporting.wandb_runs import CLASSES, METRICS, SCORES, Run, logged_out, logger, read

KEY = "0" * 40
BUCKET = {
    "id": "id",
    "displayName": "name",
    "historyLineCount": 0,
    "project": {"id": "id", "name": "project", "entity": {"id": "id", "name": "me"}},
}
DATA = {
    "viewer": {"id": "id", "username": "me", "entity": "me", "teams": {"edges": []}},
    "project": None,
}


class Server(http.server.ThreadingHTTPServer):
    """As much of W&B's server as starting a run takes, on this machine alone."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200  # of every answer
        self.refused = ""  # requests with this in them get a 500
        self.silent = False
        self.ended = threading.Event()
        self.requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data: dict[str, Any] = dict(DATA)
        if self.path == "/graphql":
            self.server.requests += 1
            name = (json.loads(body).get("variables") or {}).get("name")
            data["upsertBucket"] = {"bucket": {**BUCKET, "name": name}, "inserted": True}
        if self.server.silent:
            self.server.ended.wait()
            return
        refused = self.server.refused and self.server.refused in body.decode(errors="replace")
        answer = json.dumps({"data": data}).encode()
        self.send_response(500 if refused else self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that answers well, and W&B as in a new process, logged in there."""
    import wandb
    from wandb.sdk.lib import wbauth

    monkeypatch.setattr(tracking, "ANSWERING", 1, raising=False)
    monkeypatch.setattr(tracking, "STARTING", 1, raising=False)
    monkeypatch.setattr(tracking, "SENDING", 1, raising=False)
    monkeypatch.setattr(tracking, "_outage", ("", 0.0), raising=False)
    found = Server()
    threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True).start()
    with logged_out(tmp_path):
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        monkeypatch.setenv("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "0.1")  # 15 s by default
        wandb.teardown()
        yield found
        wandb.finish()
        wbauth.unauthenticate_session(update_settings=False)
        wandb.teardown()
    found.ended.set()
    found.shutdown()
    found.server_close()


def away(server: Server) -> str:
    server.shutdown()
    server.server_close()
    return "connection refused"


def wrong_key(server: Server) -> str:
    server.status = 401
    return "401"


def silent(server: Server) -> str:
    server.silent = True
    return "exceeded"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fault", [away, wrong_key, silent])
def test_a_server_that_fails_at_the_start_is_named_and_jobs_are_recorded_offline(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Any
) -> None:
    cause = fault(server)
    for job in ("first", "second"):
        with tracking.recording():
            tracking.start(logger(tmp_path / job), {"seed": 3}, {})
        printed = capsys.readouterr()
        (line,) = printed.out.splitlines()
        assert server.url in line
        assert cause in line
        assert f"wandb sync {tmp_path / job}/wandb/offline-run-*" in line
        assert printed.err == ""
        assert read(tmp_path / job).config["seed"] == 3
        if job == "first":
            asked = server.requests
    assert server.requests == asked  # the second job did not wait, too


def test_a_key_that_cannot_be_one_is_named(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with tracking.recording():
        tracking.start(logger(tmp_path), {"seed": 3}, {})
    (line,) = capsys.readouterr().out.splitlines()
    assert "WANDB_API_KEY invalid" in line
    assert read(tmp_path).config["seed"] == 3


@pytest.mark.timeout(60)
def test_a_server_that_starts_no_run_leaves_it_recorded_offline(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refused = "UpsertBucket"
    with tracking.recording():
        tracking.start(logger(tmp_path), {"seed": 3}, {})
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert "500" in line
    assert printed.err == ""
    assert read(tmp_path).config["seed"] == 3


def recorded(folder: Path) -> Run:
    """What is on disk of a run that was cut off before its end."""
    from wandb.util import get_core_path

    newest = (folder / "wandb" / "latest-run").resolve()
    (path,) = newest.glob("run-*.wandb")
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json"]
    command += ["--run-file", str(path), str(newest.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return Run(newest, [json.loads(line) for line in done.stdout.splitlines()])


@pytest.mark.timeout(60)
def test_a_server_that_dies_during_a_run_costs_a_bounded_wait_and_no_record(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("content")
    start = time.monotonic()
    with tracking.recording():
        log = tracking.start(logger(tmp_path / "run"), {}, {})
        assert not log.experiment.offline
        away(server)
        wandb_content.log_results(
            log,
            metrics=METRICS,
            scores=SCORES,
            classes=CLASSES,
            made={"metrics": tmp_path / "file"},
            used={"classifier-abc": tmp_path / "file"},
        )
    assert time.monotonic() - start < 30
    (line,) = capsys.readouterr().err.splitlines()
    run = recorded(tmp_path / "run")
    assert f"wandb sync --include-online {run.folder}" in line
    assert run.history.items() >= METRICS.items()
    assert run.table("val/classes")[0] == ["class", "cam", "lpcam"]
    assert run.artifacts.keys() == {"metrics", "classifier-abc"}

    with tracking.recording():
        tracking.start(logger(tmp_path / "next"), {"seed": 3}, {})
    assert "did not take a run in 1 s; recording offline" in capsys.readouterr().out
    assert read(tmp_path / "next").config["seed"] == 3


def test_each_artifact_fails_by_itself_and_after_the_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "gallery.png")
    (tmp_path / "file").write_text("content")
    with logged_out(tmp_path), tracking.recording():
        log = tracking.start(logger(tmp_path / "run"), {}, {})
        wandb_content.log_results(
            log,
            metrics=METRICS,
            scores=SCORES,
            classes=CLASSES,
            figures=[tmp_path / "gallery.png"],
            made={"prototypes": tmp_path / "gone", "metrics": tmp_path / "file"},
            used={"classifier-abc": tmp_path / "gone", "classifier-def": tmp_path / "file"},
        )
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("not logged")[0] for line in lines] == [
        "warning: artifact prototypes ",
        "warning: artifact classifier-abc ",
    ]
    run = read(tmp_path / "run")
    assert run.all("exit")[0]["exit_code"] == 0
    assert {"val/curve_table.path", "val/classes.path", "figures/gallery.path"} <= set(run.history)
    assert run.artifacts.keys() == {"metrics", "classifier-def"}
    kinds = [r["type"] for r in run.records if r.get("artifact", {}).get("type") != "run_table"]
    assert kinds.index("artifact") > max(i for i, kind in enumerate(kinds) if kind == "history")
