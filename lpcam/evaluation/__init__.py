"""Scores of maps and masks."""

from lpcam.evaluation.labels import LabelScore
from lpcam.evaluation.segmentation import SegmentationResult, SegmentationScore

__all__ = ["LabelScore", "SegmentationResult", "SegmentationScore"]
