"""Where any torch classifier keeps its local features and its class weights.

LPCAM needs a score that is linear in the mean of local features. The model is run once, and the
layers are found by comparing numbers instead of names of architectures: the classifier is the
linear layer whose output is the model's, the feature layer is the last one whose mean over
positions is the classifier's input. A transformer that classifies by its class token has no such
layer; there the patch tokens beside it are taken, which only approximates the score.
"""

import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lpcam.errors import InputError


@dataclass(frozen=True)
class FeatureLayers:
    """How to read a model's local features, and the weights that score them.

    Attributes:
        name: Dotted name of the layer whose output holds the features.
        layer: That layer.
        layout: ``BDhw``, ``BhwD`` or, for a transformer's tokens, ``BND``.
        classifier_name: Dotted name of the classifier.
        classifier: The linear layer, or 1x1 convolution, on the mean of the features.
        patch: Side in pixels of a token's patch; 0 without tokens.
        prefix: Tokens before those of the patches: a class token, registers.
        rectified: Whether the model applies ReLU to the layer's output on its way to the mean.
        norm: The LayerNorm between mean and classifier, if there is one.
    """

    name: str
    layer: Any
    layout: str
    classifier_name: str
    classifier: Any
    patch: int = 0
    prefix: int = 0
    rectified: bool = False
    norm: Any = None

    @property
    def weight(self) -> Tensor:
        """Class weights ``(C, D)``, without gradient, in at least single precision."""
        return _precise(self.classifier.weight.detach().flatten(1))

    def features(self, model: nn.Module, images: Tensor) -> Tensor:
        """Run the model and read its local features; the hook is gone afterwards.

        Args:
            model: The model.
            images: Pictures ``(B, 3, H, W)``.

        Returns:
            Features ``(B, D, h, w)`` in at least single precision.

        Raises:
            InputError: The layer did not run, or has an unexpected number of tokens.
        """
        outputs: list[Tensor] = []
        # A copy, since the model may go on to change the tensor in place.
        handle = self.layer.register_forward_hook(lambda *call: outputs.append(call[-1].clone()))
        try:
            model(images)
        finally:
            handle.remove()
        if not outputs:
            raise InputError(f"target_layer={self.name}: did not run; give a layer that does")
        features = self._grid(_precise(outputs[-1]), images)
        if self.rectified:
            features = features.relu()
        return self._normed(features).permute(0, 3, 1, 2)

    def _grid(self, output: Tensor, images: Tensor) -> Tensor:
        """The layer's output as ``(B, h, w, D)``."""
        if self.layout == "BDhw":
            return output.permute(0, 2, 3, 1)
        if self.layout == "BhwD":
            return output
        h, w = (-(-side // self.patch) for side in images.shape[2:])
        if output.shape[1] != self.prefix + h * w:
            raise InputError(
                f"target_layer={self.name}: {output.shape[1]} tokens for pictures of "
                f"{tuple(images.shape[2:])}, expected {self.prefix} + {h} x {w}; "
                "pass example=, pictures of that size"
            )
        return output[:, self.prefix :].unflatten(1, (h, w))

    def _normed(self, features: Tensor) -> Tensor:
        """Features such that their mean is the LayerNorm of the old mean, ``(B, h, w, D)``.

        Subtracting a position's own mean over channels is linear. Dividing by its own deviation is
        not, so every position is divided by the deviation of the *picture's* mean feature.
        """
        if self.norm is None:
            return features
        variance = features.mean((1, 2), keepdim=True).var(-1, correction=0, keepdim=True)
        features = features - features.mean(-1, keepdim=True)
        features = features / (variance + self.norm.eps).sqrt()
        if self.norm.weight is not None:
            features = features * self.norm.weight.detach()
        if self.norm.bias is not None:
            features = features + self.norm.bias.detach()
        return features


class _Reached(Exception):  # noqa: N818 - no error: the rest of the model is not needed
    pass


def find_finer_layer(model: nn.Module, layers: FeatureLayers, images: Tensor) -> Any:
    """The last stage of a convolutional model that is at least twice as fine as its features.

    A stage is a module of modules; where the model has none, it is any layer.

    Args:
        model: The model.
        layers: Its feature layer.
        images: Pictures that it takes ``(B, 3, H, W)``.

    Raises:
        InputError: There is none.
    """
    seen: list[tuple[nn.Module, int]] = []

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            seen.append((module, output.shape[2]))

    handles = [module.register_forward_hook(record) for module in model.modules()]
    try:
        with evaluating(model):
            rows = layers.features(model, images).shape[2]
    finally:
        for handle in handles:
            handle.remove()
    runs = Counter(module for module, _ in seen)  # of several, the first would be read
    finer = [module for module, height in seen if height >= 2 * rows and runs[module] == 1]
    stages = [module for module in finer if next(module.children(), None)]
    if layers.layout != "BDhw" or not finer:
        raise InputError(
            f"propagate: no layer before {layers.name} is finer than it; give 0, which every model "
            "allows"
        )
    return (stages or finer)[-1]


def finer_features(model: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """The output ``(B, E, h, w)`` of a layer; nothing behind it is computed.

    Args:
        model: The model.
        layer: The layer.
        images: Pictures ``(B, 3, H, W)``.
    """
    with evaluating(model), suppress(_Reached), recorded(layer, stop=True) as outputs:
        model(images)
    return outputs[0]


@contextmanager
def recorded(layer: nn.Module, *, stop: bool = False) -> Iterator[list[Tensor]]:
    """Give a list that gets the layer's outputs, in at least single precision.

    Args:
        layer: The layer.
        stop: Whether a forward pass ends there, by an exception.
    """
    outputs: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(_precise(output))
        if stop:
            raise _Reached

    handle = layer.register_forward_hook(record)
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back, errors or not."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class _Summary:
    """What identifies a tensor: its mean over positions, for every way to read it.

    Attributes:
        means: ``(B, D)`` by layout and by whether ReLU comes first.
        first_token: ``(B, D)``, of tokens.
        patch: As in :class:`FeatureLayers`.
        prefix: As in :class:`FeatureLayers`.
    """

    means: dict[tuple[str, bool], Tensor]
    first_token: Tensor | None = None
    patch: int = 0
    prefix: int = 0

    @property
    def vector(self) -> Tensor | None:
        """The value of a vector, or the mean of maps with the channels first."""
        return self.means.get(("BD", False), self.means.get(("BDhw", False)))


@dataclass(frozen=True)
class _Call:
    name: str
    module: Any
    input: _Summary
    output: _Summary

    def layers(self, layout: str, rectified: bool, head: "_Call", norm: Any) -> FeatureLayers:
        return FeatureLayers(
            self.name,
            self.module,
            layout,
            head.name,
            head.module,
            self.output.patch,
            self.output.prefix,
            rectified,
            norm,
        )


def find_feature_layers(
    model: nn.Module,
    example: Tensor,
    target_layer: nn.Module | str | None = None,
    classifier: nn.Module | str | None = None,
) -> FeatureLayers:
    """Find the feature layer and the classifier of a model.

    Args:
        model: Any classifier whose score is a linear layer on the mean of local features. A
            functional ReLU may lie before the mean, a LayerNorm after it. Of a transformer whose
            classifier reads the class token, the patch tokens of the last layer that gives both are
            taken, and a warning says that this is an approximation.
        example: Pictures to run it on ``(B, 3, H, W)``.
        target_layer: The layer, or its dotted name, instead of the one that is found. It may be one
            whose mean is *not* the classifier's input; then too a warning says that this is an
            approximation.
        classifier: The linear layer, or its dotted name, instead of the one that is found.

    Raises:
        InputError: They cannot be found, or the score is not linear in the mean; with the reason.
    """
    names = {module: name for name, module in model.named_modules()}
    calls, scores = _run(model, example, names)
    head = _find_classifier(calls, scores, _named(names, "classifier", classifier))
    layer = _named(names, "target_layer", target_layer)
    # Features are read of a module's last call, so no earlier one may be taken for it.
    final = {call.module: call for call in calls}
    candidates = [
        call for call in calls if final[call.module] is call and layer in (None, call.module)
    ]
    # The norm between mean and classifier, if there is one, makes the classifier's input.
    norms = [
        call
        for call in calls
        if isinstance(call.module, nn.LayerNorm)
        and ("BD", False) in call.input.means
        and _same(call.output.vector, head.input.vector)
    ]
    for taker, norm in ((head, None), *((call, call.module) for call in norms[-1:])):
        for call in reversed(candidates):
            for (layout, rectified), mean in call.output.means.items():
                if layout != "BD" and _same(mean, taker.input.vector):
                    return call.layers(layout, rectified, head, norm)
    # Without a token before those of the patches, the first one is a patch's.
    beside = [
        call
        for call in candidates
        if call.output.prefix and _same(call.output.first_token, head.input.vector)
    ]
    if layer is None and not beside:
        raise InputError(
            f"classifier={head.name}: no layer's mean over positions is its input (other pooling, "
            "layers in between, or pictures of one position?); pass target_layer= to take one "
            "anyway"
        )
    name = beside[-1].name if layer is None else names[layer]
    difference = (
        f"the classifier {head.name} reads the class token beside its patch tokens"
        if beside
        else f"its mean is not what the classifier {head.name} scores"
    )
    return _approximate(beside or candidates, name, head, difference)


def _named(
    names: dict[nn.Module, str], argument: str, given: nn.Module | str | None
) -> nn.Module | None:
    """The module that an argument means; None for None."""
    if given is None:
        return None
    for module, name in names.items():
        if given is module or given == name:
            return module
    last = ", ".join(list(names.values())[-4:])
    what = given if isinstance(given, str) else type(given).__name__
    raise InputError(f"{argument}={what}: no layer of the model; the last ones are {last}")


def _run(
    model: nn.Module, example: Tensor, names: dict[nn.Module, str]
) -> tuple[list[_Call], Tensor | None]:
    """Run the model; summaries of all layers in the order they finish, and the scores."""
    calls: list[_Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            taken, given = (_summary(value, example) for value in (args[0], output))
            calls.append(_Call(names[module], module, taken, given))

    handles = [module.register_forward_hook(record) for module in names]
    try:
        with evaluating(model):
            output = model(example)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        raise InputError(
            f"model: does not run on pictures of {tuple(example.shape)} ({reason}); "
            "pass example=, pictures that it takes or their shape"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls, _summary(output, example).vector if isinstance(output, Tensor) else None


def _summary(value: Tensor, example: Tensor) -> _Summary:
    value = _precise(value)
    sides = value.shape[1:]
    if sides and value[0].numel() == max(sides):
        return _Summary({("BD", False): value.flatten(1)})
    read = ((False, value), (True, value.relu()))
    if value.ndim == 4:
        layouts = (("BDhw", (2, 3)), ("BhwD", (1, 2)))
        return _Summary({(name, r): v.mean(dims) for r, v in read for name, dims in layouts})
    if value.ndim == 3:
        # The smallest patch whose grid has no more cells than there are tokens.
        for patch in itertools.count(1):
            cells = -(-example.shape[2] // patch) * -(-example.shape[3] // patch)
            if cells <= max(sides[0], 1):
                break
        prefix = sides[0] - cells
        means = {("BND", r): v[:, prefix:].mean(1) for r, v in read}
        return _Summary(means, value[:, 0], patch, prefix)
    return _Summary({})


def _find_classifier(
    calls: Sequence[_Call], scores: Tensor | None, wanted: nn.Module | None
) -> _Call:
    if wanted is not None:
        found = [call for call in calls if call.module is wanted]
    else:
        linear = [call for call in calls if isinstance(call.module, nn.Linear | nn.Conv2d)]
        found = [call for call in linear if _same(call.output.vector, scores)]
        if not found and scores is not None:
            _refuse_averaged_heads(linear, scores)
    if not found:
        raise InputError(
            "classifier: no linear layer's output is the model's output (no head, several, or "
            "layers after it?); pass classifier=, the nn.Linear that gives the scores"
        )
    head = found[-1]
    if not isinstance(head.module, nn.Linear | nn.Conv2d):
        raise InputError(
            f"classifier={head.name}: a {type(head.module).__name__}; pass the nn.Linear in it"
        )
    if head.module.weight[0, 0].numel() > 1:
        kernel = "x".join(str(side) for side in head.module.weight.shape[2:])
        raise InputError(
            f"classifier={head.name}: a {kernel} convolution, so a position's score depends on its "
            "neighbours; LPCAM needs a linear layer or a 1x1 convolution"
        )
    if head.input.vector is None or not head.input.vector.any():
        raise InputError(
            f"classifier={head.name}: its input on the example is no vector, or all zero; "
            "pass example=, real pictures, or another classifier="
        )
    return head


def _refuse_averaged_heads(linear: Sequence[_Call], scores: Tensor) -> None:
    """Say so where the scores are the mean of several linear layers', as of distilled DeiTs."""
    vectors = {call.name: call.output.vector for call in linear}
    heads = {name: v for name, v in vectors.items() if v is not None and v.shape == scores.shape}
    if len(heads) > 1 and _same(torch.stack(list(heads.values())).mean(0), scores):
        raise InputError(
            f"classifier: the model's output is the mean of those of {' and '.join(heads)}, and "
            f"LPCAM reads one; pass classifier='{next(iter(heads))}' to map with that one alone"
        )


def _approximate(
    candidates: Sequence[_Call], name: str, head: _Call, difference: str
) -> FeatureLayers:
    """The last call of a layer, although its mean is not the classifier's input."""
    dim = head.module.weight.shape[1]
    for call in candidates[-1:]:
        for (layout, rectified), mean in call.output.means.items():
            if layout != "BD" and mean.shape[1] == dim:
                warnings.warn(
                    f"target_layer={name}: {difference}; maps are an approximation",
                    stacklevel=4,
                )
                return call.layers(layout, rectified, head, None)
    raise InputError(
        f"target_layer={name}: no local features of {dim} channels, which the classifier "
        f"{head.name} takes; give a layer that has them"
    )


def _precise(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _same(value: Tensor | None, other: Tensor | None) -> bool:
    """Equal up to rounding; the tolerance is that of half-precision models."""
    if value is None or other is None or value.shape != other.shape:
        return False
    return bool((value - other).abs().max() <= 1e-2 * other.abs().max())
