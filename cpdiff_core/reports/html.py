"""What every page shares: one file with its style, its script and its data inside, and nothing that can run but those."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cpdiff_core.reports.cost import amount

SCRIPTS = ("tables.js", "plots.js", "explore.js", "pictures.js", "start.js")
IMAGE_BYTES = 3_000_000
"""Of images inside one page, as text; further ones are linked, in the folder of the page."""
_WEBP_QUALITY = 90


class Pictures:
    """The images of one page: inside it while there is room, beside it after that. folder: where the page lies."""

    def __init__(self, folder: Path, room: int = IMAGE_BYTES) -> None:
        self._folder, self._room = folder, room

    def source(self, name: str) -> str:
        """What to write as the source of figure `name`, a PNG that lies in the folder."""
        return self._inside(name, "png", (self._folder / name).read_bytes())

    def photos(self, name: str) -> str:
        """The same of a sheet of photographs: inside the page as WebP, a fifth of the PNG, which stays beside it."""
        from PIL import Image

        data = io.BytesIO()
        with Image.open(self._folder / name) as sheet:
            sheet.save(data, "WEBP", quality=_WEBP_QUALITY)
        return self._inside(name, "webp", data.getvalue())

    def _inside(self, name: str, kind: str, data: bytes) -> str:
        url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        if len(url) > self._room:
            return name
        self._room -= len(url)
        return url


def counted(number: int, word: str) -> str:
    """1 step, 25 steps."""
    return f"{number} {word}{'s' * (number != 1)}"


def embedded_json(value: Any) -> str:
    """`value` as JSON that can stand inside a script element: no text in it can end that element or begin another."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def render(template: str, data: Mapping[str, Any], **values: Any) -> str:
    """The page. data: what the script reads."""
    environment = Environment(
        loader=PackageLoader("cpdiff_core.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["amount"] = amount
    folder = resources.files("cpdiff_core.reports") / "templates"
    script = '"use strict";\n' + "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        values | {
            "style": (folder / "page.css").read_text(encoding="utf-8"), "script": script, "script_digest": digest,
            "data": embedded_json(data),
        }
    )  # fmt: skip
