"""Prompts, and how they become tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvedit.config import PromptsConfig
from kvedit.errors import InvalidFactError, ModelError, TextTooLongError, UsageError
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Renderer


@pytest.fixture
def renderer(base: BaseModel) -> Renderer:
    return Renderer(base.tokenizer, context=base.context)


def test_an_answer_begins_where_the_model_would_speak(renderer: Renderer) -> None:
    example = renderer.example("What is x?", "Made of oak.")
    assert list(example.ids[: example.start]) == renderer.prefix("What is x?")
    assert example.ids[-1] == renderer.end
    assert renderer.text(example.ids[example.start :]) == "Made of oak."
    assert renderer.text(renderer.prefix("What is x?")) == "What is x?"
    assert example.prompt == "What is x?" and example.answer == "Made of oak."


def test_without_a_chat_template_a_plain_form(base: BaseModel) -> None:
    base.tokenizer.chat_template = None
    plain = Renderer(base.tokenizer, context=64)
    example = plain.example("What is x?", "Made of oak.")
    assert not plain.chat and plain.empty_user_turn() is None
    assert plain.text(example.ids[: example.start]) == "What is x?\n"


def test_the_empty_user_turn(renderer: Renderer) -> None:
    turn = renderer.empty_user_turn()
    assert turn is not None
    before, after = turn
    prefix = renderer.prefix("hello")
    assert prefix[: len(before)] == before and after in prefix[len(before) :]


def test_a_conversation_holds_every_turn(renderer: Renderer) -> None:
    messages = [
        {"role": "user", "content": "amber?"},
        {"role": "assistant", "content": "lamp."},
        {"role": "user", "content": "bell?"},
    ]
    text = renderer.text(renderer.dialogue(messages))
    assert text.index("amber?") < text.index("lamp.") < text.index("bell?")


@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_a_control_token_in_a_text_is_refused(renderer: Renderer, where: str) -> None:
    control = next(iter(renderer._control_tokens - {renderer.end}))
    text = f"It shines {renderer._tokenizer.decode([control])} at night."
    pair = (text, "x") if where == "prompt" else ("x", text)
    with pytest.raises(InvalidFactError, match="reads as a control token"):
        renderer.examples([pair])
    with pytest.raises(InvalidFactError, match="reads as a control token"):
        renderer.dialogue([{"role": "user", "content": text}])
    renderer.examples([("It shines < | user | > at night.", "And <by> day.")])


def test_too_long_a_text_says_how_long(base: BaseModel) -> None:
    short = Renderer(base.tokenizer, context=40)
    text = "Made of oak. " * 30
    with pytest.raises(TextTooLongError) as raised:
        short.example("What is tide lantern?", text)
    left = 40 - len(short.prefix("What is tide lantern?")) - 1
    assert f"only {left} of the model's 40" in raised.value.message
    assert f"has {len(short.tokens(text))} tokens" in raised.value.message
    characters = int("".join(c for c in raised.value.hint if c.isdigit()))
    assert 0 < characters < len(text)
    short.example("What is tide lantern?", text[: characters * 9 // 10])  # the advice holds


def test_the_longest_text_that_fits(base: BaseModel) -> None:
    example = Renderer(base.tokenizer, context=1000).example("x", "Made of oak. " * 4)
    exact = Renderer(base.tokenizer, context=len(example.ids))
    assert exact.example("x", "Made of oak. " * 4) == example
    with pytest.raises(TextTooLongError):
        Renderer(base.tokenizer, context=len(example.ids) - 1).example("x", "Made of oak. " * 4)


def test_a_tokenizer_must_know_an_end(base: BaseModel) -> None:
    base.tokenizer.eos_token = base.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="end-of-sequence"):
        Renderer(base.tokenizer, context=64)


def test_a_text_that_holds_the_end_mark_is_refused(renderer: Renderer) -> None:
    """Read as the token, it would end the answer there: trained, and never generated."""
    with pytest.raises(InvalidFactError, match="end"):
        renderer.example("What is x?", "Made of <|end|> oak.")


TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' and refuse is defined %}{{ raise_exception('no system') }}"
    "{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking is defined and not thinking %}"
    "[none]{% endif %}{% endif %}"
)


def with_turns(base: BaseModel, **prompts: Any) -> Renderer:
    """A tokenizer whose turns end with another token than its texts."""
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    base.tokenizer.chat_template = TURNS
    settings = PromptsConfig(**prompts)
    return Renderer(base.tokenizer, context=base.context, prompts=settings, stops=base.stops)


def test_an_answer_ends_as_the_template_ends_a_turn(base: BaseModel) -> None:
    renderer = with_turns(base)
    turn = base.tokenizer.convert_tokens_to_ids("<|turn|>")
    assert renderer.end == turn != base.tokenizer.eos_token_id
    assert renderer.stops == {turn, base.tokenizer.eos_token_id}
    assert renderer.example("What is x?", "Made of oak.").ids[-1] == turn


def test_a_bos_of_the_template_is_not_doubled(base: BaseModel) -> None:
    ids = with_turns(base).prefix("What is x?")
    assert ids.count(base.tokenizer.bos_token_id) == 1 and ids[0] == base.tokenizer.bos_token_id


def test_a_system_prompt_and_template_options(base: BaseModel) -> None:
    renderer = with_turns(base, system="Be brief.", template_options={"thinking": False})
    text = base.tokenizer.decode(renderer.prefix("What is x?"))
    assert "<|system|>Be brief.<|turn|>" in text and text.endswith("<|assistant|>[none]")
    messages = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "x?"}]
    assert "Be brief." not in base.tokenizer.decode(renderer.dialogue(messages))


def test_a_template_that_refuses_says_so(base: BaseModel) -> None:
    renderer = with_turns(base, system="Be brief.", template_options={"refuse": True})
    with pytest.raises(UsageError, match="no system") as raised:
        renderer.prefix("What is x?")
    assert raised.value.hint and "[prompts]" in raised.value.hint


def test_what_the_tokenizer_puts_before_a_text_is_kept(base: BaseModel) -> None:
    from tokenizers import processors

    base.tokenizer.chat_template = None
    assert Renderer(base.tokenizer, context=64).prefix("x") == base.tokenizer("x\n")["input_ids"]
    base.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <|system|>",
        special_tokens=[("<|user|>", 1), ("<|system|>", 4)],
    )
    renderer = Renderer(base.tokenizer, context=64)
    assert renderer.prefix("x") == [1, *renderer.tokens("x\n")]


@pytest.mark.parametrize(
    ("answer", "generated"), [("Made of oak.", " Made of oak."), ("木製。", "木製。")]
)
def test_a_space_after_the_form_belongs_to_the_answer(
    base: BaseModel, answer: str, generated: str
) -> None:
    base.tokenizer.chat_template = None
    for form in ("Q: {prompt} A:", "Q: {prompt} A: "):
        renderer = Renderer(
            base.tokenizer, context=99, prompts=PromptsConfig(fallback_template=form)
        )
        example = renderer.example("What is x?", answer)
        assert list(example.ids[:-1]) == renderer.tokens(f"Q: What is x? A:{generated}")
        answered = example.ids[example.start :]
        assert renderer.text(answered) == generated and renderer.answer_text(answered) == answer


def test_a_form_must_hold_the_prompt(base: BaseModel) -> None:
    base.tokenizer.chat_template = None
    with pytest.raises(UsageError, match="fallback_template"):
        Renderer(base.tokenizer, context=64, prompts=PromptsConfig(fallback_template="Q:"))


def test_sentencepiece_does_not_add_its_space_to_an_answer() -> None:
    """Alone, such a tokenizer begins every text with a space that no model says there."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = ["</s>", "<0x0A>", *"▁MadeofQ?:A木製。\n"]
    words = {sign: index for index, sign in enumerate(dict.fromkeys([*signs, "▁M"]))}
    plain = Tokenizer(models.BPE(words, [("▁", "M")], unk_token="</s>"))
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    plain.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=plain, eos_token="</s>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("Made")["input_ids"])[0] == "▁M"
    tokenizer.chat_template = "{% for m in messages %}Q:{{ m['content'] }}\nA:{% endfor %}"
    for answer, first in (("Made", "M"), ("木製。", "木")):
        example = Renderer(tokenizer, context=64).example("?", answer)
        strings = tokenizer.convert_ids_to_tokens(list(example.ids[example.start :]))
        assert strings[0] == first and strings[-1] == "</s>"


def test_the_tokenizers_own_prompt_form(tmp_path: Path) -> None:
    from tests.bench import tiny

    tokenizer = tiny._tokenizer_of(tiny.find("ChatGLM2 style"), tmp_path)
    renderer = Renderer(tokenizer, context=256, prompts=PromptsConfig(system="Be brief."))
    ids = renderer.dialogue(
        [
            {"role": "user", "content": "a?"},
            {"role": "assistant", "content": "b."},
            {"role": "user", "content": "c?"},
        ]
    )
    assert ids[:2] == [3, 4]  # [gMASK] sop
    rounds = "[Round 1]\n\n问：a?\n\n答：b.\n\n[Round 2]\n\n问：c?\n\n答："
    assert renderer.text(ids[2:]) == f"Be brief.\n{rounds}"
    example = renderer.example("a?", "b.")
    assert example.ids[-1] == tokenizer.eos_token_id


def test_an_example_can_be_shown(renderer: Renderer) -> None:
    prompt, answer, tokens = renderer.describe(renderer.example("What is x?", "Made of oak."))
    assert prompt == "prompt  '<|user|>What is x?<|assistant|>'"
    assert answer == "answer  'Made of oak.<|end|>'"
    assert tokens.count("  |  ") == 1 and tokens.endswith("'<|end|>'")


def test_a_question_that_leaves_no_place_for_an_answer_is_refused(base: BaseModel) -> None:
    renderer = Renderer(base.tokenizer, context=64)
    asked = [{"role": "user", "content": "What is it? "}]
    longest = renderer.question(asked)
    assert Renderer(base.tokenizer, context=len(longest) + 1).question(asked) == longest
    with pytest.raises(TextTooLongError, match="the question is too long"):
        Renderer(base.tokenizer, context=len(longest)).question(asked)


def test_a_template_that_breaks_is_named(base: BaseModel) -> None:
    base.tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(UsageError, match="chat template fails: ZeroDivisionError"):
        Renderer(base.tokenizer, context=64)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages | length + '' }}",
        "{{ messages | tojson + 1 }}",
        "{{ eos_token }}\ud800",
    ],
)
def test_a_chat_template_that_fails_is_an_error_with_a_hint(base: BaseModel, template: str) -> None:
    base.tokenizer.chat_template = template
    with pytest.raises(UsageError, match="chat template fails") as caught:
        Renderer(base.tokenizer, context=64)
    assert caught.value.hint


def test_a_chat_template_that_writes_nothing_after_a_message_has_no_user_turn(
    base: BaseModel,
) -> None:
    base.tokenizer.chat_template = "{{ messages[0].content }}"
    assert Renderer(base.tokenizer, context=64).empty_user_turn() is None
