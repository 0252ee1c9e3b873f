"""A model's chat template, which is a program of whoever made the model, applied within bounds.

Invariants:
- However a template breaks, the error names it and says what to do.
- A text beyond ``MOST_CHARACTERS`` more than the conversation's own is refused, and so is a single
  step that makes much more (see ``sandbox``).
- A template that does not end, or for which the process takes ``MOST_BYTES``, is stopped (in the
  main thread, where the system has timers).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from kvedit.errors import UsageError

SECONDS = 10.0  # templates take milliseconds
MOST_CHARACTERS = 1_000_000  # no template of a published model adds so many
MOST_BYTES = 2**30  # that the process may grow while a template is applied
TICK = 0.02  # seconds between two looks at the memory
SHOWN_CHARACTERS = 200  # of what went wrong


class _TooSlow(Exception):
    """The time is up."""


def apply(
    tokenizer: Any, turns: Sequence[Mapping[str, str]], options: Mapping[str, Any], *,
    answering: bool, seconds: float = SECONDS,
) -> str:  # fmt: skip
    """A conversation as text by the tokenizer's chat template, with ``options`` for the template.

    ``answering`` adds what comes before an answer.  Raises UsageError where the template refuses
    the conversation, breaks, takes longer than ``seconds`` or makes an enormous text.
    """
    from jinja2 import TemplateError

    from kvedit.trust.sandbox import bounded_templates

    settings = {**options, "tokenize": False, "add_generation_prompt": answering}
    try:
        with bounded_templates(), time_limit(seconds, _TooSlow("the time is up"), _memory_limit()):
            text = str(tokenizer.apply_chat_template(list(turns), **settings))
        text.encode()  # raises for half of a character
    except TemplateError as error:
        raise _problem(tokenizer, f"refuses this conversation: {error}") from error
    except _TooSlow as error:
        raise _problem(tokenizer, f"did not end within {seconds:g} s") from error
    except MemoryError as error:
        raise _problem(tokenizer, "makes a text that does not fit into memory") from error
    except (ArithmeticError, LookupError, RecursionError, AttributeError, TypeError,
            ValueError) as error:  # fmt: skip
        raise _problem(tokenizer, f"fails: {type(error).__name__}: {error}") from error
    if len(text) > MOST_CHARACTERS + sum(len(turn["content"]) for turn in turns):
        raise _problem(tokenizer, f"makes a text of {len(text):,} characters")
    return text


def _problem(tokenizer: Any, what: str) -> UsageError:
    name = getattr(tokenizer, "name_or_path", "")
    what = what if len(what) <= SHOWN_CHARACTERS else f"{what[:SHOWN_CHARACTERS]}…"
    return UsageError(
        f"the model's chat template {what}",
        hint=f"It is in chat_template.jinja or tokenizer_config.json of {name or 'the model'}:"
        " correct it, or make a store for another model. Many templates take no system prompt: see"
        " [prompts] system and template_options in kvedit.toml.",
    )


def _memory_limit() -> Callable[[], None]:
    """What raises MemoryError once the process has grown by more than ``MOST_BYTES`` since."""
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss

    def look() -> None:
        if process.memory_info().rss - before > MOST_BYTES:
            raise MemoryError(f"more than {MOST_BYTES:,} bytes")

    return look


@contextmanager
def time_limit(
    seconds: float, error: BaseException, look: Callable[[], None] | None = None
) -> Iterator[None]:
    """Raise an error in the block after so long, where signals can be had and no limit is set.

    ``look`` is called every ``TICK`` seconds, and may raise too.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(
        signal.ITIMER_REAL
    ) != (0.0, 0.0):
        yield
        return
    end = time.monotonic() + seconds

    def stop(number: int, frame: FrameType | None) -> None:
        if look is None or time.monotonic() >= end:
            raise error
        look()

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, *((seconds,) if look is None else (TICK, TICK)))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
