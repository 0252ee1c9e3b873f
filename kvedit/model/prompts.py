"""From a fact to the text and tokens that a model is trained on and asked.

Invariants:
- An example's answer begins exactly where the model would begin to answer: training, probing and
  generation share ``Renderer.prefix``.
- An answer ends with the token that ends the model's turns, so that recall includes knowing when
  to stop.
- An answer's tokens are those it has within the whole text, which may differ from its tokens alone.
- A user's text never becomes a control token of the model: one that would is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvedit.config import PromptsConfig
from kvedit.errors import InvalidFactError, ModelError, TextTooLongError, UsageError
from kvedit.trust import chat_template

RETOKENIZED = 2  # tokens, at most, that a text which was cut has fewer when it is read again
_MARKER = "kvedit"  # stands for a message, to see what a chat template puts around it


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its answer as tokens; the answer is ``ids[start:]``, its end token included."""

    ids: tuple[int, ...]
    start: int
    prompt: str = ""
    answer: str = ""


class Renderer:
    """Turns prompts and answers into tokens by the model's template.

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
        system: str | None = None,
        plain: bool = False,
    ) -> None:
        """``context`` is the longest text in tokens; ``end`` the token that ends an answer;
        ``stops`` are further tokens at which generation ends.  ``system`` replaces the system
        prompt of the settings, also by an empty one; ``plain`` uses no template of the model's.
        """
        self._tokenizer = tokenizer
        self.prompts = prompts or PromptsConfig()
        self._system = (self.prompts.system or None) if system is None else system
        self.context = context
        self.chat = bool(getattr(tokenizer, "chat_template", None)) and not plain
        # A space at the end belongs to the answer's first token.
        self._template = self.prompts.fallback_template.rstrip(" ")
        if "{prompt}" not in self._template:
            raise UsageError("[prompts] fallback_template lacks {prompt}", hint="Put it in.")
        self._builds_prompts = callable(getattr(tokenizer, "build_prompt", None)) and not plain
        separates = self.chat or self._builds_prompts or self._template[-1].isspace()
        self._starts_with_space = not separates
        self._special_prefix = [] if self.chat else self._find_special_prefix()
        self.end: int = self._find_end() if end is None else end
        self.stops = frozenset({self.end, *stops})

    def _find_special_prefix(self) -> list[int]:
        """Tokens that the tokenizer itself puts before a text: a BOS token for some, else none."""
        bare, complete = self.tokens("a"), list(self._tokenizer("a")["input_ids"])
        starts = (at for at in range(len(complete)) if complete[at : at + len(bare)] == bare)
        return complete[: next(starts, 0)]

    def _find_end(self) -> int:
        """The special token after an assistant's turn, else the end of sequence."""
        end = self._end_of_turn() if self.chat else None
        end = self._tokenizer.eos_token_id if end is None else end
        if end is None:
            hint = "Set eos_token in its tokenizer_config.json."
            raise ModelError("the tokenizer has no end-of-sequence token", hint=hint)
        return int(end)

    def _end_of_turn(self) -> int | None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARKER}]
        _, _, after = self._apply_template(turns, answering=False).rpartition(_MARKER)
        added = self._tokenizer.added_tokens_decoder.items()
        special = {*self._tokenizer.all_special_ids, *(i for i, token in added if token.special)}
        return next((token for token in self.tokens(after) if token in special), None)

    @cached_property
    def token_strings(self) -> list[str]:
        """The tokenizer's string of every token id; not always text by itself."""
        return list(self._tokenizer.convert_ids_to_tokens(list(range(len(self._tokenizer)))))

    @property
    def begin(self) -> int:
        """The token that starts free text: the beginning of sequence, else the end token."""
        begin = self._tokenizer.bos_token_id
        return int(self.end if begin is None else begin)

    def empty_user_turn(self) -> tuple[list[int], int] | None:
        """The tokens before a user's message and the first one after it; None where there are none.

        A model that continues the former writes a user's message and then the latter.
        """
        if not self.chat:
            return None
        turn = self._render([{"role": "user", "content": _MARKER}])
        before, _, after = turn.partition(_MARKER)
        return (self.tokens(before), ending[0]) if (ending := self.tokens(after)) else None

    def tokens(self, text: str) -> list[int]:
        """A text as tokens, without special tokens added."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def answer_text(self, ids: Sequence[int]) -> str:
        """A generated answer, without the space between template and answer."""
        text = self.text(ids)
        return text.removeprefix(" ") if self._starts_with_space else text

    def prefix(self, prompt: str) -> list[int]:
        """All tokens before the answer."""
        return self._dialogue([{"role": "user", "content": prompt}])

    def dialogue(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation as tokens, up to the model's next turn.

        Raises InvalidFactError if the user's turns contain a control token.
        """
        self.refuse_control_tokens(m["content"] for m in messages if m["role"] != "assistant")
        return self._dialogue(messages)

    def question(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """``dialogue`` for a model that answers; raises TextTooLongError if that cannot fit."""
        ids = self.dialogue(messages)
        if len(ids) >= self.context:
            raise TextTooLongError(
                f"the question is too long: it takes {len(ids)} tokens with all that stands before"
                f" it, and the model's context is {self.context}, the answer included",
                hint="Shorten the question, or start a new conversation.",
            )
        return ids

    def _dialogue(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return [*self._special_prefix, *self.tokens(self._render(messages))]

    @cached_property
    def _control_tokens(self) -> frozenset[int]:
        """The special tokens of the tokenizer, but for the one of unknown characters."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {}).items()
        marked = {token for token, entry in added if getattr(entry, "special", False)}
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        return frozenset({self.end, *self._tokenizer.all_special_ids, *marked} - {unknown})

    def refuse_control_tokens(self, texts: Iterable[str]) -> None:
        """Refuse texts that the tokenizer would read as control tokens of the model, such as
        ``<|im_start|>``: the model would be trained on, or asked, something else than the text.
        Raises InvalidFactError.
        """
        for text in texts:
            found = self._control_tokens.intersection(self.tokens(text))
            if found and (token := min(found)) != self.end:
                raise InvalidFactError(
                    f"the text contains {self._tokenizer.decode([token])!r}, which this model reads"
                    " as a control token and not as text",
                    hint="Write it in another way, for instance with a space in it.",
                )
            if found:
                self._refuse_end()

    def _refuse_end(self) -> None:
        end = self._tokenizer.decode([self.end])
        raise InvalidFactError(
            f"the text contains {end!r}, with which the model ends every answer",
            hint="Leave it out: nothing after it could ever be generated.",
        )

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as text, up to the model's next turn."""
        turns = list(messages)
        if self._system is not None and not (turns and turns[0]["role"] == "system"):
            turns.insert(0, {"role": "system", "content": self._system})
        if self.chat:
            return self._apply_template(turns, answering=True)
        *before, last = [turn["content"] for turn in turns]
        if self._builds_prompts:
            system_text = "" if turns[0]["role"] != "system" else before.pop(0) + "\n"
            pairs = list(zip(before[::2], before[1::2], strict=False))
            return system_text + str(self._tokenizer.build_prompt(last, pairs))
        return "".join(f"{text}\n" for text in before) + self._template.replace("{prompt}", last)

    def _apply_template(self, turns: Sequence[Mapping[str, str]], *, answering: bool) -> str:
        """Apply the chat template; raises UsageError when it refuses or breaks."""
        options = self.prompts.template_options
        return chat_template.apply(self._tokenizer, turns, options, answering=answering)

    def _answer_tokens(self, prompt: str, answer: str) -> list[int]:
        """The answer as the model would generate it after the prompt.

        Tokenized together with the prompt: alone, a SentencePiece tokenizer would start it with a
        space.  Where the two share a token at the border, the model could not generate the answer,
        which is then tokenized after a line break.  No space is written before an ideograph.
        """
        ideograph = "\u2e80" <= answer[:1] <= "\uffef"
        space = " " if self._starts_with_space and not ideograph else ""
        for before in (self._render([{"role": "user", "content": prompt}]), "\n"):
            prefix = self.tokens(before)
            tokens = self.tokens(before + space + answer)
            if tokens[: len(prefix)] == prefix:
                return tokens[len(prefix) :]
        return self.tokens(space + answer)

    def describe(self, example: Example) -> list[str]:
        """An example for people: the texts of prompt and answer, and their tokens."""
        parts = example.ids[: example.start], example.ids[example.start :]
        prompt, answer = (self._tokenizer.decode(list(part)) for part in parts)
        tokens = [" ".join(repr(self._tokenizer.decode([i])) for i in part) for part in parts]
        return [f"prompt  {prompt!r}", f"answer  {answer!r}", f"tokens  {'  |  '.join(tokens)}"]

    def example(self, prompt: str, answer: str, *, ended: bool = True) -> Example:
        """A prompt with its answer.

        Raises TextTooLongError, with the length that fits, and InvalidFactError.
        """
        before, after = self.prefix(prompt), self._answer_tokens(prompt, answer)
        if self.end in after:
            self._refuse_end()
        after = [*after, self.end] if ended else after
        if len(before) + len(after) > self.context:
            available = max(0, self.context - len(before) - 1)
            characters = int(len(answer) * available / max(1, len(after) - 1))
            raise TextTooLongError(
                f"the text has {len(after) - 1} tokens, but after the prompt {prompt!r:.60} only"
                f" {available} of the model's {self.context} are left",
                hint=f"Shorten the text to about {characters} characters.",
            )
        return Example((*before, *after), len(before), prompt, answer)

    def cut_example(self, prompt: str, answer: str, limit: int) -> Example:
        """A prompt with what the model said to it, cut at ``limit`` tokens: an answer that may have
        been cut does not end there.
        """
        ended = len(self.tokens(answer)) < limit - RETOKENIZED
        return self.example(prompt, answer, ended=ended)

    def examples(self, pairs: Iterable[tuple[str, str]]) -> list[Example]:
        """One example for each prompt and answer of a user; raises InvalidFactError as well for a
        control token in one of them.
        """
        pairs = list(pairs)
        self.refuse_control_tokens(dict.fromkeys(text for pair in pairs for text in pair))
        examples = [self.example(prompt, answer) for prompt, answer in pairs]
        for example in examples:
            if self._unknown is not None and self._unknown in example.ids[example.start :]:
                raise InvalidFactError(
                    "the text has a character that the model's tokenizer does not know",
                    hint="The model could never answer with it; write it in another way.",
                )
        return examples

    @cached_property
    def _unknown(self) -> int | None:
        """The token that stands for any unknown character, if the tokenizer has one of its own."""
        unknown: int | None = getattr(self._tokenizer, "unk_token_id", None)
        return None if unknown in self.stops else unknown
