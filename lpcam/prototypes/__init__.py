"""From local features to prototypes, and from those to maps (section 3.2 of the paper)."""

from lpcam.prototypes.kmeans import spherical_kmeans
from lpcam.prototypes.selection import select_prototypes

__all__ = ["select_prototypes", "spherical_kmeans"]
