"""Data sets, from folders of pictures to batches."""
