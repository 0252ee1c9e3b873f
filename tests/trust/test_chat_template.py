"""A chat template is a stranger's program: it breaks in many ways, and each is said."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from kvedit.errors import UsageError
from kvedit.trust import chat_template

TURNS = [{"role": "user", "content": "What is Porto?"}]


class Tokenizer:
    """A tokenizer that has a chat template and nothing else."""

    name_or_path = "models/odd"

    def __init__(self, template: str) -> None:
        self.template = template

    def apply_chat_template(self, turns: Any, *, tokenize: bool, **options: Any) -> str:
        """The conversation as text."""
        return str(render_jinja_template([turns], chat_template=self.template, **options)[0][0])


def apply(template: str, **options: Any) -> str:
    given = {"answering": True, "options": {}, **options}
    return chat_template.apply(Tokenizer(template), TURNS, **given)


def test_a_sound_template() -> None:
    text = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tone }}"
    assert apply(text, options={"tone": "!"}) == "What is Porto?!"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ 2 ** 0.5 // 0 }}", "fails: ZeroDivisionError"),
        ("{{ 10.0 ** 400 }}", "fails: OverflowError"),
        ("{{ messages[0].who.name }}", "refuses this conversation: .* has no attribute"),
        ("{{ raise_exception('no system turn') }}", "refuses this conversation: no system turn"),
        ("{% for %}", "refuses this conversation"),
        ("{{ none + 1 }}", "fails: TypeError"),
        ("{{ 'x' | int(base=99) }}{{ [1][9].a }}", "(fails|refuses)"),
        ("{{ ''.format(*messages).x.y }}", "(fails|refuses)"),
        ("{{ 'a'.encode('ascii').decode('none') }}", "fails: LookupError"),
        ("{% for i in range(10 ** 12) %}x{% endfor %}", "fails: OverflowError"),
        ("{{ 'a' * 10 ** 17 }}", "makes a text that does not fit into memory"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: RecursionError"),
        ("{{ 'a' * 2000000 }}", "makes a text of 2,000,000 characters"),
    ],
)
def test_however_it_breaks_the_template_is_named(template: str, what: str) -> None:
    with pytest.raises(UsageError, match=f"the model's chat template {what}") as raised:
        apply(template)
    assert "models/odd" in raised.value.hint and "kvedit.toml" in raised.value.hint
    assert len(raised.value.message) < 300


def test_a_template_that_never_ends_is_stopped() -> None:
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(UsageError, match=r"did not end within 0\.2 s"):
        apply(loops, seconds=0.2)
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_another_thread_may_apply_it() -> None:
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(apply("hello")))
    thread.start(), thread.join()
    assert texts == ["hello"]
