"""A Markdown file of facts: headings and the text below them, or a table.

Invariants:
- A heading with text of its own is a fact; one that only holds other headings is none.
- What looks like a heading inside a code block is text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvedit.facts.forms.names import Record, column_name

_ATX = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*")
_UNDERLINE = re.compile(r" {0,3}(={2,}|-{2,})[ \t]*")
_PARAGRAPH = re.compile(r" {0,3}[^\s|>#*+-]")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ROW = re.compile(r"\s*\|.*\|\s*")
_RULE = re.compile(r"\s*\|(?:\s*:?-+:?\s*\|)+\s*")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_MARKS = re.compile(r"(\*\*|__|\*|`)(?=\S)(.+?)(?<=\S)\1")
_TERM = re.compile(r"\s*(?:[-*+]\s+)?\*\*(.+?)\*\*\s*(?:[:：—–-])?\s*(?<=[:：—– -])(.+)")


@dataclass(slots=True)
class _Section:
    """A heading, its place, and the lines below it up to the next one."""

    line: int
    level: int
    title: str
    parent: str
    body: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.body).strip()


def is_markdown(text: str) -> bool:
    """Whether the beginning of a text is that of a Markdown file with headings or a table."""
    lines = _without_front_matter(text.splitlines())
    first, *others = [line for _, line in lines if line.strip()] or [""]
    if _ATX.fullmatch(first):
        return True
    if others and _ROW.fullmatch(first):
        return bool(_RULE.fullmatch(others[0]))
    return bool(others and re.fullmatch(r"=+\s*", others[0]))


def has_headings(text: str) -> bool:
    """Whether a text has a heading with text below it anywhere."""
    return any(section.text for section in _sections(text))


def read_markdown(text: str) -> Iterator[tuple[int, Record]]:
    """Line and record of each heading with text below it, or of each row of a table.

    Headings that stand twice are told apart by the one above them.
    """
    lines = list(_without_front_matter(text.splitlines()))
    filled = [(number, line) for number, line in lines if line.strip()]
    if len(filled) > 1 and _ROW.fullmatch(filled[0][1]) and _RULE.fullmatch(filled[1][1]):
        yield from _table(filled)
        return
    sections = [section for section in _sections(text) if section.text]
    titles = [section.title for section in sections]
    for section in sections:
        twice = titles.count(section.title) > 1 and section.parent
        key = f"{section.parent}: {section.title}" if twice else section.title
        yield section.line, {"key": key, "description": section.text}


def _table(lines: list[tuple[int, str]]) -> Iterator[tuple[int, Record]]:
    names = [column_name(name) for name in _cells(lines[0][1])]
    for number, line in lines[2:]:
        if _ROW.fullmatch(line):
            cells = dict(zip(names, _cells(line), strict=False))
            yield number, {name: cell for name, cell in cells.items() if name and cell}


def table_names(text: str) -> list[str]:
    """The columns of a Markdown table at the beginning of a text; none if there is no table."""
    lines = [line for _, line in _without_front_matter(text.splitlines()) if line.strip()]
    if len(lines) > 1 and _ROW.fullmatch(lines[0]) and _RULE.fullmatch(lines[1]):
        return [column_name(name) for name in _cells(lines[0])]
    return []


def _cells(line: str) -> list[str]:
    cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
    return [cell.strip().replace("\\|", "|") for cell in cells]


def _without_front_matter(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Numbered lines, without the YAML between two ``---`` at the beginning."""
    begin = 0
    if lines and lines[0].strip() == "---" and "---" in (line.strip() for line in lines[1:]):
        begin = next(at for at, line in enumerate(lines[1:], 1) if line.strip() == "---") + 1
    yield from enumerate(lines[begin:], begin + 1)


def _sections(text: str) -> Iterator[_Section]:
    """The headings of a file in order, each with its own text."""
    above: list[_Section] = []
    current: _Section | None = None
    for number, line, level in _levels(list(_without_front_matter(text.splitlines()))):
        match = _ATX.fullmatch(line)
        title = _plain(match[2] if match else line) if level else ""
        if not title:
            if current is not None:
                current.body.append(line)
            continue
        if current is not None:
            yield current
        above = [one for one in above if one.level < level]
        current = _Section(number, level, title, above[-1].title if above else "")
        above.append(current)
    if current is not None:
        yield current


def _levels(lines: list[tuple[int, str]]) -> Iterator[tuple[int, str, int]]:
    """Number and line with the level of a heading, 0 for other lines; rules below a heading go."""
    fence, skip = "", False
    for at, (number, line) in enumerate(lines):
        following = lines[at + 1][1] if at + 1 < len(lines) else ""
        opening = _FENCE.match(line)
        if skip:
            skip = False
            continue
        if opening and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else opening[1]
        if fence or opening:
            yield number, line, 0
        elif match := _ATX.fullmatch(line):
            yield number, line, len(match[1])
        elif (
            (rule := _UNDERLINE.fullmatch(following))
            and _PARAGRAPH.match(line)
            and (at == 0 or not lines[at - 1][1].strip())
        ):
            skip = True
            yield number, line, 1 if "=" in rule[1] else 2
        else:
            yield number, line, 0


def _plain(title: str) -> str:
    """A heading without links, emphasis and code marks."""
    text = _LINK.sub(r"\1", title)
    for _ in range(3):
        text = _MARKS.sub(r"\2", text)
    return " ".join(text.split())
