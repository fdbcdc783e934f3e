"""An inference job: its config turned into objects, and what the stages give for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import pydantic
from omegaconf import DictConfig, OmegaConf

from lpcam.errors import InputError
from lpcam.evaluation.instances import coco_tools
from lpcam.evaluation.segmentation import SegmentationResult
from lpcam.models.host import Host
from lpcam.programs.build import build, settings, trainer_maker
from lpcam.programs.options import options
from lpcam.programs.setup import give_seeds, trained
from lpcam.prototypes.centers import Centers, Clustering
from lpcam.prototypes.local_features import Draw
from lpcam.prototypes.maps import MapSetting, lpcam_setting
from lpcam.prototypes.prototype_set import Prototypes
from lpcam.prototypes.selection import Selection, select
from lpcam.refiners.base import Refiner, TrainedRefiner
from lpcam.refiners.irn import IRN
from lpcam.reporting.scores import Method
from lpcam.reporting.shown import choose_pictures
from lpcam.settings import CHECKED, Share
from lpcam.stages import backgrounds as background_stage
from lpcam.stages import centers as center_stage
from lpcam.stages import maps as map_stage
from lpcam.stages.features import FeatureLimit, features
from lpcam.stages.instance_scores import instance_scores
from lpcam.stages.instances import components, instances
from lpcam.stages.localisation import localisation
from lpcam.stages.refined import refined, trained_refiner
from lpcam.stages.scores import scores
from lpcam.storage.hashing import digest
from lpcam.storage.ranks import agree, is_main_process, joined
from lpcam.storage.store import Stage


@dataclass(frozen=True)
class Results:
    """What the stages gave for a job.

    Attributes:
        maps: Stages of maps by name (``cam``, ``lpcam``, ..., ``refined``) and split.
        scores: Their scores, likewise; without masks there are none.
        metrics: What ``metrics.json`` holds.
        backgrounds: The background score of each one's masks.
        methods: What is compared, by the same names, the baseline first.
        stages: Every stage by what the report calls it.
        instances: Those of instances by split; none where they are not wanted.
    """

    maps: Mapping[str, Mapping[str, Stage]]
    scores: Mapping[str, Mapping[str, SegmentationResult]]
    metrics: Mapping[str, float]
    backgrounds: Mapping[str, float]
    methods: Mapping[str, Method]
    stages: Mapping[str, Stage]
    instances: Mapping[str, Stage]


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Choice:
    """Which maps a job makes, and how masks are made of them.

    Attributes:
        use: The prototypes that LPCAM's maps are made with.
        source: The maps that masks are made of, or that are refined.
        seed_background: The score that a class has to exceed in a mask; ``auto`` chooses it for
            each kind of maps, from these and the pictures.
        unsure_band: How far from it a score has to be to count as sure.
    """

    use: Literal["both", "class", "context"]
    source: Literal["cam", "lpcam"]
    seed_background: Share | Literal["auto"]
    unsure_band: Share


class Run:
    """One inference job: its data, its host and its stages, computed when they are read.

    Args:
        cfg: The job's config.
        overrides: What was changed in it, for messages.

    Attributes:
        trained: The data and the trained host.
        dataset: The data.
        host: The trained host.
        refiner: The refiner, if there is one.

    Raises:
        InputError: Data or classifier are missing, or do not fit.
    """

    def __init__(self, cfg: DictConfig, overrides: Sequence[str]) -> None:
        self.cfg = cfg
        self.overrides = overrides
        self.store = Path(cfg.paths.store)
        self.clustering = settings(Clustering, cfg.prototypes, cfg.thresholds)
        self.draw = settings(Draw, cfg.prototypes)
        self.limit = settings(FeatureLimit, cfg.prototypes)
        self.selection = settings(Selection, cfg.thresholds, cfg.prototypes)
        self.inference = settings(map_stage.Inference, cfg.inference)
        self.choice = settings(Choice, cfg.prototypes, cfg.thresholds, cfg.refiner)
        chosen = options(cfg)
        self.localisation = chosen.localisation
        self.make_trainer = trainer_maker(cfg.trainer)
        # What is wrong with its settings is told now, even where one of them is found later.
        self.refiner = self._refiner(0.5)
        self.instances = chosen.instances
        if self.instances:
            if not isinstance(self.refiner, IRN):
                raise InputError(
                    "instances=true: needs displacements, which only IRN learns; add refiner=irn"
                )
            coco_tools()
        self.trained = trained(cfg, overrides)
        self.dataset = self.trained.dataset
        self.host: Host = self.trained.host
        if "_target_" in cfg.maps:
            self.host = build(cfg.maps, self.host)
        # What they lack is told now, and not after the maps.
        choose_pictures(self.dataset.pictures(self.dataset.map_splits[-1]), chosen.shown_pictures)
        if self.refiner:
            for split in self.dataset.map_splits:
                self.refiner.inputs(self.dataset.pictures(split))
        seeded = (self.dataset.prototype_split, *self.splits)
        give_seeds(self.trained, seeded, self.store, self.make_trainer, num_workers=cfg.num_workers)

    def _refiner(self, chosen: float) -> Refiner | None:
        """The configured refiner; a background score that is ``auto`` was chosen to be this."""
        if "_target_" not in self.cfg.refiner:
            return None
        node = self.cfg.refiner.copy()
        if node.get("seed_background") == "auto":
            node.seed_background = chosen
        refiner: Refiner = build(node)
        return refiner

    @cached_property
    def _chosen_features(self) -> tuple[list[list[int]], Stage]:
        pictures, chosen = center_stage.prototype_pictures(self.dataset, self.draw)
        found = features(
            self.store,
            self.make_trainer,
            self.host,
            pictures,
            local=True,
            num_workers=self.cfg.num_workers,
            sampled=self.inference.views if self.clustering.split == "multi_scale" else None,
            limit=self.limit,
        )
        return chosen, found

    @property
    def features(self) -> Stage:
        """Features for clustering."""
        return self._chosen_features[1]

    @cached_property
    def _clustered(self) -> tuple[Stage, Centers]:
        chosen, found = self._chosen_features
        return center_stage.centers(
            self.store, found, self.host, self.dataset, self.clustering, chosen
        )

    @property
    def centers(self) -> Centers:
        """All centres."""
        return self._clustered[1]

    @cached_property
    def prototypes(self) -> Prototypes:
        """What is kept of the centres."""
        return select(self.centers, self.host, self.dataset.classes, self.selection)

    @cached_property
    def settings(self) -> dict[str, MapSetting]:
        """The maps that the job makes."""
        use = self.choice.use
        spread = self.inference.propagation
        found = {"cam": MapSetting(), "lpcam": lpcam_setting(self.prototypes, use, spread)}
        if spread:
            found["lpcam_plain"] = lpcam_setting(self.prototypes, use)
        elif use == "both":
            found["lpcam_class"] = lpcam_setting(self.prototypes, "class")
        return found

    @property
    def titles(self) -> dict[str, str]:
        """Names for people of the maps that are scored, what is compared with what first."""
        spread = "lpcam_plain" in self.settings
        titles = {"cam": self.host.title, "lpcam": "LPCAM, spread" if spread else "LPCAM"}
        if self.refiner:
            source = self.refiner.source
            extra = f", uses {self.refiner.uses}" if self.refiner.uses else ""
            title = f"{titles[source]} + {type(self.refiner).__name__}{extra}"
            titles = {source: titles[source], "refined": title, **titles}
        if spread:
            titles["lpcam_plain"] = "LPCAM"
        if "lpcam_class" in self.settings:
            titles["lpcam_class"] = "LPCAM without context"
        return titles

    @property
    def sharing(self) -> str:
        """Jobs of which this is the same can make their maps in one pass over the pictures."""
        return digest(
            [
                str(self.store),
                self.host.feature_key,
                self.host.score_key,
                OmegaConf.to_container(self.cfg.dataset, resolve=True),
                OmegaConf.to_container(self.cfg.inference, resolve=True),
            ]
        )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that get maps; a refiner is trained on those of the training split."""
        splits = self.dataset.map_splits
        if isinstance(self.refiner, TrainedRefiner):
            splits = tuple(dict.fromkeys((*splits, self.dataset.train_split)))
        return splits

    def maps(self, wanted: Mapping[str, MapSetting]) -> dict[str, dict[str, Stage]]:
        """Maps by setting and split, in one pass over each split.

        Args:
            wanted: The settings of this job, or of several.
        """
        by_split = {
            split: map_stage.maps(
                self.store,
                self.make_trainer,
                self.host,
                self.dataset.pictures(split),
                wanted,
                self.inference,
                num_workers=self.cfg.num_workers,
            )
            for split in self.splits
        }
        return {name: {split: by_split[split][name] for split in by_split} for name in wanted}

    def backgrounds(self, maps: Mapping[str, Mapping[str, Stage]]) -> dict[str, float]:
        """The background score of each kind of maps, the configured one or the chosen ones.

        Args:
            maps: Maps by name and split.
        """
        given = self.choice.seed_background
        if given != "auto":
            return dict.fromkeys(maps, given)
        return agree(self._chosen(maps) if is_main_process() or not joined() else {})

    def _chosen(self, maps: Mapping[str, Mapping[str, Stage]]) -> dict[str, float]:
        """Background scores chosen from pictures."""
        if "lpcam_plain" in maps:  # a map that is carried on keeps its background score
            maps = {**maps, "lpcam": maps["lpcam_plain"]}
        split = self._choosing_split(next(iter(maps.values())))
        return background_stage.backgrounds(
            self.store,
            {name: by_split[split] for name, by_split in maps.items()},
            self.dataset.pictures(split),
        )

    def _choosing_split(self, by_split: Mapping[str, Stage]) -> str:
        """The split that scores are chosen on: that of training, the first where it has no maps."""
        train = self.dataset.train_split
        return train if train in by_split else next(iter(by_split))

    def _learnt(self, maps: Mapping[str, Stage]) -> Stage | None:
        """What the refiner learnt from its maps, if it is one that learns."""
        if not isinstance(self.refiner, TrainedRefiner):
            return None
        return trained_refiner(
            self.store,
            self.make_trainer,
            self.host,
            self.refiner,
            self.dataset,
            maps[self.dataset.train_split],
            seed=self.cfg.seed,
            num_workers=self.cfg.num_workers,
        )

    def results(self) -> Results:
        """Run every stage that is not done; what is refined and scored belongs to one process."""
        maps = self.maps(self.settings)
        backgrounds = self.backgrounds(maps)
        objects: dict[str, dict[str, Stage]] = {}
        if self.refiner:
            self.refiner = self._refiner(backgrounds[self.refiner.source]) or self.refiner
            source = maps[self.refiner.source]
            learnt = self._learnt(source)
            found = refined(self.store, self.host, self.refiner, learnt, self.dataset, source)
            if found:
                maps["refined"] = found
                backgrounds["refined"] = self.refiner.background
                if self.refiner.rule_of_thumb:
                    split = self._choosing_split(found)
                    backgrounds["refined"] = background_stage.matched_background(
                        source[split],
                        found[split],
                        self.dataset.pictures(split),
                        backgrounds[self.refiner.source],
                    )
                if self.instances and learnt and isinstance(self.refiner, IRN):
                    place = (self.store, self.dataset, found, backgrounds["refined"])
                    objects["instances"] = instances(
                        *place, source, self.host, self.refiner, learnt
                    )
                    objects["components"] = components(*place)
        scored = scores(self.store, maps, self.dataset)
        metrics = {
            f"{split}/{name}/{key}": value
            for name, by_split in scored.items()
            for split, result in by_split.items()
            for key, value in result.metrics(self.dataset.classes, backgrounds[name]).items()
        }
        if self.localisation:
            metrics |= localisation(self.store, maps, self.dataset)
        if objects:
            metrics |= instance_scores(self.dataset, objects)
        for split in self.dataset.map_splits:
            if skipped := self.dataset.skipped.get(split):
                metrics[f"{split}/skipped"] = len(skipped)
        methods = {
            name: Method(
                title,
                scored[name],
                {split: maps[name][split].records for split in self.dataset.map_splits},
            )
            for name, title in self.titles.items()
            if name in maps  # refined ones belong to the main process
        }
        stages = {"features": self.features, "clustering": self._clustered[0]}
        for name, by_split in {**maps, **objects}.items():
            stages |= {f"{name} of {split}": stage for split, stage in by_split.items()}
        return Results(
            maps, scored, metrics, backgrounds, methods, stages, objects.get("instances", {})
        )
