"""Benchmarks run, and their harness counts right; how long anything takes fails no test."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.benchmarks import harness, head, kmeans, thresholds
from experiments.benchmarks.__main__ import main
from experiments.benchmarks.harness import Options, counts, in_child, rounds, section, timed_rows
from experiments.benchmarks.results import page

QUICK = Options(quick=True, threads=1)


class Clock:
    """Stands still but for what methods take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []

    def __call__(self) -> float:
        return self.now

    def method(self, name: str, *seconds: float) -> harness.Method:
        """Takes these seconds in turn."""
        turns = iter(seconds * 20)

        def method() -> None:
            self.called.append(name)
            self.now += next(turns)

        return method


def test_order_rotates_and_warm_up_does_not_count() -> None:
    clock = Clock()
    methods = {"a": clock.method("a", 9, 1, 2, 3), "b": clock.method("b", 9, 4, 5, 6)}
    seconds = rounds(methods, 3, warm_up=1, clock=clock)
    assert seconds == {"a": [1, 2, 3], "b": [4, 5, 6]}
    assert "".join(clock.called) == "baabbaab"


def test_slow_methods_sit_out_later_rounds() -> None:
    clock = Clock()
    methods = {"fast": clock.method("fast", 1), "slow": clock.method("slow", 50)}
    seconds = rounds(methods, 8, warm_up=1, least=2, budget=100, clock=clock)
    assert {name: len(times) for name, times in seconds.items()} == {"fast": 8, "slow": 2}
    # Fewer rounds than a slow method would have.
    assert len(rounds(methods, 1, warm_up=1, least=2, budget=100, clock=clock)["slow"]) == 1


def test_rows_tell_least_median_and_spread() -> None:
    control, longer = timed_rows(
        {"control": [1, 2, 3, 4, 5], "longer": [2, 3, 5, 5, 10]}, "control"
    )
    assert control == {"name": "control", "min": 1, "median": 3, "rounds": 5, "iqr": 2}
    # In pairs it takes 1, 1, 2, 1, 5 longer, and 2, 1.5, 5/3, 1.25, 2 times as long.
    assert longer["overhead"] == 1
    assert longer["ratio"] == pytest.approx(5 / 3)


@pytest.mark.parametrize(
    ("control", "valid"), [([100, 104, 96, 103, 97], True), ([100, 108, 90, 107, 94], False)]
)
def test_a_control_that_varies_makes_it_invalid(control: list[float], valid: bool) -> None:
    part = section("T", "What.", timed_rows({"control": control}), control=control)
    assert part["valid"] is valid
    machine = harness.machine(QUICK)
    found = {
        "table": "t", "quick": False, "seconds": 1.0, "machine": machine, "sections": [part],
    }  # fmt: skip
    assert ("**Invalid" in page([found])) is not valid


def test_targets_have_two_directions() -> None:
    assert harness.target("a / b", 1.01, most=1.02)["reached"]
    assert not harness.target("a / b", 1.03, most=1.02)["reached"]
    assert harness.target("b / a", 81, least=80)["reached"]
    assert not harness.target("b / a", 79, least=80)["reached"]


def test_passes_both_ways_are_counted() -> None:
    network = nn.Linear(3, 2)

    def method() -> None:
        scores = network(torch.ones(1, 3))
        torch.autograd.grad(scores.sum(), network.weight)
        network(torch.ones(1, 3))

    found = counts(method, network, network)
    assert (found.forwards, found.backwards) == (2, 1)
    assert found.gflop > 0
    assert not network._forward_hooks
    assert not network._backward_pre_hooks


def test_two_tables_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["random_walk", "thresholds", "--quick", "--threads", "1", "--output"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, str(tmp_path)])
    threads = torch.get_num_threads()
    main()
    torch.set_num_threads(threads)

    for name in ("random_walk", "thresholds"):
        found = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        assert found["table"] == name
        assert found["quick"] is True
        assert found["machine"]["threads"] == 1
        assert found["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
        for part in found["sections"]:
            assert isinstance(part["valid"], bool)
            assert all(aim["measured"] > 0 for aim in part["targets"])
            for row in part["rows"]:
                assert 0 < row["min"] <= row["median"]
                assert row["iqr"] >= 0
                assert row["memory"] >= 0
    text = (tmp_path / "results.md").read_text()
    assert text.count("\n## ") == 2
    assert "say nothing" in text
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "heads"])
    with pytest.raises(SystemExit):
        main()


@pytest.mark.parametrize(
    ("package", "names"),
    [
        ("torchcam", (head.TORCHCAM, head.TORCHCAM_GRAD)),
        ("captum", (head.CAPTUM,)),
        ("pytorch_grad_cam", (head.GRADCAM,)),
    ],
)
def test_others_give_the_same_maps(package: str, names: tuple[str, ...]) -> None:
    pytest.importorskip(package)
    found = head.check(head.Case(QUICK, 2))
    assert {f"{name} and CAM" for name in names} <= set(found)


def test_the_check_of_maps_would_notice_other_prototypes() -> None:
    case = head.Case(QUICK, 2)
    case.directions = case.directions.flip(0)
    with pytest.raises(AssertionError, match="differ"):
        head.check(case)


def test_faiss_reaches_the_same_objective() -> None:
    pytest.importorskip("faiss")
    methods = kmeans.clusterings(QUICK, kmeans.SMALL)
    ours, theirs = (methods[name]()()["objective"] for name in (kmeans.OURS, kmeans.FAISS))
    assert ours == pytest.approx(theirs, rel=5e-3)


def test_a_method_runs_in_a_process_of_its_own() -> None:
    found = in_child("thresholds:evaluations", Options(threads=1), thresholds.HISTOGRAM)
    assert found["seconds"] > 0
    assert found["memory"] > 1  # MB; index and counts of a picture's pixels take that
