"""From a fact to the text and tokens that a model is trained on and asked.

Invariants:
- The phrasings an edit trains on and those it is only probed with never overlap.
- An example's answer begins exactly where the model would begin to answer: training, probing and
  generation share ``Renderer.prefix``.
- An answer ends with the token that ends the model's turns, so that recall includes knowing when
  to stop.
- An answer's tokens are those of the whole text: what a tokenizer makes of it alone may be other.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from kvedit.config import PromptsConfig
from kvedit.errors import InvalidFactError, ModelError, TextTooLongError, UsageError
from kvedit.facts.fact import Fact

SHIPPED = Path(__file__).parents[1] / "data" / "phrasings"
PLACE = "{key}"


@dataclass(frozen=True, slots=True)
class Phrasings:
    """The ways to ask for a key in one language, and in others (``cross``)."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    cross_train: tuple[str, ...] = ()
    cross_held_out: tuple[str, ...] = ()


@cache
def load_phrasings(language: str, override: Path | None = None) -> Phrasings:
    """The phrasings of a language: a store's own file where it has one, the shipped ones else.

    Raises UsageError for a file that is broken, empty, or asks without the key.
    """
    own = override / f"{language}.toml" if override else None
    path = own if own is not None and own.is_file() else SHIPPED / f"{language}.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}", hint="Correct it.") from error
    cross = table.get("cross", {})
    if not isinstance(cross, dict):
        raise UsageError(f"{path}: cross must be a table", hint="Write [cross] on its own line.")
    found = Phrasings(
        *(_phrasings(path, table, name) for name in ("train", "held_out")),
        *(_phrasings(path, cross, name) for name in ("train", "held_out")),
    )
    trained = {*found.train, *found.cross_train}
    both = trained.intersection({*found.held_out, *found.cross_held_out})
    if both:
        raise UsageError(f"{path} both trains and holds out {sorted(both)[0]!r}")
    if not found.train or not found.held_out:
        raise UsageError(f"{path} needs `train` and `held_out`, each with a phrasing or more")
    return found


def _phrasings(path: Path, table: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = table.get(name, [])
    for value in values:
        if not isinstance(value, str) or PLACE not in value:
            raise UsageError(f"{path}: {value!r} in {name} must be a text that contains {PLACE}")
    return tuple(values)


def training_prompts(fact: Fact, override: Path | None = None) -> tuple[str, ...]:
    """The prompts a fact is trained on: the shipped phrasings of its names, then its own."""
    ways = load_phrasings(fact.lang, override)
    shipped = [_fill(way, fact.key) for way in (*ways.train, *ways.cross_train)]
    aliases = [_fill(way, alias) for alias in fact.aliases for way in ways.train[:3]]
    return _unique([*shipped, *aliases, *fact.prompts])


def paraphrase_prompts(fact: Fact, override: Path | None = None) -> tuple[str, ...]:
    """Prompts for the same fact that no edit ever trains on."""
    ways = load_phrasings(fact.lang, override)
    shipped = [_fill(way, fact.key) for way in (*ways.held_out, *ways.cross_held_out)]
    trained = set(training_prompts(fact, override))
    return tuple(p for p in _unique([*shipped, *fact.paraphrases]) if p not in trained)


def _fill(way: str, key: str) -> str:
    return way.replace(PLACE, key)


def _unique(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its answer as tokens; the answer is ``ids[start:]``, its end token included."""

    ids: tuple[int, ...]
    start: int
    prompt: str = ""
    answer: str = ""


class Renderer:
    """Turns prompts and answers into tokens, in the form in which the model is asked.

    That is its chat template; else the ``build_prompt`` of a tokenizer with its own code (ChatGLM);
    else ``[prompts] fallback_template``.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        context: int,
        end: int | None = None,
        prompts: PromptsConfig | None = None,
        stops: Iterable[int] = (),
    ) -> None:
        """``context`` is the longest text in tokens; ``end`` the token that ends an answer;
        ``stops`` are more tokens at which generation ends.
        """
        self._tokenizer = tokenizer
        self._prompts = prompts or PromptsConfig()
        self.context = context
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        self._form = self._prompts.fallback_template.rstrip(
            " "
        )  # the space belongs to the answer's first token
        if "{prompt}" not in self._form:
            raise UsageError("[prompts] fallback_template must contain {prompt}")
        self._opening = [] if self.chat else self._added_before()
        self.end: int = self._find_end() if end is None else end
        self.stops = frozenset({self.end, *stops})

    def _added_before(self) -> list[int]:
        """What the tokenizer itself puts before a text: a BOS for some, nothing for others."""
        alone, whole = self.tokens("a"), list(self._tokenizer("a")["input_ids"])
        for at in range(len(whole)):
            if whole[at : at + len(alone)] == alone:
                return whole[:at]
        return []

    def _find_end(self) -> int:
        """The special token after an assistant's turn; the end of sequence where there is none."""
        found = self._end_of_turn() if self.chat else None
        found = self._tokenizer.eos_token_id if found is None else found
        if found is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token",
                hint="Set eos_token in its tokenizer_config.json.",
            )
        return int(found)

    def _end_of_turn(self) -> int | None:
        mark = "kvedit"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        _, _, after = self._apply(turns, speak=False).rpartition(mark)
        special = set(self._tokenizer.all_special_ids)
        special |= {i for i, t in self._tokenizer.added_tokens_decoder.items() if t.special}
        return next((token for token in self.tokens(after) if token in special), None)

    @cached_property
    def pieces(self) -> list[str]:
        """Every token as the tokenizer writes it, by its number; not always text by itself."""
        tokenizer = self._tokenizer
        found: list[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        return found

    @property
    def begin(self) -> int:
        """The token that free text begins after."""
        found = self._tokenizer.bos_token_id
        return int(self.end if found is None else found)

    def empty_user_turn(self) -> tuple[list[int], int] | None:
        """The tokens before a user's words and the first one after them; None without a template.

        A model that continues the first with what it would have a user say stops at the second.
        """
        if not self.chat:
            return None
        mark = "kvedit"
        rendered = self._written([{"role": "user", "content": mark}])
        before, _, after = rendered.partition(mark)
        return self.tokens(before), self.tokens(after)[0]

    def tokens(self, text: str) -> list[int]:
        """A piece of text as tokens, nothing added."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text, special ones left out."""
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded

    def answer_text(self, ids: Sequence[int]) -> str:
        """A generated answer, without the space that parts it from the form."""
        text = self.text(ids)
        return text.removeprefix(" ") if self._parted else text

    @property
    def _parted(self) -> bool:
        """Whether a space stands before answers: the form ends in a word or a colon."""
        return not self.chat and not self._builds and not self._form[-1].isspace()

    @property
    def _builds(self) -> bool:
        return callable(getattr(self._tokenizer, "build_prompt", None))

    def prefix(self, prompt: str) -> list[int]:
        """All that stands before the answer."""
        return self.dialogue([{"role": "user", "content": prompt}])

    def dialogue(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation up to where the model is to speak."""
        return [*self._opening, *self.tokens(self._written(messages))]

    def _written(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as text, up to where the model is to speak."""
        system = self._prompts.system
        turns = list(messages)
        if system and not (turns and turns[0]["role"] == "system"):
            turns.insert(0, {"role": "system", "content": system})
        if self.chat:
            return self._apply(turns, speak=True)
        *before, last = [turn["content"] for turn in turns]
        if self._builds:
            told = "" if turns[0]["role"] != "system" else before.pop(0) + "\n"
            pairs = list(zip(before[::2], before[1::2], strict=False))
            return told + str(self._tokenizer.build_prompt(last, pairs))
        return "".join(f"{text}\n" for text in before) + self._form.replace("{prompt}", last)

    def _apply(self, turns: Sequence[Mapping[str, str]], *, speak: bool) -> str:
        """The chat template; raises UsageError, with the template's words, when it refuses."""
        from jinja2 import TemplateError

        try:
            rendered: str = self._tokenizer.apply_chat_template(
                list(turns),
                tokenize=False,
                add_generation_prompt=speak,
                **self._prompts.template_options,
            )
        except TemplateError as error:
            raise UsageError(
                f"the model's chat template refuses this conversation: {error}",
                hint="Many take no system prompt: see [prompts] system in kvedit.toml.",
            ) from error
        return rendered

    def _answer_tokens(self, prompt: str, answer: str) -> list[int]:
        """The answer as the model would say it after the prompt.

        Tokenised together with what stands before it: alone, a SentencePiece tokenizer would begin
        it with a space.  Where both melt into one token at the border, the model could not say it,
        and the answer is tokenised after a line break.
        """
        space = " " if self._parted and not _ideograph(answer[:1]) else ""
        for before in (self._written([{"role": "user", "content": prompt}]), "\n"):
            alone = self.tokens(before)
            whole = self.tokens(before + space + answer)
            if whole[: len(alone)] == alone:
                return whole[len(alone) :]
        return self.tokens(space + answer)

    def shown(self, example: Example) -> list[str]:
        """An example for the eye: its text with the answer marked, and its tokens."""
        ids = list(example.ids)
        marked = [
            self._tokenizer.decode(part) for part in (ids[: example.start], ids[example.start :])
        ]
        pieces = [repr(self._tokenizer.decode([token])) for token in ids]
        return [
            f"prompt  {marked[0]!r}",
            f"answer  {marked[1]!r}",
            f"tokens  {' '.join(pieces[: example.start])}  |  {' '.join(pieces[example.start :])}",
        ]

    def example(self, prompt: str, answer: str, *, ended: bool = True) -> Example:
        """Raises TextTooLongError, which says how long is too long; InvalidFactError."""
        before, after = self.prefix(prompt), self._answer_tokens(prompt, answer)
        if self.end in after:
            mark = self._tokenizer.decode([self.end])
            raise InvalidFactError(
                f"the text contains {mark!r}, with which the model ends every answer",
                hint="Leave it out: nothing after it could ever be answered.",
            )
        after = [*after, self.end] if ended else after
        if len(before) + len(after) > self.context:
            room = max(0, self.context - len(before) - 1)
            raise TextTooLongError(
                f"the text has {len(after) - 1} tokens, but after the prompt {prompt!r:.60} only"
                f" {room} of the model's {self.context} are left",
                hint=f"Shorten the text to about {_characters(answer, after, room)} characters.",
            )
        return Example((*before, *after), len(before), prompt, answer)

    def examples(self, pairs: Iterable[tuple[str, str]]) -> list[Example]:
        """One example for each prompt and answer."""
        return [self.example(prompt, answer) for prompt, answer in pairs]


def _ideograph(sign: str) -> bool:
    """Whether a sign is Chinese or full-width: no space stands before it."""
    return bool(sign) and "\u2e80" <= sign <= "\uffef"


def _characters(answer: str, tokens: Sequence[int], room: int) -> int:
    return int(len(answer) * room / max(1, len(tokens) - 1))
