"""Self-contained HTML pages: templates, and pictures inside them."""

import base64
from pathlib import Path

import cv2
import jinja2
import numpy as np


def templates(folder: Path) -> jinja2.Environment:
    """Templates in a folder and in this one; values are escaped, a missing name is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader((folder, Path(__file__).parent)),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def encode(picture: np.ndarray, suffix: str) -> bytes:
    """(H, W, 3) uint8 RGB as the bytes of a file with this suffix."""
    done, data = cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    assert done
    return data.tobytes()


def data_url(content: bytes, kind: str) -> str:
    """The content of an image/`kind` file as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def inline(picture: np.ndarray, suffix: str) -> str:
    """(H, W, 3) uint8 RGB as a data URL of a .jpg or .png file."""
    kind = {".jpg": "jpeg", ".png": "png"}[suffix]
    return data_url(encode(picture, suffix), kind)
