"""A pass over pictures with a host, which callbacks turn into files."""

import math
import shutil
from collections.abc import Callable, Sequence
from typing import Annotated

import pydantic
import torch
from pydantic import AfterValidator, Field
from pytorch_lightning.callbacks import Callback

from lpcam.data.dataset import Picture, open_image
from lpcam.data.loaders import view_loader
from lpcam.errors import InputError
from lpcam.models.host import Host
from lpcam.models.training import MakeTrainer
from lpcam.settings import CHECKED, Scale
from lpcam.stages.memory import check_memory, reused_memory
from lpcam.storage.records import Records


def _once(scales: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted(set(scales)))


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class ViewSettings:
    """The views of every picture.

    Attributes:
        scales: Factors on the picture's size; kept in ascending order, each once.
        flip: Whether mirror images are among them.
    """

    scales: Annotated[tuple[Scale, ...], Field(min_length=1), AfterValidator(_once)]
    flip: bool


def feature_bytes(host: Host, pictures: Sequence[Picture], scales: Sequence[float]) -> float:
    """Bytes of the local features of all scales in half precision, from the pictures' sizes.

    Args:
        host: The host; its stride and its channels count.
        pictures: The pictures; only the heads of their files are read.
        scales: Factors on the pictures' size.

    Raises:
        InputError: A picture cannot be read.
    """
    positions = 0
    for picture in pictures:
        with open_image(picture.path, decode=False) as image:
            positions += sum(
                math.ceil(image.width * scale / host.stride)
                * math.ceil(image.height * scale / host.stride)
                for scale in scales
            )
    return 2.0 * positions * host.backbone.dim


def check_space(
    records: Records, host: Host, pictures: Sequence[Picture], scales: Sequence[float]
) -> None:
    """Make sure that the disk has room for the features that are not among the records yet.

    Raises:
        InputError: It has not, or a picture cannot be read.
    """
    missing = [picture for picture in pictures if f"{picture.id}.npz" not in records]
    folder = records.folder
    needed, free = feature_bytes(host, missing, scales), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: features of {len(missing)} pictures take {needed / 1e9:.3g} GB, and "
            f"{free / 1e9:.3g} GB are free; free some (lpcam store prune), or set paths.store "
            "elsewhere"
        )


def predict(
    make_trainer: MakeTrainer,
    host: Host,
    pictures: Sequence[Picture],
    callback: Callback,
    *,
    done: Callable[[Picture], bool],
    scales: Sequence[float],
    flip: bool,
    batch_size: int,
    num_workers: int | None,
) -> None:
    """Run a writing callback over the pictures that an earlier, killed run did not finish.

    Args:
        make_trainer: Makes Lightning's trainer.
        host: The trained host.
        pictures: The pictures.
        callback: Writes what the host gives.
        done: Whether a picture's files are there.
        scales: Factors on the pictures' size, in the order of what the host gives.
        flip: Whether mirror images are wanted.
        batch_size: Pictures of one size that share a forward pass.
        num_workers: Processes that decode pictures.
    """
    missing = [picture for picture in pictures if not done(picture)]
    if not missing:
        return
    trainer = make_trainer(
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        inference_mode=not host.needs_gradients,
    )
    loader = view_loader(
        missing,
        host.num_classes,
        scales=scales,
        flip=flip,
        batch_size=batch_size,
        num_workers=num_workers,
        processes=trainer.world_size,
    )
    cuda = trainer.strategy.root_device.type == "cuda"
    check_memory(missing, scales, flip=flip, batch_size=batch_size, cuda=cuda)
    # Whether a pass was needed or its result was there must not decide what a training draws.
    with torch.random.fork_rng(devices=[]), reused_memory():
        trainer.predict(host.for_inference(), loader, return_predictions=False)
    trainer.strategy.barrier()
