"""The HTML pages: templates, their style and their script, put into one file that opens anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.figures import style

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from markupsafe import Markup
    from matplotlib.figure import Figure

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Picture:
    """A figure drawn with matplotlib, as a page shows it.

    Attributes:
        svg: The figure as an element of the page, named by `alt`.
        alt: What it shows, in words and numbers.
    """

    svg: Markup
    alt: str

    @classmethod
    def of(cls, figure: Figure, name: str, alt: str) -> Picture:
        """Turns a figure into a picture; `name` differs from those of the page's other pictures."""
        from markupsafe import Markup, escape

        width = round(figure.get_figwidth() * style.PIXELS_PER_INCH)
        opening = f'<svg role="img" aria-label="{escape(alt)}" style="width: {width}px"'
        return cls(Markup(style.svg(figure, name).replace("<svg", opening, 1)), alt)


def inline(figure: go.Figure, name: str) -> Markup:
    """A figure of plotly as an element of a page, called `name`; the page brings plotly itself."""
    from markupsafe import Markup

    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]}
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=config, div_id=name))


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
        "palette": Markup(_palette()),
        "script": Markup((HERE / "page.js").read_text(encoding="utf-8")),
        "plotly": Markup(get_plotlyjs()),
    }
    return environment.get_template(f"{template}.html.j2").render(**shared, **values)


def _palette() -> str:
    """The colours of figures as custom properties: of the roles, and what becomes of every colour on dark paper."""
    roles = {"winner": style.WINNER, "front": style.FRONT, "baseline": style.BASELINE}
    light = " ".join(f"--{role}: {colour};" for role, colour in roles.items())
    dark = " ".join(f"--c-{colour.removeprefix('#')}: {there};" for colour, there in style.DARK.items())
    return (
        f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root:not(.printing) {{ {dark} }} }}"
    )
