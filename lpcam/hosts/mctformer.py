"""MCTformer: a transformer with a token for each class, whose attention says where the class is.

Xu et al., "Multi-class Token Transformer for Weakly Supervised Semantic Segmentation", CVPR 2022
(V1 and V2), and "MCTformer+", arXiv 2308.03005 (plus). B pictures, C classes, D channels, a grid of
h x w = N patches.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lpcam.data.loaders import ViewBatch
from lpcam.errors import InputError
from lpcam.models.backbones import Backbone
from lpcam.models.host import Host
from lpcam.models.training import cosine
from lpcam.models.validation import MultilabelScores
from lpcam.prototypes.maps import HostViews
from lpcam.settings import CHECKED, Count, Rate, Share
from lpcam.storage.hashing import digest, tensors_digest


def rank_weighted_mean(values: Tensor, decay: float) -> Tensor:
    """Mean in which the r-th largest value counts ``decay ** r``, r from 0 (MCTformer+).

    Args:
        values: Any ``(..., N)``.
        decay: 1 gives the mean, 0 the maximum.

    Returns:
        ``(...)``.
    """
    ranks = torch.arange(values.shape[-1], device=values.device, dtype=values.dtype)
    weights = decay**ranks
    return values.sort(-1, descending=True).values @ (weights / weights.sum())


def contrastive_token_loss(tokens: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Class tokens of one picture shall differ from each other (MCTformer+).

    Cross entropy that takes a token's cosines to all tokens of its picture for logits, and itself
    for the right one: mean over the present classes, the pictures that show any, and the layers.

    Args:
        tokens: Class tokens ``(B, C, D)`` after each layer.
        labels: Image labels ``(B, C)``.

    Returns:
        The loss; 0 if no picture shows any class.
    """
    unit = F.normalize(torch.stack(list(tokens)), dim=-1)
    own = -(unit @ unit.mT).log_softmax(-1).diagonal(dim1=-2, dim2=-1)
    shown = labels.sum(1)
    by_picture = (own * labels).sum(-1) / shown.clamp_min(1)
    return by_picture.sum(1).mean() / (shown > 0).sum().clamp_min(1)


def fused_maps(attention: Tensor, patch_maps: Tensor, variant: str) -> Tensor:
    """The product of what class tokens look at and what patches say, of plus its square root.

    Args:
        attention: Attention of class tokens to patches ``(..., h, w)``.
        patch_maps: Maps that are not negative ``(..., h, w)``, PatchCAM's or LPCAM's.
        variant: ``v1``, ``v2`` or ``plus``.
    """
    product = attention * patch_maps
    return product.sqrt() if variant == "plus" else product


def refined_maps(maps: Tensor, affinity: Tensor | None) -> Tensor:
    """Each patch takes what the patches that it looks at have; the lowest value becomes 0.

    Every patch looks at every other a little, so there would be no zero left. The published code
    subtracts the minimum of the sum over mirrored views instead of each view's.

    Args:
        maps: Maps ``(..., P, h, w)``.
        affinity: Attention of patches to patches ``(..., N, N)``; None if each keeps what it has.

    Returns:
        ``(..., P, h, w)``.
    """
    if affinity is not None:
        maps = (maps.flatten(-2) @ affinity.to(maps).mT).unflatten(-1, maps.shape[-2:])
    return maps - maps.amin((-2, -1), keepdim=True)


class MCTformer(Host):
    """A ViT with C class tokens in the place of its one, and a patch head: a 3x3 convolution.

    A class's first score is the mean over channels of its token, the second the mean over positions
    of the patch head's map, of ``plus`` weighted by rank. Both learn by the multi-label soft margin
    loss, ``plus`` also by :func:`contrastive_token_loss`. The last norm is not applied.

    Its own maps are, refined by the attention of patches to patches over all layers, what the class
    tokens of the last layers look at (V1), or that times the patch head's rectified map (V2, plus).
    The published code refines where ``--patch-attn-refine`` is given, as its scripts do.
    LPCAM on the patch tokens takes the place of the patch head's map.

    V1 has no patch head. One is trained beside it on tokens that it does not change, since
    prototypes are chosen by its scores.

    Args:
        backbone: A ViT of timm's with one class token; its class tokens start as copies of that.
        num_classes: Number of classes C.
        variant: ``v1``, ``v2`` or ``plus``.
        attention_layers: How many of the last layers the attention of class tokens is taken from.
        refine: Whether maps are refined, see :func:`refined_maps`.
        rank_decay: See :func:`rank_weighted_mean`; of ``plus``.
        lr: Learning rate after the warm-up.
        warm_up_epochs: Epochs in which it rises.
        warm_up_lr: Where it starts.
        min_lr: Where it ends.
        weight_decay: AdamW's; none of biases, norms, class tokens and position embeddings.

    Raises:
        InputError: The backbone is another network.
    """

    maps_from_features = False
    finishes = True

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        backbone: Backbone,
        num_classes: Annotated[int, Field(ge=2)],
        *,
        variant: Literal["v1", "v2", "plus"] = "v2",
        attention_layers: Count = 3,
        refine: bool = True,
        rank_decay: Share = 0.996,
        lr: Rate = 6.25e-5,
        warm_up_epochs: Annotated[float, Field(ge=0)] = 5.0,
        warm_up_lr: Rate = 1e-6,
        min_lr: Rate = 1e-5,
        weight_decay: Share = 0.05,
    ) -> None:
        super().__init__(backbone, num_classes)
        self.save_hyperparameters(ignore=["backbone"])
        self.variant = variant
        _give_class_tokens(backbone, num_classes)
        depth = len(backbone.network.blocks)
        if attention_layers > depth:
            raise InputError(
                f"classifier.attention_layers={attention_layers}: {backbone.name} has {depth}"
            )
        self.head = nn.Conv2d(backbone.dim, num_classes, 3, padding=1)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.bias)
        self.validation = MultilabelScores(num_classes)

    @property
    def bias(self) -> Tensor:
        """The patch head's bias ``(C,)``."""
        assert self.head.bias is not None
        return self.head.bias

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of pictures ``(B, 3, H, W)`` by class tokens and by the patch head ``(B, C)``."""
        hp: Any = self.hparams
        tokens, patches = self.backbone.tokens(images)
        maps = self.head(patches.detach() if self.variant == "v1" else patches).flatten(2)
        pooled = maps.mean(2)
        if self.variant == "plus":
            pooled = rank_weighted_mean(maps, hp.rank_decay)
        return tokens.mean(2), pooled

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        images, labels = batch
        with _outputs(self.backbone.network.blocks, self._class_tokens) as tokens:
            scores = self(images)
        losses = [F.multilabel_soft_margin_loss(score, labels) for score in scores]
        if self.variant == "plus":
            losses.append(contrastive_token_loss(tokens, labels))
        loss = torch.stack(losses).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Scores of the validation split, by the mean of both."""
        images, labels = batch
        self.validation.log(self, torch.stack(self(images)).mean(0), labels)

    def own_maps(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """PatchCAM, the factor of the host's maps that its features tell."""
        maps = self.head(features).relu()
        return maps if classes is None else maps[:, classes]

    def score(self, vectors: Tensor) -> Tensor:
        """The patch head's scores of a map that is the same vector everywhere, away from borders.

        There a convolution is a product with the sum of its kernel.
        """
        kernel = self.head.weight.detach().sum((2, 3)).to(vectors)
        return vectors @ kernel.T + self.bias.detach().to(vectors)

    @property
    def score_key(self) -> str:
        """Hash of the patch head, the variant, the layers and whether maps are refined."""
        hp: Any = self.hparams
        head = tensors_digest(self.head.state_dict())
        return digest([self.variant, hp.attention_layers, hp.refine, head])

    def predict_step(self, batch: ViewBatch, batch_idx: int) -> list[HostViews]:
        """Patch tokens, own maps and attention of every scale.

        Returns:
            As of any host; ``extra`` holds the attention to patches ``(V, B, C + N, h, w)``, of
            the C class tokens in the last layers and of the N patches in all.
        """
        scales = []
        for view in batch["views"]:
            found = [self._look(view)]
            if batch["flip"]:
                features, maps, attention = self._look(view.flip(3))
                classes, patches = attention.split([self.num_classes, maps[0, 0].numel()], 1)
                patches = patches.unflatten(1, maps.shape[2:]).flip(2).flatten(1, 2)
                attention = torch.cat([classes, patches], 1)
                found.append((features.flip(3), maps.flip(3), attention.flip(3)))
            scales.append(HostViews(*(torch.stack(parts) for parts in zip(*found, strict=True))))
        return scales

    def finish(self, maps: Tensor, views: HostViews, classes: Tensor) -> Tensor:
        """LPCAM in the patch head's place, for each of the mirrored views; their sum."""
        assert views.extra is not None
        attention, affinity = self._parts(views.extra)
        return torch.stack(
            [
                self._refined(fused_maps(seen[:, classes], maps, self.variant), spread)
                for seen, spread in zip(attention, affinity, strict=True)
            ]
        ).sum(0)

    def renamed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights under the names of this class, if they have those of the published code.

        The last norm, which is not applied, is left out; position embeddings are resized to the
        backbone's.
        """
        state = dict(state)
        if any(name.startswith("backbone.") for name in state) or "cls_token" not in state:
            return state
        if "pos_embed_cls" in state:  # plus
            state["pos_embed"] = torch.cat(
                [state.pop("pos_embed_cls"), state.pop("pos_embed_pat")], 1
            )
        network, classes = self.backbone.network, state["cls_token"].shape[1]
        if state["pos_embed"].shape[1] != classes + network.patch_embed.num_patches:
            state["pos_embed"] = resample_abs_pos_embed(
                state["pos_embed"], network.patch_embed.grid_size, num_prefix_tokens=classes
            )
        renamed = {
            name if name.startswith("head.") else f"backbone.network.{name}": value
            for name, value in state.items()
            if not name.startswith("norm.")
        }
        if self.variant == "v1" and "head.weight" not in renamed:
            warnings.warn(
                "ckpt: V1 without a patch head, so every prototype scores the same; its own maps "
                "are right, LPCAM's have no chosen prototypes",
                stacklevel=2,
            )
            empty = {name: torch.zeros_like(w) for name, w in self.head.state_dict().items()}
            renamed |= {f"head.{name}": value for name, value in empty.items()}
        return renamed

    def configure_optimizers(self) -> Any:
        """AdamW, with a warm-up and half a cosine by step."""
        hp: Any = self.hparams
        names = ("cls_token", "pos_embed")
        decaying: list[Tensor] = []
        others: list[Tensor] = []
        for name, weight in self.named_parameters():
            plain = weight.ndim > 1 and not name.endswith(names)
            (decaying if plain else others).append(weight)
        groups = [
            {"params": decaying, "weight_decay": hp.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return cosine(
            self,
            torch.optim.AdamW(groups, hp.lr),
            warm_up_epochs=hp.warm_up_epochs,
            warm_up_lr=hp.warm_up_lr,
            min_lr=hp.min_lr,
        )

    def _class_tokens(self, tokens: Tensor) -> Tensor:
        return tokens[:, : self.num_classes]

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features ``(B, D, h, w)``, own maps and attention ``(B, C + N, h, w)`` of one view."""
        hp: Any = self.hparams
        blocks = self.backbone.network.blocks
        with _unfused(blocks), _outputs([b.attn.attn_drop for b in blocks], _head_mean) as layers:
            features = self.backbone(images)
        to_patches = [layer[..., self.num_classes :] for layer in layers]
        last = torch.stack(to_patches[-hp.attention_layers :])[:, :, : self.num_classes]
        looking = last.mean(0) if self.variant == "plus" else last.sum(0)
        spreading = torch.stack(to_patches).sum(0)[:, self.num_classes :]
        extra = torch.cat([looking, spreading], 1).unflatten(2, features.shape[2:])
        attention, affinity = self._parts(extra)
        if self.variant != "v1":
            attention = fused_maps(attention, self.own_maps(features), self.variant)
        return features, self._refined(attention, affinity), extra

    def _refined(self, maps: Tensor, affinity: Tensor) -> Tensor:
        hp: Any = self.hparams
        return refined_maps(maps, affinity if hp.refine else None)

    def _parts(self, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of class tokens ``(..., C, h, w)`` and of patches ``(..., N, N)``."""
        count = extra.shape[-2] * extra.shape[-1]
        attention, affinity = extra.split([self.num_classes, count], -3)
        return attention, affinity.flatten(-2)


def _give_class_tokens(backbone: Backbone, count: int) -> None:
    """Replace a ViT's class token and its position embedding by so many copies, in place.

    timm's own methods then skip so many tokens before those of the patches. What lies behind the
    last block goes.

    Raises:
        InputError: The network is no ViT with one class token.
    """
    network = backbone.network
    tokens: Any = getattr(network, "cls_token", None)
    present = 0 if tokens is None else tokens.shape[1]
    if present == count == getattr(network, "num_prefix_tokens", 0):
        return  # a copy of a backbone that has them already
    if (
        type(network) is not VisionTransformer
        or present != 1
        or network.num_prefix_tokens != 1
        or network.pos_embed is None
    ):
        raise InputError(
            f"backbone.name={backbone.name}: MCTformer takes a ViT with one class token and "
            "position embeddings; choose one such as deit_small_patch16_224"
        )
    position = network.pos_embed.detach()
    if not network.no_embed_class:
        position = torch.cat([position[:, :1].repeat(1, count, 1), position[:, 1:]], 1)
    network.pos_embed = nn.Parameter(position.clone())
    network.cls_token = nn.Parameter(tokens.detach().repeat(1, count, 1))
    network.num_prefix_tokens = count
    network.norm = network.fc_norm = network.head = nn.Identity()


def _head_mean(attention: Tensor) -> Tensor:
    return attention.mean(1)


@contextmanager
def _unfused(blocks: Iterable[Any]) -> Iterator[None]:
    """Attention that is computed as a matrix while it lasts, so that it can be read."""
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(setattr, block.attn, "fused_attn", block.attn.fused_attn)
            block.attn.fused_attn = False
        yield


@contextmanager
def _outputs(
    modules: Iterable[nn.Module], keep: Callable[[Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """What is kept of the outputs of modules while it lasts, in the order in which they run."""
    found: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda *call: found.append(keep(call[-1])))
        for module in modules
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
