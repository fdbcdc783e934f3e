"""Labels of a trained network as mask files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from lpcam.data.dataset import Picture, open_picture
from lpcam.data.loaders import ViewBatch, view_loader
from lpcam.models.training import MakeTrainer
from lpcam.refiners.crf import check_backend, crf_parameters, dense_crf
from lpcam.seeds.palette import save_mask
from lpcam.segmentation.segmenter import Segmenter
from lpcam.storage.parallel import Beside

PLAIN, CRF = "segmented", "segmented_crf"


class MaskWriter(BasePredictionWriter):
    """Writes each picture's most probable labels as ``<id>.png`` when they come.

    Args:
        folder: Gets a folder ``segmented`` and, with a CRF, ``segmented_crf``.
        pictures: The pictures, of which the CRF sees the colours.
        crf: Parameters of the CRF, see :class:`~lpcam.segmentation.segmenter.Testing`.
    """

    def __init__(self, folder: Path, pictures: Sequence[Picture], crf: str | None) -> None:
        super().__init__("batch")
        self.folder = folder
        self.paths = {picture.id: picture.path for picture in pictures}
        self.parameters = crf_parameters(crf, "segmenter.crf") if crf else None
        for name in results_of(crf):
            (folder / name).mkdir(exist_ok=True)
        # The next forward pass does not wait for the CRF.
        self._writing = Beside(waiting=2)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: ViewBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the pictures of one batch."""
        for image_id, probabilities in zip(batch["ids"], prediction.cpu(), strict=True):
            self._writing.call(self._write, image_id, probabilities)

    def _write(self, image_id: str, probabilities: Tensor) -> None:
        # The last file of a picture says that it is done.
        save_mask(self.folder / PLAIN / f"{image_id}.png", _labels(probabilities))
        if self.parameters:
            pixels = np.array(open_picture(self.paths[image_id]))
            found = dense_crf(pixels, probabilities, self.parameters)
            save_mask(self.folder / CRF / f"{image_id}.png", _labels(found))

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the last files."""
        self._writing.finish()


def _labels(probabilities: Tensor) -> np.ndarray:
    return probabilities.argmax(0).numpy().astype(np.uint8)


def results_of(crf: str | None) -> tuple[str, ...]:
    """The folders of masks that are made."""
    return (PLAIN, CRF) if crf else (PLAIN,)


def check_crf(
    crf: str | None, setting: str = "segmenter.crf", instead: str = "segmenter.crf=null"
) -> None:
    """Make sure of the CRF's package.

    Args:
        crf: The name of its parameters, if there is to be one.
        setting: What the user calls it.
        instead: What the user may choose in its place.

    Raises:
        InputError: The package is missing.
    """
    if crf:
        check_backend("pydensecrf", f"{setting}={crf}", instead)


def predict_masks(
    make_trainer: MakeTrainer,
    segmenter: Segmenter,
    pictures: Sequence[Picture],
    folder: Path,
    *,
    num_workers: int | None,
) -> None:
    """Label every picture that has no mask yet.

    Args:
        make_trainer: Makes Lightning's trainer.
        segmenter: The trained network.
        pictures: The pictures; their labels are not looked at.
        folder: See :class:`MaskWriter`.
        num_workers: Processes that decode pictures.
    """
    testing = segmenter.testing
    assert testing is not None
    last = folder / results_of(testing.crf)[-1]
    missing = [p for p in pictures if not (last / f"{p.id}.png").is_file()]
    writer = MaskWriter(folder, missing, testing.crf)
    if missing:
        trainer = make_trainer(logger=False, callbacks=[writer], enable_checkpointing=False)
        loader = view_loader(
            [replace(picture, labels=()) for picture in missing],
            0,
            scales=testing.scales,
            flip=False,
            batch_size=testing.test_batch_size,
            num_workers=num_workers,
            processes=trainer.world_size,
        )
        trainer.predict(segmenter.eval(), loader, return_predictions=False)
        trainer.strategy.barrier()
