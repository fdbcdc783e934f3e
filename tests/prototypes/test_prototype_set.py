from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lpcam.errors import InputError
from lpcam.prototypes.prototype_set import Prototypes
from lpcam.storage.hashing import tensors_digest

# The second and third class have the same name, as two of ImageNet's have.
CLASSES = ("bird", "crane", "crane", "a/class")


def example() -> Prototypes:
    return Prototypes(
        classes=CLASSES,
        foreground=(
            torch.eye(4)[:3] * 2,
            torch.ones(1, 4),
            torch.empty(0, 4),
            torch.full((1, 4), 3.0),
        ),
        context=(torch.ones(2, 4), torch.empty(0, 4), torch.empty(0, 4), torch.zeros(1, 4)),
        indices=(([1, 4, 7], [0, 2]), ([5], []), ([], []), ([0], [11])),
        names={(0, "class", 4): "beak", (3, "context", 11): "sky\n«blue»"},
        model="0123456789abcdef",
        settings={"k": 12, "context_floor": None, "signed": "center"},
        mean=torch.arange(4.0),
    )


def assert_same(found: Prototypes, wanted: Prototypes) -> None:
    for name, value in vars(wanted).items():
        other = getattr(found, name)
        if name in ("foreground", "context"):
            assert len(other) == len(value)
            assert all(torch.equal(a, b) for a, b in zip(other, value, strict=True))
        elif isinstance(value, torch.Tensor):
            assert torch.equal(other, value)
        else:
            assert other == value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prototypes.safetensors"
    example().save(path)
    return path


def test_round_trip(file: Path) -> None:
    assert_same(Prototypes.load(file), example())
    assert [path.name for path in file.parent.iterdir()] == ["prototypes.safetensors"]


def test_round_trip_of_what_select_gives(tmp_path: Path) -> None:
    plain = Prototypes(("a",), (torch.ones(1, 2),), (torch.zeros(1, 2),), (([0], [3]),))
    plain.save(tmp_path / "plain.safetensors")
    assert_same(Prototypes.load(tmp_path / "plain.safetensors"), plain)


def test_every_damage_is_one_line(file: Path) -> None:
    good = file.read_bytes()
    for i in range(0, len(good), 3):
        for content in (good[:i], good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :]):
            file.write_bytes(content)
            with pytest.raises(InputError, match=r"prototypes\.safetensors") as caught:
                Prototypes.load(file)
            assert "\n" not in str(caught.value)


def test_what_is_no_file_of_prototypes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(InputError, match="check the path"):
        Prototypes.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(InputError, match=r"schema None, this version reads 3"):
        Prototypes.load(path)
    with pytest.raises(InputError, match="no readable file"):
        Prototypes.load(tmp_path)


def test_drop() -> None:
    left = example().drop("bird", [4, 1])

    assert torch.equal(left.vectors("bird"), torch.eye(4)[2:3] * 2)
    assert left.indices[0] == ([7], [0, 2])
    assert left.names == {(3, "context", 11): "sky\n«blue»"}
    assert_same(example().drop(3, [11], "context").drop(3, [0]).drop(0, [1, 4, 7]), EMPTIED)


def test_context_alone_is_no_direction_of_a_class() -> None:
    vectors = torch.eye(3)
    found = Prototypes(
        ("a", "b"),
        (vectors[:1], vectors[:0]),
        (vectors[1:2], vectors[1:]),
        (([0], [0]), ([], [0, 1])),
    )
    torch.testing.assert_close(found.directions()[0], vectors[0] - vectors[1])
    assert not found.directions()[1].any()
    assert found.directions("context")[1].any()


EMPTIED = Prototypes(
    **{
        **vars(example()),
        "foreground": (torch.empty(0, 4), torch.ones(1, 4), torch.empty(0, 4), torch.empty(0, 4)),
        "context": (torch.ones(2, 4), *[torch.empty(0, 4)] * 3),
        "indices": (([], [0, 2]), ([5], []), ([], []), ([], [])),
        "names": {},
    }
)


def test_merge_takes_the_mean_and_the_first_index() -> None:
    merged = example().merge("bird", [7, 1])

    wanted = torch.stack([torch.eye(4)[1] * 2, torch.tensor([1.0, 0, 1, 0])])
    assert torch.equal(merged.vectors("bird"), wanted)
    assert merged.indices[0] == ([4, 7], [0, 2])
    assert merged.names[0, "class", 4] == "beak"
    assert torch.equal(example().vectors("bird"), torch.eye(4)[:3] * 2)  # the old set is as it was


def test_merging_one_changes_nothing() -> None:
    assert_same(example().merge("bird", [4, 4]), example())


def test_rename() -> None:
    named = example().rename(0, 2, "leaves", "context").rename(0, 4, "bill")
    assert named.names[0, "context", 2] == "leaves"
    assert named.names[0, "class", 4] == "bill"


def test_text() -> None:
    assert str(example()).splitlines()[:2] == [
        "bird: class 1, 4 (beak), 7; context 0, 2",
        "crane: class 5; context none",
    ]
    assert str(Prototypes(("a",), (torch.empty(0, 2),), (torch.empty(0, 2),), (([], []),))) == (
        "no prototypes"
    )


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda p: p.drop("bird", [2]), r"no prototype 2; there are \[1, 4, 7\]"),
        (lambda p: p.drop("bird", []), r"no prototype None"),
        (lambda p: p.merge("bird", [1, 3]), r"no prototype 3"),
        (lambda p: p.rename("bird", 1, "x", "context"), r"no prototype 1; there are \[0, 2\]"),
        (lambda p: p.drop("fish", [1]), "class 'fish': 0 classes are called that"),
        (lambda p: p.drop("crane", [5]), "class 'crane': 2 classes are called that"),
        (lambda p: p.drop(4, [1]), "class 4: 0 classes"),
        (lambda p: p.drop("bird", [1], "back"), "side=back: unknown; choose class or context"),
        (lambda p: p.directions("all"), "prototypes.use=all: unknown"),
    ],
)
def test_mistakes_are_named(edit: Callable[[Prototypes], object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        edit(example())


def test_digest_of_a_model_is_that_of_names_and_weights() -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))

    model = build()
    same = tensors_digest(model.state_dict())
    assert tensors_digest(build().state_dict()) == same
    assert tensors_digest(build().to(torch.bfloat16).state_dict()) != same
    assert tensors_digest(torch.nn.Sequential(model).state_dict()) != same
    model[1].running_mean[3] += 1e-6
    assert tensors_digest(model.state_dict()) != same
