"""Random and mutated inputs for readers, keys, settings, templates and the command line.

Invariants:
- Input number n of a part is a function of the seed, the part and n alone: any one can be repeated.
- An input is clean if it ends, within ``SECONDS``, in a result or in an error of kvedit's own that
  says what is wrong and what to do next.
- Every ``LARGE_EVERY``th file for a reader is repeated up to ``LARGE_BYTES``, and is clean only if
  reading it takes no more memory than ``MOST_TIMES`` its size and ``MOST_BESIDES``.
"""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvedit.config import Config
from kvedit.errors import KveditError
from kvedit.facts import formats, keys
from kvedit.facts.fact import Fact
from kvedit.facts.forms.encodings import encoding_name
from kvedit.facts.forms.records import Columns
from kvedit.trust.chat_template import time_limit

SECONDS = 10.0  # that no input may take
LARGE_EVERY = 200
LARGE_BYTES = 50_000
MOST_TIMES = 40  # a text of one byte a character, decoded as four, parsed, and made rows of
MOST_BESIDES = 2**20
SLOWER = 4  # while allocations are looked at
SIGNS = (
    "", " ", "\n", "\r\n", "\t", ",", ";", "|", '"', "'", "\\", "{", "}", "[", "]", ":", "=", "#",
    "\0", "\ufeff", "\u200b", "\u202e", "\u0301", "\ud800", "\U0001f600", "ﬁ", "Σ", "İ", "ß", "后",
    "後", "null", "true", "NaN", "1e999", "-1", "9" * 400, "\\ud800", "key", "description", "---",
    "```", "<|im_end|>", "{{key}}", "{key}", "%", "..", "/", "~", "٣", "a" * 300,
)  # fmt: skip
RAW = (b"\xff", b"\xfe\xff", b"\xc4\xe3", b"\x80", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\0\0")
Input = Any


class Slow(BaseException):
    """An input took longer than ``SECONDS``; no handler of errors must take it for one."""


class Large(Exception):
    """An input took more memory than its size explains."""


def generator(seed: int, part: str, number: int) -> random.Random:
    """The generator of one input."""
    return random.Random(f"{seed} {part} {number}")


def mutated(rng: random.Random, text: str, corpus: tuple[str, ...]) -> str:
    """A text with a few pieces put in, taken out, doubled, swapped or taken from another."""
    for _ in range(rng.choice((0, 1, 1, 2, 3, 5, 8))):
        start = rng.randint(0, len(text))
        end = min(len(text), start + rng.choice((0, 1, 1, 2, 5, 20)))
        other = rng.choice(corpus)
        cut = rng.randint(0, len(other))
        piece = rng.choice((
            "", rng.choice(SIGNS), chr(rng.choice((rng.randrange(128), rng.randrange(0x11000)))),
            text[start:end] * 2, other[cut : cut + rng.choice((1, 5, 40))],
        ))  # fmt: skip
        text = text[:start] + piece + text[end:]
    return text


def mutated_bytes(rng: random.Random, text: str, corpus: tuple[str, ...]) -> bytes:
    """The same as bytes, in one of several encodings, now and then with bytes of no encoding."""
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "gbk", "utf-16", "utf-8-sig", "latin-1"))
    data = mutated(rng, text, corpus).encode(encoding, "replace")
    if rng.random() < 0.2:
        at = rng.randint(0, len(data))
        data = data[:at] + rng.choice(RAW) + data[at:]
    return data[: rng.randint(0, len(data))] if rng.random() < 0.05 else data


class Target:
    """One part: ``make`` an input and ``execute`` it; what is wrong is raised."""

    name = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus: tuple[str, ...] = ()

    def make(self, rng: random.Random) -> Input:
        """An input."""
        return mutated(rng, rng.choice(self.corpus), self.corpus)

    def execute(self, given: Input) -> None:
        """Give it to kvedit."""
        raise NotImplementedError

    def bytes_of(self, given: Input) -> int | None:
        """The size of an input whose memory is looked at; None: it is not."""
        return None

    def close(self) -> None:
        """Undo what the part has set up."""


class Readers(Target):
    """Files of every form that is read; with an encoding or column names now and then."""

    name = "readers"

    def __init__(self, folder: Path) -> None:
        from tests.docs.file_forms import examples

        super().__init__(folder)
        self.corpus = tuple(example.data for example in examples())

    def make(self, rng: random.Random) -> Input:
        data = mutated_bytes(rng, rng.choice(self.corpus), self.corpus)
        if data and rng.random() < 1 / LARGE_EVERY:
            data *= LARGE_BYTES // len(data) + 1
        encoding = rng.choice((None,) * 8 + ("gbk", "utf-16", "no-such-encoding", "base64"))
        columns = (
            Columns("key", rng.choice(("text", "description", "x"))) if rng.random() < 0.1 else None
        )
        return data, encoding, columns

    def bytes_of(self, given: Input) -> int | None:
        size = len(given[0])
        return size if size >= LARGE_BYTES else None

    def execute(self, given: Input) -> None:
        data, encoding, columns = given
        path = self.folder / "facts"
        path.write_bytes(data)
        name = encoding and encoding_name(encoding)  # as the command line does
        reading = formats.Reading(columns or formats.ANY_COLUMNS, name)
        for row in formats.read_facts(path, reading):
            if row.fact is None and not row.problem:
                raise ValueError(f"{row.where} has neither fact nor problem")
            if row.fact is not None and Fact.from_json(row.fact.to_json()) != row.fact:
                raise ValueError(f"{row.where} is another fact when it is read again")


class Keys(Target):
    """Normal and exact forms hold when they are taken again; a key is similar to itself."""

    name = "keys"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.corpus = (
            "tide lantern",
            "夢中情爐",
            "C++",
            ".NET",
            "A-1",
            "后羿",
            "İstanbul",
            "ﬁne ﬂow",
        )

    def make(self, rng: random.Random) -> Input:
        return [mutated(rng, rng.choice(self.corpus), self.corpus)[:400] for _ in range(3)]

    def execute(self, given: Input) -> None:
        for form in (keys.normalise, keys.exact_form):
            once = form(given[0])
            if form(once) != once:
                raise ValueError(f"{form.__name__} of {given[0]!r} is not final")
        hits = keys.similar(given[0], given)
        if not keys.is_blank(given[0]) and keys.normalise(given[0]) and not hits:
            raise ValueError(f"{given[0]!r} is not similar to itself")
        keys.did_you_mean(given[0], given)
        try:
            Fact.create(given[0], given[1], aliases=given[2:])
        except KveditError as error:
            if not error.message:
                raise ValueError("an error without a message") from error


class Settings(Target):
    """Texts of a kvedit.toml, and of a file of phrasings."""

    name = "settings"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        sections = Config().to_json().items()
        self.corpus = tuple(
            f"[{section}]\n" + "".join(f"{name} = {_toml(value)}\n" for name, value in rows.items())
            for section, rows in sections
        )
        self.phrasings = (
            'train = ["What is {key}?"]\nheld_out = ["Tell me about {key}."]\n',
            '[cross]\ntrain = ["{key}"]\n', "train = 5\n", 'train = "What is {key}?"\n',
            "cross = [1]\n", "held_out = [[]]\n",
        )  # fmt: skip

    def make(self, rng: random.Random) -> Input:
        corpus = self.phrasings if rng.random() < 0.2 else self.corpus
        return corpus is self.phrasings, mutated(rng, rng.choice(corpus), corpus)

    def execute(self, given: Input) -> None:
        from kvedit.facts.phrasings import load_phrasings

        phrasings, text = given
        path = self.folder / ("en.toml" if phrasings else "kvedit.toml")
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        if phrasings:
            load_phrasings.__wrapped__("en", self.folder)
        else:
            Config.load(path)


def _toml(value: object) -> str:
    import json

    return "{}" if isinstance(value, dict) else json.dumps(value)


class Templates(Target):
    """Chat templates and fallback templates of prompts."""

    name = "templates"

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        super().__init__(folder)
        tiny = Path(__file__).parents[3] / "kvedit" / "data" / "kvedit-tiny"
        self.tokenizer = AutoTokenizer.from_pretrained(str(tiny))
        self.corpus = (
            "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{{ messages[-1].content | trim }}{{ eos_token }}",
            "{{ 1 / 0 }}", "{{ messages | length + '' }}", "{{ messages[9].content.x }}",
            "{{ messages | map(attribute='content') | join(', ') }}", "{{ undefined.x }}",
            "{{ messages | tojson }}{{ strftime_now('%Y') }}",
            "{% set x = namespace(a=1) %}{{ x.a }}",
        )  # fmt: skip

    def make(self, rng: random.Random) -> Input:
        text = mutated(rng, rng.choice(self.corpus), self.corpus)
        prompt = mutated(rng, "What is {key}?", self.corpus)
        # What reaches a tokenizer is text: half of a character is refused before.
        return rng.random() < 0.8, text, prompt.encode("utf-8", "ignore").decode()

    def execute(self, given: Input) -> None:
        from kvedit.config import PromptsConfig
        from kvedit.model.prompts import Renderer

        chat, template, prompt = given
        self.tokenizer.chat_template = template if chat else None
        plain = template.encode("utf-8", "ignore").decode()  # TOML has no halves of characters
        fallback = "{prompt}\n" if chat else plain[:40] + "{prompt}" + plain[40:]
        config = PromptsConfig(fallback_template=fallback)
        renderer = Renderer(self.tokenizer, context=256, prompts=config)
        renderer.empty_user_turn()
        renderer.dialogue([{"role": "user", "content": prompt}])
        renderer.examples([(prompt, "A lantern.")])


class CommandLine(Target):
    """Command lines and environments; what would load a model or train is replaced."""

    name = "command line"

    def __init__(self, folder: Path) -> None:
        import click
        from click.testing import CliRunner
        from store_steps import add, new_store

        from kvedit.cli import cli
        from kvedit.cli.commands import bench
        from kvedit.errors import ModelError
        from kvedit.ingest.report import IngestReport

        super().__init__(folder)
        import pytest

        self.cli, self.stack = cli, ExitStack()
        self.before = os.getcwd()
        os.chdir(folder)
        with new_store(folder / "store") as store:
            add(store, "tide lantern", "A glass float.")
            add(store, "hush bell")
        (folder / "facts.jsonl").write_text('{"key": "Faro", "description": "A town."}\n')
        self.runner = CliRunner()
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())

        def no_model(*_: object, **__: object) -> None:
            raise ModelError("there is no model here", hint="Give another one.")

        from kvedit import KnowledgeBase, paths

        for name in ("open", "create"):
            patch.setattr(KnowledgeBase, name, no_model)
        patch.setattr(paths, "PIPE_SECONDS", 0.01)
        patch.setattr(bench, "_run", lambda *_: SimpleNamespace(passed=True))
        patch.setattr("kvedit.ingest.run.ingest", lambda *_: IngestReport(outcomes=()))
        self.commands = dict(_leaves(cli))
        # What no shell can pass, NUL and halves of characters, is left out or as a shell has it.
        signs = [sign for sign in SIGNS if sign not in ("\0", "\ud800")]
        self.values = (
            *signs,
            "\udcff",
            "1",
            "2",
            "tide lantern",
            "facts.jsonl",
            "store",
            "out",
            "-",
            "1h",
        )
        self.options = click.Option

    def make(self, rng: random.Random) -> Input:
        words = rng.choice(list(self.commands))
        line = list(words)
        for parameter in self.commands[words].params:
            option = isinstance(parameter, self.options)
            if rng.random() > (0.15 if option else 0.95):
                continue
            value = mutated(rng, rng.choice(self.values), self.values)
            value = value if rng.random() < 0.3 else rng.choice(self.values)
            if not option:
                line.append(value)
                continue
            if getattr(parameter, "is_flag", False):
                line.append(parameter.opts[0])
            else:
                line.append(f"{parameter.opts[0]}={value}")
        if rng.random() < 0.1:
            line.insert(rng.randint(0, len(line)), rng.choice(self.values))
        value = rng.choice(self.values).encode("utf-8", "replace").decode()
        env = {rng.choice(("KVEDIT_STORE", "NO_COLOR", "COLUMNS", "LANG", "TERM")): value}
        line = [_passable(word) for word in line]
        return line, env if rng.random() < 0.2 else {}

    def execute(self, given: Input) -> None:
        line, env = given
        result = self.runner.invoke(self.cli, line, env=env, prog_name="kvedit", input="")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        if "this is a bug in kvedit" in result.stderr:
            raise ValueError(result.stderr[-400:])
        if result.exit_code not in (0, 1, 2, 3, 4, 10, 11, 12, 13):
            raise ValueError(f"exit {result.exit_code}")
        if result.exit_code and not result.stderr.strip():
            raise ValueError(f"exit {result.exit_code} without a word")
        # A gate that did not pass and click's own usage errors say what to do as they are.
        if result.exit_code not in (0, 2, 3, 4) and "hint:" not in result.stderr:
            raise ValueError(f"without a hint: {result.stderr[-400:]}")

    def close(self) -> None:
        self.stack.close()
        os.chdir(self.before)


def _passable(word: str) -> str:
    """A word as a shell can pass it: bytes, without NUL."""
    return os.fsdecode(
        word.replace("\0", "").encode(
            "utf-8",
            "surrogateescape"
            if all(not "\ud800" <= char <= "\udc7f" for char in word)
            else "ignore",
        )
    )


def _leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with the words that call it."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
        return
    for name, one in inner.items():
        yield from _leaves(one, (*words, name))


TARGETS: dict[str, Callable[[Path], Target]] = {
    one.name: one for one in (Readers, Keys, Settings, Templates, CommandLine)
}


def fault_of(target: Target, given: Input) -> str | None:
    """Execute an input; what is wrong with how it ended, or None."""
    size = target.bytes_of(given)
    try:
        seconds = SECONDS if size is None else SLOWER * SECONDS
        with time_limit(seconds, Slow(f"more than {seconds:g} s")):
            if size is None:
                target.execute(given)
            else:
                _within_memory(target, given, MOST_TIMES * size + MOST_BESIDES)
    except KveditError as error:
        lacks = [name for name in ("message", "hint") if not getattr(error, name)]
        return f"without a {lacks[0]}: {error!r}"[:300] if lacks else None
    except (Exception, Slow) as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None


def _within_memory(target: Target, given: Input, most: int) -> None:
    """Execute an input; raises Large if what Python allocates for it has a higher peak."""
    failed: KveditError | None = None
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        try:
            target.execute(given)
        except KveditError as error:
            failed = error
        taken = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    if taken > most:
        raise Large(f"took {taken:,} bytes, more than {most:,}")
    if failed is not None:
        raise failed
