"""Segmentation networks: a config's network before and after training, and what a run leaves."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from lpcam.data.coco import CATEGORY_IDS
from lpcam.data.dataset import SegmentationDataset
from lpcam.data.files import file_names
from lpcam.data.voc import CLASSES
from lpcam.errors import InputError
from lpcam.evaluation.segmentation import SegmentationResult
from lpcam.explain.export import export_coco
from lpcam.programs.build import build, settings, trainer_maker
from lpcam.programs.entry import choices, command_line
from lpcam.programs.options import options
from lpcam.programs.setup import Network
from lpcam.reporting.scores import MaskMethod
from lpcam.reporting.segmentation import write_segmentation_report
from lpcam.reporting.shown import choose_pictures, saved_pictures, show
from lpcam.reporting.tracking import recording, start
from lpcam.reporting.wandb_content import log_results
from lpcam.segmentation.file import load_network
from lpcam.segmentation.masks import TRUTH, Masks, PseudoMasks, open_masks
from lpcam.segmentation.networks import Architecture, SegmentationNetwork, build_network
from lpcam.segmentation.predict import CRF, PLAIN, check_crf, results_of
from lpcam.segmentation.segmenter import Learning, Segmenter, Testing
from lpcam.settings import CHECKED, Text
from lpcam.stages.scores import mask_scores
from lpcam.stages.segmenter import NETWORK, segmented, segmenter_stage, trained_network
from lpcam.storage.files import write_atomically, write_json
from lpcam.storage.records import Records
from lpcam.storage.store import Stage

# Overrides of infer.py that train.py needs too, to train the network that is looked for.
SHARED = (
    "task",
    "dataset",
    "backbone",
    "segmenter",
    "masks",
    "trainer",
    "paths",
    "seed",
    "recipe",
    "experiments",
)
PSEUDO = "masks"
TITLES = {PSEUDO: "pseudo masks", PLAIN: "network", CRF: "network, CRF"}


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Choice:
    """What a run learns from, and what it leaves beside its masks.

    Attributes:
        masks: A run's folder, or ``truth``.
        export: ``voc`` for the folders of PASCAL's evaluation server, ``coco`` for a file of
            results.
    """

    masks: Text | None = None
    export: Literal["voc", "coco"] | None = None


@dataclass(frozen=True)
class Setup:
    """What a network is trained with.

    Attributes:
        dataset: The data.
        masks: What it learns from.
        network: The network, not yet trained.
        architecture: Which it is.
        learning: How it learns.
        stage: Where it lies in the store once it is trained.
    """

    dataset: SegmentationDataset
    masks: Masks
    network: SegmentationNetwork
    architecture: Architecture
    learning: Learning
    stage: Stage


def set_up_network(cfg: DictConfig) -> Setup:
    """Build what a config describes; nothing is trained, but data may be generated.

    Raises:
        InputError: A setting is wrong, or data or masks are missing or do not fit.
    """
    dataset: SegmentationDataset = build(cfg.dataset)
    architecture = settings(Architecture, cfg.segmenter)
    learning = settings(Learning, cfg.segmenter)
    settings(Testing, cfg.segmenter)
    wanted = settings(Choice, cfg, cfg.segmenter)
    backbone = settings(Network, cfg.backbone)
    if wanted.masks is None:
        raise InputError(
            f"masks: needs a value; name the folder of a run of infer.py, or {TRUTH} for the data "
            "set's own masks"
        )
    masks = open_masks(wanted.masks, dataset)
    pl.seed_everything(cfg.seed, verbose=False)
    if backbone.options:
        raise InputError(
            f"backbone.options={dict(backbone.options)}: a segmentation network takes none; leave "
            "them out"
        )
    network = build_network(backbone.name, backbone.weights, len(dataset.classes), architecture)
    dataset.prepare(labelled=False)
    stage = segmenter_stage(
        Path(cfg.paths.store),
        dataset,
        masks,
        network,
        architecture,
        learning,
        seed=cfg.seed,
        precision=str(cfg.trainer.precision),
    )
    return Setup(dataset, masks, network, architecture, learning, stage)


@dataclass(frozen=True)
class Results:
    """What the stages gave for a job.

    Attributes:
        scores: Scores by name (``masks``, ``segmented``, ``segmented_crf``) and split.
        metrics: What ``metrics.json`` holds.
        methods: The masks, by the same names.
        stages: Every stage by what the report calls it.
    """

    scores: Mapping[str, Mapping[str, SegmentationResult]]
    metrics: Mapping[str, float]
    methods: Mapping[str, MaskMethod]
    stages: Mapping[str, Stage]


class SegmentationRun:
    """One job: its data, its trained network, and its masks, made when they are read.

    Args:
        cfg: The job's config.
        overrides: What was changed in it, for messages.

    Attributes:
        dataset: The data.
        titles: Names of what is compared.

    Raises:
        InputError: Data or network are missing, or do not fit.
    """

    titles = TITLES

    def __init__(self, cfg: DictConfig, overrides: Sequence[str]) -> None:
        self.cfg = cfg
        self.overrides = overrides
        self.testing = settings(Testing, cfg.segmenter)
        self.wanted = settings(Choice, cfg, cfg.segmenter)
        self.make_trainer = trainer_maker(cfg.trainer)
        check_crf(self.testing.crf)
        self.stage: Stage | None = None
        self.masks: Masks | None = None
        if cfg.ckpt is None:
            setup = set_up_network(cfg)
            self.dataset, self.masks, self.stage = setup.dataset, setup.masks, setup.stage
            self.file = trained_network(setup.stage, command_line("train", overrides, SHARED))
        else:
            self.dataset = build(cfg.dataset)
            self.dataset.prepare(labelled=False)
            self.file = Path(cfg.ckpt).expanduser()
            if self.wanted.masks:
                self.masks = open_masks(self.wanted.masks, self.dataset)
        found = load_network(self.file)
        if found.classes != self.dataset.classes:
            raise InputError(
                f"ckpt={self.file}: a network of {', '.join(found.classes)}, the data set has "
                f"{', '.join(self.dataset.classes)}; give one of the same classes"
            )
        if self.wanted.export == "voc" and self.dataset.classes != CLASSES:
            raise InputError(
                "segmenter.export=voc: the server wants VOC's 20 classes in their order; leave "
                "dataset.classes out"
            )
        if self.wanted.export == "coco" and len(self.dataset.classes) != len(CATEGORY_IDS):
            raise InputError("segmenter.export=coco: needs COCO's 80 classes; leave it out")
        self.segmenter = Segmenter(found.network, testing=self.testing)
        shown = options(cfg).shown_pictures
        self.shown = choose_pictures(self.dataset.pictures(self.last), shown)

    @property
    def last(self) -> str:
        """The split whose pictures are shown."""
        return self.dataset.map_splits[-1]

    @cached_property
    def _folders(self) -> dict[str, dict[str, Path]]:
        """Folders of masks by name and split: those learnt from where they are known."""
        folders: dict[str, dict[str, Path]] = {}
        if isinstance(self.masks, PseudoMasks):
            there = file_names(self.masks.folder)
            folders[PSEUDO] = {
                split: self.masks.folder
                for split in self.dataset.map_splits
                if all(f"{p.id}.png" in there for p in self.dataset.pictures(split))
            }
        for name in results_of(self.testing.crf):
            folders[name] = {split: s.folder / name for split, s in self._segmented.items()}
        return {name: found for name, found in folders.items() if found}

    @cached_property
    def _segmented(self) -> dict[str, Stage]:
        return {
            split: segmented(
                Path(self.cfg.paths.store),
                self.make_trainer,
                self.segmenter,
                self.dataset.pictures(split),
                precision=str(self.cfg.trainer.precision),
                num_workers=self.cfg.num_workers,
            )
            for split in self.dataset.map_splits
        }

    def results(self) -> Results:
        """Label the pictures of every split, and score the labels."""
        scored = mask_scores(self._folders, self.dataset)
        metrics = {
            f"{split}/{name}/{key}": value
            for name, by_split in scored.items()
            for split, result in by_split.items()
            for key, value in result.metrics(self.dataset.classes, float("nan")).items()
        }
        methods = {
            name: MaskMethod(
                TITLES[name], scored[name], {split: Records(f) for split, f in folders.items()}
            )
            for name, folders in self._folders.items()
        }
        stages = {f"masks of {split}": stage for split, stage in self._segmented.items()}
        if self.stage:
            stages = {"training": self.stage, **stages}
        return Results(scored, metrics, methods, stages)


def save(output: Path, cfg: DictConfig, run: SegmentationRun, results: Results) -> None:
    """Write config, metrics, network and masks, those of the CRF if there is one.

    Args:
        output: The run's folder.
        cfg: The run's config.
        run: The job.
        results: What its stages gave.
    """
    folder = output / "masks"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_json(output / "metrics.json", results.metrics)
    shutil.copyfile(run.file, output / NETWORK)
    final = results.methods[results_of(run.testing.crf)[-1]].maps
    few = cfg.save == "shown" and run.wanted.export is None  # an export is of all
    for split in run.dataset.map_splits:
        targets = [folder]
        if run.wanted.export == "voc":
            targets.append(output / "results" / "VOC2012" / "Segmentation" / f"comp6_{split}_cls")
            targets[-1].mkdir(parents=True, exist_ok=True)
        for picture in saved_pictures(run.dataset, split, cfg.shown_pictures, few=few):
            for target in targets:
                name = f"{picture.id}.png"
                shutil.copyfile(final[split].folder / name, target / name)
    if run.wanted.export == "coco":
        export_coco(folder, output / "coco_results.json", CATEGORY_IDS)


def report(output: Path, cfg: DictConfig, run: SegmentationRun, results: Results) -> None:
    """Write ``report.html`` and ``figures/*.png``; arguments as for :func:`save`."""
    write_segmentation_report(
        output / "report.html",
        title=f"Segmentation of {cfg.dataset._target_.split('.')[-1]}",
        command=command_line("infer", run.overrides),
        config=OmegaConf.to_yaml(cfg, resolve=True),
        dataset=run.dataset,
        splits={split: run.dataset.pictures(split) for split in run.dataset.map_splits},
        methods=list(results.methods.values()),
        shown=run.shown,
        seconds={name: stage.manifest["seconds"] for name, stage in results.stages.items()},
    )


def log(output: Path, cfg: DictConfig, run: SegmentationRun, results: Results) -> None:
    """Send the run to the configured logger; arguments as for :func:`save`."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    keys = {"store": {name: stage.key for name, stage in results.stages.items()}}
    methods = {name: m for name, m in results.methods.items() if run.last in m.maps}
    used = {f"segmenter-{run.stage.key}": run.file} if run.stage else {}
    with recording():
        log_results(
            start(build(cfg.logger), config | keys, choices()),
            metrics=results.metrics,
            scores=results.scores,
            classes=run.dataset.classes,
            figures=sorted((output / "figures").glob("*.png")),
            shown=show(run.dataset, run.shown, methods, run.last, float("nan")),
            made={"metrics": output / "metrics.json"},
            used=used,
        )
