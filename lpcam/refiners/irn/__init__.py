"""IRN: maps spread by a random walk up to boundaries that a network learns from the maps.

Ahn et al., "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR
2019. The network also learns displacements towards the centres of objects, which tell the objects
of a class apart; the pseudo masks of classes need the boundaries alone.
"""

from lpcam.refiners.irn.refiner import IRN, POWER, THRESHOLDS

__all__ = ["IRN", "POWER", "THRESHOLDS"]
