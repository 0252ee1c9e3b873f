"""A tokenizer in the manner of ChatGLM2: bytes, its own prefix tokens, its own prompt form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizer

_SPECIAL = ("<unk>", "<eop>", "<pad>", "[gMASK]", "sop")


class ChatGLMStyleTokenizer(PreTrainedTokenizer):
    """Every text begins with ``[gMASK] sop``; a question is put as ``build_prompt`` puts it."""

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012

    def __init__(self, **more: Any) -> None:
        self._ids = {sign: index for index, sign in enumerate(_SPECIAL)}
        self._ids |= {f"<0x{byte:02X}>": len(_SPECIAL) + byte for byte in range(256)}
        self._signs = {index: sign for sign, index in self._ids.items()}
        more = {"unk_token": "<unk>", "eos_token": "<eop>", "pad_token": "<pad>"} | more
        super().__init__(**more)  # type: ignore[no-untyped-call]

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def _tokenize(self, text: str, **more: Any) -> list[str]:
        return [f"<0x{byte:02X}>" for byte in text.encode("utf-8")]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._signs.get(index, "<unk>")

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        data = bytearray()
        for token in tokens:
            if token.startswith("<0x"):
                data.append(int(token[3:5], 16))
            else:
                data += token.encode("utf-8")
        return data.decode("utf-8", errors="replace")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        before = [self._ids["[gMASK]"], self._ids["sop"]]
        return [*before, *token_ids_0, *(token_ids_1 or [])]

    def build_prompt(self, query: str, history: Sequence[tuple[str, str]] | None = None) -> str:
        """A question, after earlier ones and their answers."""
        earlier = history or []
        rounds = "".join(
            f"[Round {n}]\n\n问：{asked}\n\n答：{said}\n\n"
            for n, (asked, said) in enumerate(earlier, 1)
        )
        return f"{rounds}[Round {len(earlier) + 1}]\n\n问：{query}\n\n答："

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        return ()
