"""The HTML pages: templates, their style and their script, put into one file that opens anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from search.figures import style

HERE = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """Renders a template of this folder; style, script and plotly are written into the page.

    Args:
        template: Its name, such as `report`.
        values: What it shows.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shared = {
        "css": Markup((HERE / "page.css").read_text(encoding="utf-8")),
        "script": Markup((HERE / "page.js").read_text(encoding="utf-8")),
        "plotly": Markup(get_plotlyjs()),
        "colours": {"winner": style.WINNER, "front": style.FRONT, "baseline": style.BASELINE},
    }
    return environment.get_template(f"{template}.html.j2").render(**shared, **values)
