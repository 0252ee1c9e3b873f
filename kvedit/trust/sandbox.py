"""The sandbox of a chat template, in which no single step makes gigabytes.

Invariants:
- What multiplies (operators, and the filters and methods of ``GROWING``), and what puts pieces
  together, raises MemoryError before it makes more than ``MOST_IN_ONE_STEP`` characters or bytes.
- A template that stays below that gives the same text as in the sandbox of transformers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_IN_ONE_STEP = 100_000_000
GROWING = frozenset({
    "batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace",
    "rjust", "string", "to_bytes", "tojson", "translate", "wordwrap", "xmlattr", "zfill",
})  # fmt: skip
_ELEMENT = 64  # bytes of an element with what holds it
_WIDE_FIELD = re.compile(r"%[^a-zA-Z%]*\d{7}|\{[^{}]*\d{7}")  # of a format
_WIDTH_GIVEN = re.compile(r"%[^a-zA-Z%]*\*|\{[^{}]*\{")  # with the values of a format


@contextmanager
def bounded_templates() -> Iterator[None]:
    """Templates that transformers compiles in the block get this sandbox.

    One that was compiled before, outside of such a block, keeps the sandbox of transformers.
    """
    module = sys.modules.get("transformers.utils.chat_template_utils")
    if module is None:
        yield
        return
    scope = vars(module)
    scope["ImmutableSandboxedEnvironment"] = Sandbox
    try:
        yield
    finally:
        scope["ImmutableSandboxedEnvironment"] = ImmutableSandboxedEnvironment


class _Joining(CodeGenerator):
    """``a ~ b`` is put together by the sandbox."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Write the code of one."""
        self.write("environment.concat(str(environment.finalize(piece)) for piece in (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox of transformers' templates, with a bound on what one step makes."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})
    code_generator_class = _Joining

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.filters = _Filters(self.filters)
        self.finalize = _weighed

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """All pieces of an output as one text."""
        total, texts = 0, []
        for piece in pieces:
            total += len(piece) + _ELEMENT
            _demand(total)
            texts.append(piece)
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """One of the operators, if its result is not too large."""
        _demand(_size_of(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **options: Any) -> Any:
        """Call a function or method, if its result is not too large."""
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps ``format``
        if getattr(method, "__name__", "") in GROWING:
            args = tuple(map(_listed, args))
            value = getattr(method, "__self__", None)
            _demand(_grown(method.__name__, value, args, options))
        return super().call(__context, __obj, *args, **options)


class _Filters(dict[str, Callable[..., Any]]):
    """Filters by name; those that make more of what they are given are checked."""

    def __init__(self, filters: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        for name, filter_ in filters.items():
            self[name] = filter_

    def __setitem__(self, name: str, filter_: Callable[..., Any]) -> None:
        super().__setitem__(name, _checked(name, filter_) if name in GROWING else filter_)


def _checked(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    skipped = int(hasattr(filter_, "jinja_pass_arg"))  # the environment or the like comes first

    @wraps(filter_)
    def checked(*args: Any, **options: Any) -> Any:
        first, given = args[:skipped], tuple(map(_listed, args[skipped:]))
        _demand(_grown(name, given[0] if given else None, given[1:], options))
        return filter_(*first, *given, **options)

    return checked


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, Iterator) else value


def _weighed(value: Any) -> Any:
    _demand(_weight(value))
    return value


def _demand(size: int) -> None:
    if size > MOST_IN_ONE_STEP:
        raise MemoryError(f"more than {MOST_IN_ONE_STEP:,} characters in one step")


def _size_of(operator: str, left: Any, right: Any) -> int:
    """What an operator makes at most, in characters or bytes."""
    if operator == "%":
        given = right if isinstance(right, tuple) else (right,)
        return _grown("format", left, given, {}) if isinstance(left, str) else 0
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        return bits * max(right, 0) if operator == "**" else bits + right.bit_length()
    if operator == "*":
        pair = (left, right) if isinstance(right, int) else (right, left)
        return _weight(pair[0]) * max(pair[1], 0) if isinstance(pair[1], int) else 0
    return _weight(left) + _weight(right)


def _grown(name: str, value: Any, args: Sequence[Any], options: Mapping[str, Any]) -> int:
    """What a value grows to at most: each of its pieces gets all that is given with it."""
    numbers = True
    if "format" in name and isinstance(value, str):
        if _WIDE_FIELD.search(value):
            return MOST_IN_ONE_STEP + 1
        numbers = bool(_WIDTH_GIVEN.search(value))
    sizes = (abs(one) if isinstance(one, int) and numbers else _weight(one)
             for one in (*args, *options.values()))  # fmt: skip
    return _weight(value) + max(_weight(value), 1) * sum(sizes)


def _weight(value: Any) -> int:
    """Characters of a value, with all that it holds; counting ends where it is too much."""
    total, waiting = 0, [value]
    while waiting and total <= MOST_IN_ONE_STEP:
        one = waiting.pop()
        if isinstance(one, str | bytes | range):
            total += len(one)
        elif isinstance(one, list | tuple | Mapping):
            total += _ELEMENT * len(one)
            waiting += [*one, *(one.values() if isinstance(one, Mapping) else ())]
        elif isinstance(one, Namespace):
            waiting.append(one._Namespace__attrs)  # it shows them, and has no other name for them
    return total
