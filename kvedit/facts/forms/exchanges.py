"""Questions with their answers: tables of both, Alpaca, ShareGPT, OpenAI messages.

Invariants:
- A question is asked as it stands and answered by the text alone: no other phrasing is trained.
- A conversation of several exchanges is refused: its later answers need what was said before.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256

from kvedit.errors import InvalidFactError
from kvedit.facts.fact import MAX_KEY
from kvedit.facts.forms.names import ANSWERS, PARTS, QUESTIONS, Record, first_of

_DIGEST = 8  # characters of it that tell two long questions apart
_ASKS = frozenset({"user", "human", "prompter", "question", "用户", "用戶"})
_ANSWERS = frozenset({"assistant", "gpt", "bot", "chatgpt", "model", "answer", "bing", "助手"})
_SYSTEM = frozenset({"system", "developer"})
CONVERSATIONS = ("conversations", "conversation", "items")
"""Names of the turns in ShareGPT's form."""


def question_as_fact(question: object, answer: object) -> dict[str, object]:
    """The parts of a fact that answers one question; its key is the question on one line.

    A question too long for a key ends there with a digest.  What are no strings is left for
    ``Fact.from_json`` to refuse.
    """
    key = question
    if isinstance(question, str):
        key = " ".join(question.split())
        if len(key) > MAX_KEY:
            digest = sha256(question.encode("utf-8", "replace")).hexdigest()[:_DIGEST]
            key = f"{key[: MAX_KEY - _DIGEST - 2]}… {digest}"
    parts: dict[str, object] = {"key": key, "description": answer, "relation_of": key}
    return {**parts, "prompts": None if question is None else [question]}


def table_row(record: Record) -> Record | None:
    """A row with a question and its answer; its other names stay, below those of a fact."""
    question, answer = first_of(record, QUESTIONS), first_of(record, ANSWERS)
    if question is None or answer is None:
        return None
    given = record[answer]
    if isinstance(given, list) and given and all(isinstance(one, str) for one in given):
        given = given[0]  # several right answers: the first is taught
    parts = _with_source(record, question_as_fact(record[question], given))
    others = {n: record[n] for n in record if n not in PARTS and n not in (question, answer)}
    return {**others, **parts}


def alpaca(record: Record) -> Record | None:
    """Alpaca: an instruction, perhaps an input, and the output."""
    if not {"instruction", "output"} <= set(record):
        return None
    if record.get("history"):
        raise InvalidFactError("it has a history, and one exchange is read", hint=_ONE)
    question, context = record["instruction"], record.get("input")
    if isinstance(question, str) and isinstance(context, str) and context.strip():
        question = f"{question.strip()}\n{context.strip()}"
    return _with_source(record, question_as_fact(question, record["output"]))


def dolly(record: Record) -> Record | None:
    """Dolly: an instruction, perhaps a context, and the response."""
    if not {"instruction", "response", "context"} <= set(record):
        return None
    renamed = {**record, "input": record["context"], "output": record["response"]}
    return alpaca(renamed)


def messages(record: Record) -> Record | None:
    """OpenAI's ``messages``: turns with ``role`` and ``content``."""
    return _conversation(record, ("messages",), "role", "content")


def sharegpt(record: Record) -> Record | None:
    """ShareGPT's ``conversations``: turns with ``from`` and ``value``."""
    return _conversation(record, CONVERSATIONS, "from", "value")


_ONE = "Give each exchange its own record, its question complete in itself."


def _conversation(
    record: Record, names: tuple[str, ...], role_name: str, text_name: str
) -> Record | None:
    name = first_of(record, names)
    turns = record.get(name) if name else None
    if not isinstance(turns, list) or not turns or not all(isinstance(t, Mapping) for t in turns):
        return None
    if not all(role_name in turn or "role" in turn for turn in turns):
        return None
    pairs = [_turn(turn, role_name, text_name) for turn in turns]
    spoken = [(role, text) for role, text in pairs if role not in _SYSTEM]
    return _with_source(record, question_as_fact(*_exchange(spoken)))


def _turn(turn: Record, role_name: str, text_name: str) -> tuple[str, str]:
    role = turn.get(role_name, turn.get("role"))
    return str(role).casefold(), _content(turn.get(text_name, turn.get("content")))


def _content(content: object) -> str:
    """The text of a message, which may be given in parts; raises InvalidFactError."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(map(str, texts))
    raise InvalidFactError("a message is no text", hint="Only texts can be taught.")


def _exchange(spoken: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Question and answer of a conversation; raises InvalidFactError unless it has one exchange."""
    roles = [role for role, _ in spoken]
    for role in roles:
        if role not in _ASKS | _ANSWERS:
            raise InvalidFactError(f"a turn of {role!r} cannot be taught", hint=_ONE)
    if len(roles) == 2 and roles[0] in _ASKS and roles[1] in _ANSWERS:
        return spoken[0][1], spoken[1][1]
    asked = min(sum(role in kind for role in roles) for kind in (_ASKS, _ANSWERS))
    if asked > 1:
        message = f"the conversation has {asked} exchanges, and one is read"
        raise InvalidFactError(message, hint=_ONE)
    raise InvalidFactError("the conversation is not a question and its answer", hint=_ONE)


def _with_source(record: Record, parts: dict[str, object]) -> Record:
    """The parts, with what a record says of source, language, paraphrases and locality."""
    kept = ("source", "lang", "paraphrases", "locality", "questions", "statements")
    extra = {name: record[name] for name in kept if name in record}
    if "lang" in extra and extra["lang"] not in ("en", "zh-Hans", "zh-Hant"):
        del extra["lang"]
    if not isinstance(extra.get("source"), str | None):
        del extra["source"]
    return {**parts, **extra}
