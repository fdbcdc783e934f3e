import hashlib
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lpcam.storage.hashing import digest, file_digest, tensors_digest

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def reverse_order(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reverse_order(value[key]) for key in reversed(list(value))}
    return [reverse_order(item) for item in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_digest_ignores_the_order_of_keys(value: dict[str, Any]) -> None:
    assert digest(value) == digest(reverse_order(value))
    assert len(digest(value)) == 16


@given(json_values, json_values)
def test_digest_tells_values_apart(a: Any, b: Any) -> None:
    # repr distinguishes what == does not: True, 1 and 1.0, or 0.0 and -0.0.
    if repr(reverse_order(a)) != repr(reverse_order(b)) and a != b:
        assert digest(a) != digest(b)


def test_file_digest(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert file_digest(path) == hashlib.sha256(b"abc").hexdigest()


def test_tensors_are_told_apart_by_name_shape_type_and_bits() -> None:
    tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = {
        tensors_digest({name: value})
        for name, value in (
            ("a", tensor),
            ("b", tensor),
            ("a", tensor.T),
            ("a", tensor.flatten()),
            ("a", tensor.double()),
            ("a", tensor.half()),
            ("a", tensor.bfloat16()),
            ("a", tensor.int()),
            ("a", tensor + torch.tensor([[0, 0], [0, 1e-6]])),
            ("a", -tensor),
            ("a", tensor[:0]),
        )
    }
    assert len(found) == 11
    assert all(len(key) == 16 for key in found)
    two = {"a": tensor, "b": tensor}
    assert tensors_digest(two) != tensors_digest({"a": tensor})


def test_where_tensors_lie_does_not_count() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 2, 2)
    key = tensors_digest({"a": tensor})
    spread = torch.zeros(4, 3, 2, 2)
    spread[::2] = tensor
    for same in (
        tensor.clone().requires_grad_(),
        tensor.to(memory_format=torch.channels_last),
        spread[::2],
    ):
        assert tensors_digest({"a": same}) == key


def test_a_models_weights_and_statistics_count_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    key = tensors_digest(model.state_dict())
    model[0].stride = (2, 2)
    model.eval()
    assert tensors_digest(model.state_dict()) == key
    # What a module says of itself besides its tensors is left out.
    assert tensors_digest({**model.state_dict(), "extra": {"version": 3}}) == key
    found = {key}
    for name in ("0.weight", "0.bias", "1.running_mean", "1.num_batches_tracked"):
        model.state_dict()[name].view(-1)[-1] += 1
        found.add(tensors_digest(model.state_dict()))
    assert len(found) == 5
