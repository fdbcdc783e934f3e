"""A page to try maps on, which ``lpcam demo`` serves.

Streamlit runs this file anew whenever a control is moved; the model is kept meanwhile.
"""

import argparse

import streamlit as st
import torch
from PIL import Image
from torch import Tensor

from lpcam.data.dataset import open_picture
from lpcam.data.transforms import normalize, rescale
from lpcam.errors import InputError
from lpcam.explain.command import choose, load, model_options
from lpcam.visualize import mask_overlay, overlay, to_grey, to_image

Titled = list[tuple[str, Image.Image]]


def page() -> None:
    """Draw the page: an uploaded picture's maps, masks, and what its prototypes look at.

    Raises:
        InputError: A file cannot be read, or files do not belong together.
    """
    options = argparse.ArgumentParser(parents=[model_options()]).parse_args()
    kept = st.cache_resource(show_spinner="Loading the model")(load)
    cam, backbone = kept(options.model, options.weights, options.ckpt, options.prototypes)
    uploaded = st.sidebar.file_uploader("Picture", ["jpg", "jpeg", "png", "webp"])
    if uploaded is None:
        st.info("Upload a picture at the left.")
        return
    picture = open_picture(uploaded)
    picture = rescale(picture, min(1, options.side / max(picture.size)))
    images = normalize(picture, backbone.mean, backbone.std)[None]
    best = choose(cam, images, [], top=1)[0].nonzero()[:, 0].tolist()
    # The same name may stand for two classes, so they are told apart by number.
    classes = st.sidebar.multiselect(
        "Classes", cam.head.fitted, best, format_func=cam.classes.__getitem__
    )
    threshold = st.sidebar.slider("Threshold of the mask", 0.0, 1.0, 0.5)
    labels = torch.zeros(1, len(cam.classes))
    labels[0, classes] = 1
    lpcam, plain = (maps[0].cpu() for maps in cam.compare(images, labels))
    for c in classes:
        st.header(cam.classes[c])
        mask = mask_overlay(to_grey(picture), (lpcam[c] > threshold).byte().numpy())
        beside([
            ("Picture", picture),
            ("CAM", overlay(picture, plain[c])),
            ("LPCAM", overlay(picture, lpcam[c])),
            (f"LPCAM above {threshold:.2f}", to_image(mask)),
        ])  # fmt: skip
        st.caption("Similarity to each prototype, and the largest cosine")
        beside(similar(picture, cam.similarity(images, c)[0], cam.prototypes.indices[c][0]))


def similar(picture: Image.Image, cosines: Tensor, indices: list[int]) -> Titled:
    """The picture under its cosines ``(P, H, W)`` to each prototype."""
    return [
        (f"{index}: {float(cosine.max()):.2f}", overlay(picture, cosine.relu()))
        for index, cosine in zip(indices, cosines, strict=True)
    ]


def beside(shown: Titled) -> None:
    """Put titled pictures into rows of four."""
    for start in range(0, len(shown), 4):
        for column, (title, image) in zip(st.columns(4), shown[start : start + 4], strict=False):
            column.image(image, title)


if __name__ == "__main__":
    st.set_page_config("LPCAM", layout="wide")
    st.title("CAM and LPCAM")
    try:
        page()
    except InputError as error:
        st.error(f"error: {error}")
