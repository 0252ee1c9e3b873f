"""What the builder of the site does besides Markdown: see ``hooks`` in docs/mkdocs.yml.

- The tags of code blocks (``python slow``) are for tests/test_docs.py and are left out.
- Formulas become MathML, which browsers draw without any script.
"""

from __future__ import annotations

import html
import re
from typing import Any

TAGGED = re.compile(r"^(```[a-z]+)( +[a-z-]+)+$", re.M)
FORMULA = re.compile(
    r'<(?P<tag>div|span) class="arithmatex">\\[\[(](?P<tex>.*?)\\[\])]</(?P=tag)>', re.S
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Take the tags off."""
    return TAGGED.sub(r"\1", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex marked."""
    return FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert  # in the environment of the site alone

    display = "block" if match["tag"] == "div" else "inline"
    return str(convert(html.unescape(match["tex"]).strip(), display=display)).replace(r"\_", "_")
