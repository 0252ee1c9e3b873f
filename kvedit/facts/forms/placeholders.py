"""Placeholders that nobody has filled in: ``{{name}}``, ``<Name>``, ``TODO``.

Invariant: what stands in a text on purpose is not one: an HTML tag, a type (``List<String>``), a
comparison, a word that only contains TODO.
"""

import re

from kvedit.facts.fact import Fact

_TAGS = (
    "a|abbr|address|article|aside|audio|b|big|blockquote|body|br|button|canvas|caption|center|cite|"
    "code|col|dd|del|details|dfn|div|dl|dt|em|fieldset|figcaption|figure|font|footer|form|h[1-6]|"
    "head|header|hr|html|i|iframe|img|input|ins|kbd|label|legend|li|link|main|mark|meta|nav|ol|"
    "option|p|path|pre|q|s|samp|script|section|select|small|span|strike|strong|style|sub|summary|"
    "sup|svg|table|tbody|td|template|textarea|tfoot|th|thead|time|title|tr|tt|u|ul|var|video|wbr"
)
_MARKS = re.compile(
    rf"""
    \{{\{{ \s* [^{{}}\n]{{1,60}} \s* \}}\}}            # {{{{name}}}}
    | \{{% [^%\n]{{1,60}} %\}}                         # a tag of a template
    | \$\{{ [\w .-]{{1,60}} \}}                        # ${{NAME}}
    | (?<![\w<]) < (?!(?i:{_TAGS})>) (?!/) [^\W\d_][\w .'-]{{0,40}} >  # <Name>, <your name>
    | \[ (?:(?i:insert|your|fill)\ [\w ]{{1,40}} | [A-Z]+(?:[_ ][A-Z]+)+ ) \]  # [YOUR NAME]
    | (?<![\w-]) (?:TODO|TBD|FIXME) (?![\w-])
    | (?i:\blorem\ ipsum\b)
    """,
    re.VERBOSE,
)
_HINT = re.compile(r"[{<\[]|TODO|TBD|FIXME|(?i:ipsum)")  # quick; without it there is no mark
_LONGEST = 20  # characters of a description that is nothing but a placeholder
_ONLY = re.compile(
    r"(?i:x{3,9}|n/?a|none|null|nan|tba|to be (?:done|added|defined|written)|placeholder|-+|\?+|…"
    r"|\.{2,}|待补充?|待補充?|待定|待填写?|待填寫|暂无|暫無)[.。]?"
)


def placeholder(fact: Fact) -> str | None:
    """Why a fact is held back: the first placeholder in what would be trained, or None."""
    for what, text in _texts(fact):
        found = _HINT.search(text) and _MARKS.search(text)
        if found:
            return f"the {what} has the placeholder {found[0]!r:.60}"
    if len(fact.description) <= _LONGEST and _ONLY.fullmatch(fact.description):
        return f"the description is a placeholder: {fact.description!r:.60}"
    return None


def _texts(fact: Fact) -> list[tuple[str, str]]:
    names = [("key", fact.key), *(("alias", alias) for alias in fact.aliases)]
    return [*names, ("description", fact.description), *(("prompt", one) for one in fact.prompts)]
