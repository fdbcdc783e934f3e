import numpy as np
import pytest

from lpcam.evaluation import SegmentationResult
from lpcam.reporting.scores import COLUMNS, Method, in_words, print_table, score_rows


def result(*matrices: list[list[int]]) -> SegmentationResult:
    """A result at thresholds from 0 to 1, a confusion matrix each; one matrix stands for two."""
    if len(matrices) == 1:
        matrices *= 2
    return SegmentationResult(np.linspace(0, 1, len(matrices)), np.array(matrices))


# One class. IoU of background 50/100 and of the class 50/100; all else follows by hand.
HALF = [[50, 0], [50, 50]]  # predicts half of the object: precision 1, recall 1/2
WHOLE = [[50, 0], [0, 100]]  # all right
NOTHING = [[50, 0], [100, 0]]  # no object predicted: precision undefined
TOO_MUCH = [[0, 50], [0, 100]]  # all object: precision 2/3, recall 1, background IoU 0


def methods(*results: SegmentationResult) -> list[Method]:
    names = ["CAM", "LPCAM", "LPCAM without context"]
    return [Method(name, {"val": found}, {}) for name, found in zip(names, results, strict=False)]


def texts(rows: list, key: str) -> list[str]:
    return [row[list(COLUMNS).index(key)].text for row in rows]


def bold(rows: list, key: str) -> list[bool]:
    return [row[list(COLUMNS).index(key)].best for row in rows]


def test_the_table_holds_the_numbers() -> None:
    rows = score_rows(
        methods(result(HALF, NOTHING, NOTHING), result(NOTHING, WHOLE, HALF), result(TOO_MUCH)),
        "val",
        threshold=0.1,
    )

    assert texts(rows, "miou") == ["50.0", "100.0", "33.3"]
    assert texts(rows, "gain") == ["n/a", "+50.0", "-16.7"]
    assert texts(rows, "best_threshold") == ["0.00", "0.50", "0.00"]
    # At 0.1, the nearest threshold is the first: HALF, NOTHING (background 50/150), TOO_MUCH.
    assert texts(rows, "miou_at_threshold") == ["50.0", "16.7", "33.3"]
    assert texts(rows, "precision") == ["100.0", "100.0", "66.7"]
    assert texts(rows, "recall") == ["50.0", "100.0", "100.0"]
    assert texts(rows, "fp") == ["0.0", "0.0", "33.3"]
    assert texts(rows, "fn") == ["50.0", "0.0", "0.0"]


def test_the_best_of_each_column_is_marked_and_equals_too() -> None:
    rows = score_rows(methods(result(HALF), result(WHOLE), result(TOO_MUCH)), "val", 0)

    assert bold(rows, "miou") == [False, True, False]
    assert bold(rows, "precision") == [True, True, False]
    assert bold(rows, "recall") == [False, True, True]
    assert bold(rows, "fp") == [True, True, False]
    assert bold(rows, "fn") == [False, True, True]
    assert not any(bold(rows, "gain") + bold(rows, "best_threshold"))


def test_what_is_undefined_is_not_available_and_never_best() -> None:
    rows = score_rows(methods(result(NOTHING), result(NOTHING)), "val", 0)

    assert texts(rows, "precision") == ["n/a", "n/a"]
    assert not any(bold(rows, "precision"))


@pytest.fixture
def results() -> dict[str, SegmentationResult]:
    return {name: result(globals()[name]) for name in ("HALF", "WHOLE", "NOTHING")}


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (
            "HALF",
            "WHOLE",
            "On val, LPCAM gains 50.0 points of mIoU over CAM (50.0 → 100.0): "
            "recall 50 → 100, precision 100 → 100.",
        ),
        (
            "WHOLE",
            "HALF",
            "On val, LPCAM loses 50.0 points of mIoU against CAM (100.0 → 50.0): "
            "recall 100 → 50, precision 100 → 100.",
        ),
        (
            "HALF",
            "HALF",
            "On val, LPCAM has the same mIoU as CAM (50.0 → 50.0): "
            "recall 50 → 50, precision 100 → 100.",
        ),
        (
            "HALF",
            "NOTHING",
            "On val, LPCAM loses 33.3 points of mIoU against CAM (50.0 → 16.7): recall 50 → 0.",
        ),
    ],
)
def test_words_say_who_wins(
    results: dict[str, SegmentationResult], before: str, after: str, sentence: str
) -> None:
    pair = methods(results[before], results[after])

    assert in_words(pair, "val", ["bird"])[0] == sentence


def test_words_name_the_class_that_gains_least() -> None:
    # Class 1 goes from IoU 1/2 to 1, class 2 from 1 to 1/2, class 3 never occurs.
    before = result([[10, 0, 0, 0], [10, 10, 0, 0], [0, 0, 20, 0], [0, 0, 0, 0]])
    after = result([[10, 0, 0, 0], [0, 20, 0, 0], [10, 0, 10, 0], [0, 0, 0, 0]])

    sentences = in_words(methods(before, after), "val", ["bird", "fish", "cow"])

    assert sentences[1] == "1 of 2 classes gain; most: bird (+50.0), least: fish (-50.0)."


def test_the_terminal_gets_the_table_too(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(
        {"cam": {"val": result(HALF)}, "lpcam": {"val": result(WHOLE)}},
        {"cam": "CAM", "lpcam": "LPCAM", "unused": "?"},
    )

    lines = capsys.readouterr().out.splitlines()
    cam, lpcam = (next(line for line in lines if f"│ {name} " in line) for name in ("CAM", "LPCAM"))
    assert "50.0" in cam
    assert "100.0" in lpcam
    assert "+50.0" in lpcam
