"""HTML pages from templates; texts are escaped."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: Path, **values: Any) -> str:
    """A template filled in, which may extend ``runs/page.html``; its filter ``base64`` puts bytes into a data URI."""
    places = (template.parent, Path(__file__).parents[1])
    environment = Environment(
        loader=FileSystemLoader(places), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    return environment.get_template(template.name).render(**values)
