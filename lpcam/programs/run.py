"""An inference job's config turned into objects, and what the stages give for it.

The one file below the programs that reads a config; all that it calls takes plain arguments.
"""

import functools
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from lpcam import map_stages, pipeline, training
from lpcam.models.backbones import build_backbone
from lpcam.prototypes.centers import Centers
from lpcam.models.classifier import Classifier, load_classifier
from lpcam.data.dataset import SegmentationDataset
from lpcam.programs.entry import build, command_line
from lpcam.stages.maps import MapSetting, lpcam_setting
from lpcam.prototypes.prototype_set import Prototypes
from lpcam.prototypes.selection import select
from lpcam.refiners.base import Refiner, TrainedRefiner
from lpcam.storage.store import Stage
from lpcam.storage.hashing import digest

# What a classifier is found by.
CLASSIFIER = ("dataset", "backbone", "classifier", "paths", "seed", "recipe", "experiments")


class Run:
    """One inference job: its data, its classifier and its stages, computed when they are read.

    Args:
        cfg: The job's config.
        overrides: What was changed in it, for messages.

    Attributes:
        dataset: The data.
        trained: The classifier's stage in the store; None if a checkpoint was given.
        checkpoint: The classifier's file.
        classifier: The trained classifier.
        refiner: The refiner, if there is one.

    Raises:
        InputError: Data or classifier are missing, or do not fit.
    """

    def __init__(self, cfg: DictConfig, overrides: Sequence[str]) -> None:
        self.cfg = cfg
        self.store = Path(cfg.paths.store)
        self.make_trainer = build(cfg.trainer)
        pl.seed_everything(cfg.seed, verbose=False)
        names = ["dataset", "backbone", "classifier", "ckpt", "seed", "paths"]
        own = OmegaConf.create(
            OmegaConf.to_container(OmegaConf.masked_copy(cfg, names), resolve=True)
        )
        del own.paths.output  # differs between the jobs of a sweep, which share the rest
        self.dataset, self.trained, self.checkpoint, self.classifier = _load(
            OmegaConf.to_yaml(own), command_line("train", overrides, CLASSIFIER)
        )
        self.refiner: Refiner | None = None
        if "_target_" in cfg.refiner:
            self.refiner = build(cfg.refiner)

    @cached_property
    def features(self) -> Stage:
        """Features for clustering."""
        return self._chosen_features[1]

    @cached_property
    def _chosen_features(self) -> tuple[list[list[int]], Stage]:
        pictures, chosen = pipeline.prototype_pictures(
            self.dataset,
            images_per_class=self.cfg.prototypes.images_per_class,
            with_replacement=self.cfg.prototypes.with_replacement,
            seed=self.cfg.prototypes.seed,
        )
        found = pipeline.features(
            self.store,
            self.make_trainer,
            self.classifier,
            pictures,
            local=True,
            num_workers=self.cfg.num_workers,
            split=self.cfg.prototypes.split,
            scales=self.cfg.inference.scales,
            flip=self.cfg.inference.flip,
        )
        return chosen, found

    @cached_property
    def clustering(self) -> tuple[Stage, Centers]:
        """All centres, and the stage that holds them."""
        own, chosen = self.cfg.prototypes, self._chosen_features[0]
        return pipeline.centers(
            self.store,
            self.features,
            self.classifier,
            self.dataset,
            k=own.k,
            tau=self.cfg.thresholds.activation,
            seed=own.seed,
            init=own.init,
            tol=own.tol,
            max_iter=own.max_iter,
            allow_missing=own.allow_missing,
            chosen=chosen,
            split=own.split,
        )

    @cached_property
    def prototypes(self) -> Prototypes:
        """What is kept of the centres."""
        own = self.cfg.thresholds
        return select(
            self.clustering[1],
            self.classifier.weight,
            self.dataset.classes,
            class_minimum=own.class_score,
            context_maximum=own.context_score,
            context_minimum=own.context_floor,
            fallback=self.cfg.prototypes.fallback,
        )

    @cached_property
    def settings(self) -> dict[str, MapSetting]:
        """The maps that the job makes."""
        use = self.cfg.prototypes.use
        settings = {"cam": MapSetting(), "lpcam": lpcam_setting(self.prototypes, use)}
        if use == "both":
            settings["lpcam_class"] = lpcam_setting(self.prototypes, "class")
        return settings

    @property
    def titles(self) -> dict[str, str]:
        """Names for people of the maps that are scored, what is compared with what first."""
        titles = {"cam": "CAM", "lpcam": "LPCAM"}
        if self.refiner:
            source = self.refiner.source
            extra = f", uses {self.refiner.uses}" if self.refiner.uses else ""
            refined = f"{titles[source]} + {type(self.refiner).__name__}{extra}"
            titles = {source: titles[source], "refined": refined, **titles}
        if "lpcam_class" in self.settings:
            titles["lpcam_class"] = "LPCAM without context"
        return titles

    def threshold(self, name: str) -> float:
        """The configured background score of maps."""
        if name == "refined" and self.refiner:
            return self.refiner.background
        return float(self.cfg.thresholds.seed_background)

    @property
    def sharing(self) -> str:
        """Jobs of which this is the same can make their maps in one pass over the pictures."""
        return digest(
            [
                str(self.store),
                self.classifier.backbone.fingerprint,
                pipeline.tensor_digest(self.classifier.weight),
                OmegaConf.to_container(self.cfg.dataset, resolve=True),
                OmegaConf.to_container(self.cfg.inference, resolve=True),
            ]
        )

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The splits that get maps; a refiner is trained on those of the training split."""
        splits = self.dataset.map_splits
        if isinstance(self.refiner, TrainedRefiner):
            splits = tuple(dict.fromkeys((*splits, self.dataset.train_split)))
        return splits

    def maps(self, settings: Mapping[str, MapSetting]) -> dict[str, dict[str, Stage]]:
        """Maps by setting and split, in one pass over each split.

        Args:
            settings: Those of this job, or of several.
        """
        own = self.cfg.inference
        by_split = {
            split: map_stages.maps(
                self.store,
                self.make_trainer,
                self.classifier,
                self.dataset.pictures(split),
                settings,
                scales=sorted(set(own.scales)),
                flip=own.flip,
                eps=own.eps,
                keep_features=own.keep_features,
                batch_size=own.batch_size,
                num_workers=self.cfg.num_workers,
            )
            for split in self.splits
        }
        return {name: {split: by_split[split][name] for split in by_split} for name in settings}

    def refined(self, maps: Mapping[str, Mapping[str, Stage]]) -> dict[str, Stage]:
        """Refined maps by split; none without a refiner."""
        if self.refiner is None:
            return {}
        return map_stages.refined(
            self.store,
            self.make_trainer,
            self.classifier,
            self.refiner,
            self.dataset,
            maps[self.refiner.source],
            num_workers=self.cfg.num_workers,
        )


@functools.lru_cache(maxsize=1)
def _load(
    text: str, train_command: str
) -> tuple[SegmentationDataset, Stage | None, Path, Classifier]:
    """Data set and classifier; the jobs of a sweep in one process share them."""
    cfg = OmegaConf.create(text)
    dataset: SegmentationDataset = build(cfg.dataset)
    dataset.prepare()
    backbone = build_backbone(cfg.backbone.name, cfg.backbone.weights)
    if cfg.ckpt is not None:
        trained, checkpoint = None, Path(cfg.ckpt).expanduser()
    else:
        settings: Any = OmegaConf.to_container(cfg.classifier)
        trained = training.classifier_stage(
            Path(cfg.paths.store), dataset, backbone, settings, cfg.seed
        )
        checkpoint = training.trained_checkpoint(trained, train_command)
    return dataset, trained, checkpoint, load_classifier(checkpoint, backbone, len(dataset.classes))
