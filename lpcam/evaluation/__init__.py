"""Scores of maps and masks."""

from lpcam.evaluation.segmentation import SegmentationResult, SegmentationScore

__all__ = ["SegmentationResult", "SegmentationScore"]
