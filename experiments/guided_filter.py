# python experiments/guided_filter.py experiments=voc_animals dataset.root=~/VOC2012
"""What a guided filter adds to LPCAM's maps, with and without the step between positions.

Takes the overrides of ``infer.py``, after its training. He et al., "Guided Image Filtering", ECCV
2010: in each window a map is a linear function of the picture's grey values, so that it changes
where they do. Every third picture of each split is scored, at the best threshold of each filter.
"""

import sys

import numpy as np
from rich.progress import track
from scipy.ndimage import uniform_filter
from torch import from_numpy

from lpcam.data.dataset import open_picture
from lpcam.evaluation import SegmentationScore
from lpcam.functional import normalize_maps
from lpcam.programs.compose import infer_config
from lpcam.programs.run import Run
from lpcam.seeds.record import read_seed

RADII = (4, 8, 16, 32)  # pixels
REGULARITIES = (1e-4, 1e-3, 1e-2)  # variance of grey values in 0..1 that counts as an edge


def guided(maps: np.ndarray, grey: np.ndarray, radius: int, regularity: float) -> np.ndarray:
    """Filter maps ``(L, H, W)`` by the grey values ``(H, W)`` of their picture."""
    window = 2 * radius + 1

    def mean(values: np.ndarray) -> np.ndarray:
        return uniform_filter(values, (*(1,) * (values.ndim - 2), window, window))

    middle = mean(grey)
    slope = mean(maps * grey) - mean(maps) * middle
    slope /= mean(grey**2) - middle**2 + regularity
    return mean(slope) * grey + mean(mean(maps) - slope * middle)


def main() -> None:
    """Print a table a split."""
    run = Run(infer_config([*sys.argv[1:], "inference.propagate=3"], "outputs/guided"), [])
    settings = {run.titles[name]: run.settings[name] for name in ("lpcam_plain", "lpcam")}
    found = run.maps(settings)
    count = len(run.dataset.classes)
    filters = [(radius, regularity) for radius in RADII for regularity in REGULARITIES]
    for split in run.dataset.map_splits:
        totals = {
            (title, chosen): SegmentationScore(count)
            for title in settings
            for chosen in (None, *filters)
        }
        for picture in track(run.dataset.pictures(split)[::3], split):
            grey = np.asarray(open_picture(picture.path).convert("L"), np.float32) / 255
            mask = run.dataset.mask(picture)
            for title in settings:
                seed = read_seed(found[title][split].records, picture.id)
                maps = seed.full_size().numpy()
                for chosen in (None, *filters):
                    changed = guided(maps, grey, *chosen) if chosen else maps
                    scaled = normalize_maps(from_numpy(changed))
                    totals[title, chosen].update(scaled, seed.keys.tolist(), mask)
        print(f"| {split}: radius, regularity | {' | '.join(settings)} |")
        for chosen in (None, *filters):
            best = [float(totals[title, chosen].compute().miou.max()) for title in settings]
            shown = f"{chosen[0]}, {chosen[1]:g}" if chosen else "none"
            print(f"| {shown} | {' | '.join(f'{100 * value:.1f}' for value in best)} |")


if __name__ == "__main__":
    main()
