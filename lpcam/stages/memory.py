"""Memory of a pass over pictures: whether it suffices, and that freed memory is used again."""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lpcam.data.dataset import Picture, open_image
from lpcam.errors import InputError

# Bytes of a forward pass for each pixel of a view, as EfficientNet-Lite0 takes them on a CPU: 587
# were seen with 2000x2000 pixels and their mirror image, 286 without it.
PASS_BYTES = 290
# Numbers of glibc's mallopt.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4


def check_memory(
    pictures: Sequence[Picture], scales: Sequence[float], *, flip: bool, batch_size: int, cuda: bool
) -> None:
    """Make sure that a pass over the largest picture fits into memory, before days of smaller ones.

    Args:
        pictures: The pictures; only the heads of their files are read.
        scales: Factors on the pictures' size.
        flip: Whether mirror images share the forward pass.
        batch_size: Pictures that may share it too.
        cuda: Whether it runs on a GPU.

    Raises:
        InputError: It does not fit, or a picture cannot be read.
    """
    largest, name, size = 0, "", (0, 0)
    for picture in pictures:
        with open_image(picture.path, decode=False) as image:
            if image.width * image.height > largest:
                size = image.width, image.height
                largest, name = image.width * image.height, str(picture.path)
    scale = max(scales)
    needed = PASS_BYTES * largest * scale**2 * (2 if flip else 1) * batch_size
    there = memory(cuda=cuda)
    if needed > there:
        raise InputError(
            f"{name}: a pass over {size[0]}x{size[1]} pixels at scale {scale:g} takes about "
            f"{needed / 1e9:.0f} GB, and the {'GPU' if cuda else 'machine'} has {there / 1e9:.0f}; "
            "shrink the picture, or lower inference.scales or inference.batch_size"
        )


def memory(*, cuda: bool) -> int:
    """Bytes of memory of the GPU or of the machine."""
    if cuda:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def reused_memory() -> Iterator[None]:
    """Let the process keep what is freed inside, and give it back at the end.

    Every layer of a network allocates its output. The C library gets more than 32 MB from the
    system each time and gives them back, a page fault for each 4 kB: of a pass over four scales of
    EfficientNet-Lite0 a fifth of the processors' time. Nothing is done without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 2**26)
    try:
        yield
    finally:  # what glibc itself has after large tensors: it raises both thresholds as it goes
        mallopt(_MMAP_MAX, 2**16)
        mallopt(_MMAP_THRESHOLD, 2**25)
        mallopt(_TRIM_THRESHOLD, 2**26)
        mallopt(_TOP_PAD, 2**17)
        ctypes.CDLL(None).malloc_trim(0)
