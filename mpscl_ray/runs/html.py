"""HTML pages from templates; texts are escaped."""

from __future__ import annotations

import base64
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def render(template: Path, **values: Any) -> str:
    """A template filled in, which may extend ``runs/page.html``.

    Texts are escaped; the filter ``base64`` is for bytes in a data URI, and ``file(PATH)`` gives a file of the package,
    such as a script, as it is.
    """
    return _environment(template.parent).get_template(template.name).render(**values)


@lru_cache(maxsize=8)
def _environment(folder: Path) -> Environment:
    places = (folder, Path(__file__).parents[1])
    environment = Environment(
        loader=FileSystemLoader(places), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    environment.globals["file"] = lambda path: Markup((places[1] / path).read_text(encoding="utf-8"))
    return environment
