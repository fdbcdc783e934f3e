"""HTML pages that need nothing but themselves."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from lpcam.seeds.palette import palette


def render(template: Path, **values: Any) -> str:
    """Fill a template; what it shows is escaped, and it may include ``page.css``.

    Args:
        template: The template's file.
        **values: What it shows.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)


def data_uri(image: Image.Image) -> str:
    """A picture as JPEG in the address of an ``<img>``."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def class_colours(count: int) -> list[str]:
    """The masks' colours of the classes, as CSS writes them."""
    values = palette()
    return ["#{:02x}{:02x}{:02x}".format(*values[3 * c : 3 * c + 3]) for c in range(1, count + 1)]
