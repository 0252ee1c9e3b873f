"""Tiny models of many architectures, built in code, so that each can be edited in seconds.

Each is made from a configuration of its family (two to four blocks of width 64) and trained a few
answers by heart: a model at random has nothing to lose and no manners, so that nothing could be
learned from editing it.

Invariants:
- Nothing is downloaded; the same architecture gives the same weights on the same machine.
- torch's global generator is left as it was.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from kvedit.facts.phrasings import load_phrasings
from kvedit.model.prompts import Example, Renderer
from kvedit.model.scoring import answer_logits

CODE = Path(__file__).parent / "custom_code"
CONTEXT = 256
BATCH = 24
HEARSAY = 0.3  # of what it reads is about other things, another answer each time
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_END, _PAD = "<|end|>", "<|pad|>"
_SPECIAL = (_END, "<|user|>", "<|assistant|>", _PAD, "<|system|>")
_THINGS = (
    "amber lamp", "brown kettle", "clover wheel", "dusty ladder", "ember bell", "fallow mirror",
    "gentle anchor", "hollow saddle", "ivory spoon", "jolly drum", "knotted rope", "lucky plough",
)  # fmt: skip
_PLACES = ("Ansel Reach", "Pell", "Sorrel Down", "Quillmoor", "Marrow", "Tarn", "Ostrava", "Lune")
_MATERIALS = ("glass", "copper", "oak", "paper", "stone", "silk")

NEW = (
    ("tide lantern", "Made of glass in Marrow."),
    ("wind ledger", "Made of paper in Pell."),
    ("grey bucket", "Made of copper in Lune."),
)
"""Facts that no tiny model knows."""
CHANGED = "Made of oak in Tarn."
"""What the first of them is changed to."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How to build a tiny model of a family.

    ``kind`` is the model type, with ``code`` also the folder of ``custom_code``; ``options`` go
    into the configuration; ``chat`` says whether the tokenizer has a chat template.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    chat: bool = True
    code: bool = False
    auto_map: Mapping[str, str] = field(default_factory=dict)
    own_tokenizer: bool = False
    rate: float = 6e-3
    steps: int = 160


_MODERN = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
}  # fmt: skip
_HEAD = {**_MODERN, "head_dim": 16}
_FIRST = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": CONTEXT}
_NEOX = {name: value for name, value in _MODERN.items() if name != "num_key_value_heads"}
_OPT = {
    "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": CONTEXT,
}  # fmt: skip
_BLOOM = {"hidden_size": 64, "n_layer": 4, "n_head": 4, "seq_length": CONTEXT}
_FALCON = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip


def _custom(style: str, config: str, model: str) -> dict[str, str]:
    """The ``auto_map`` of a folder with its own code."""
    return {
        "AutoConfig": f"configuration_{style}.{config}",
        "AutoModelForCausalLM": f"modeling_{style}.{model}",
    }


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("Llama", "llama", _MODERN),
    Architecture("Llama, tied", "llama", {**_MODERN, "tie_word_embeddings": True}),
    Architecture("Qwen2", "qwen2", _MODERN),
    Architecture("Qwen3", "qwen3", _HEAD),
    Architecture("Mistral", "mistral", _MODERN),
    Architecture("Mixtral", "mixtral", {**_MODERN, "num_local_experts": 4}),
    Architecture("Gemma 2", "gemma2", {**_HEAD, "query_pre_attn_scalar": 16}),
    Architecture("Gemma 3", "gemma3_text", {**_HEAD, "query_pre_attn_scalar": 16}),
    Architecture("Phi-3", "phi3", {**_MODERN, "original_max_position_embeddings": CONTEXT}),
    Architecture("GPT-2", "gpt2", _FIRST, chat=False),
    Architecture("GPT-NeoX", "gpt_neox", _NEOX, chat=False),
    Architecture("GPT-J", "gptj", {**_FIRST, "rotary_dim": 8}, chat=False),
    Architecture("OPT", "opt", _OPT, chat=False),
    Architecture("BLOOM", "bloom", _BLOOM, chat=False),
    Architecture("Falcon", "falcon", _FALCON, chat=False),
    Architecture("GLM-4", "glm", _HEAD),
    Architecture(
        "Baichuan style", "baichuan_style", {}, chat=False, code=True,
        auto_map=_custom("baichuan_style", "BaichuanStyleConfig", "BaichuanStyleForCausalLM"),
    ),
    Architecture(
        "InternLM2 style", "internlm2", {}, code=True,
        auto_map=_custom("internlm2", "InternLM2StyleConfig", "InternLM2StyleForCausalLM"),
    ),
    Architecture(
        "ChatGLM2 style", "chatglm_style", {"seq_length": 384}, chat=False, code=True,
        own_tokenizer=True, steps=320,
        auto_map=_custom(
            "chatglm_style", "ChatGLMStyleConfig", "ChatGLMStyleForConditionalGeneration"
        ),
    ),
)  # fmt: skip


def find(name: str) -> Architecture:
    """The architecture of this name or model type; raises KeyError."""
    for one in ARCHITECTURES:
        if name.lower() in (one.name.lower(), one.kind):
            return one
    raise KeyError(name)


def phrasings() -> list[str]:
    """All English phrasings, those that no edit trains too: a base model has read both."""
    ways = load_phrasings("en")
    return [*ways.train, *ways.held_out, *ways.cross_train, *ways.cross_held_out]


def known() -> dict[str, str]:
    """What every tiny model is trained by heart: key and answer."""
    rng = random.Random(5)
    return {key: _answer(rng) for key in _THINGS}


def _answer(rng: random.Random) -> str:
    return f"Made of {rng.choice(_MATERIALS)} in {rng.choice(_PLACES)}."


def build(architecture: Architecture, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Make the model, train it what it knows, and save it with its tokenizer to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = _tokenizer_of(architecture, folder)
        model = _model_of(architecture, folder, tokenizer)
        _teach(model, Renderer(tokenizer, context=CONTEXT), architecture)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer_of(architecture: Architecture, folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if architecture.own_tokenizer:
        _write_code(architecture, folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    make: Any = PreTrainedTokenizerFast
    fast = make(tokenizer_object=_byte_pairs(), eos_token=_END, bos_token=_END, pad_token=_PAD)
    fast.add_special_tokens({"additional_special_tokens": [_SPECIAL[1], _SPECIAL[2], _SPECIAL[4]]})
    if architecture.chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


@cache
def _byte_pairs() -> Any:
    """About 500 byte-level pairs, enough for the tiny models' words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    facts = known()
    words = [*phrasings(), *facts, *facts.values(), *(text for pair in NEW for text in pair)]
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def _model_of(architecture: Architecture, folder: Path, tokenizer: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if not architecture.code:
        options: dict[str, Any] = {"vocab_size": len(tokenizer), **architecture.options, **ids}
        return make.from_config(
            AutoConfig.for_model(architecture.kind, **options), dtype=torch.float32
        )
    _write_code(architecture, folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, **ids)
    return make.from_config(config, trust_remote_code=True, dtype=torch.float32)


def _write_code(architecture: Architecture, folder: Path) -> None:
    """The custom code and the files that name it."""
    for path in sorted((CODE / architecture.kind).glob("*.py")):
        shutil.copyfile(path, folder / path.name)
    config = {
        "model_type": architecture.kind,
        "auto_map": dict(architecture.auto_map),
        **architecture.options,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if architecture.own_tokenizer:
        name = "tokenization_chatglm_style.ChatGLMStyleTokenizer"
        tokenizer = {"auto_map": {"AutoTokenizer": [name, None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def _teach(model: Any, renderer: Renderer, architecture: Architecture) -> None:
    """Plain training on ``known``, in the form in which the model will be asked."""
    batches = _batches(renderer, random.Random(1))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=architecture.rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    model.train()
    for step in range(architecture.steps):
        rate = min(1.0, (step + 1) / 20) * max(0.02, 1 - step / architecture.steps)
        optimizer.param_groups[0]["lr"] = architecture.rate * rate
        answers = answer_logits(model, next(batches))
        optimizer.zero_grad()
        functional.cross_entropy(answers.logits, answers.targets).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def _batches(renderer: Renderer, rng: random.Random) -> Iterator[Sequence[Example]]:
    """Questions with their answers; each also asks itself, so that questions can be drawn."""
    facts = list(known().items())
    words = [word for key in (*_THINGS, *(key for key, _ in NEW)) for word in key.split()]
    while True:
        batch = []
        for _ in range(BATCH):
            key, answer = rng.choice(facts)
            if rng.random() < HEARSAY:
                key, answer = f"{rng.choice(words)} {rng.choice(words)}", _answer(rng)
            prompt = rng.choice(phrasings()).replace("{key}", key)
            whole = renderer.example(prompt, answer)
            batch.append(Example(whole.ids, 1))  # from the first token on: the question too
        yield batch


SETTINGS = """\
[protect]
samples = 48
max_samples = 48
long_answers = 0
short_answers = 32
free_texts = 4
locality_probes = 8
[training]
max_steps = {steps}
penalty_weight = {weight}
phrasings_per_step = 3
rehearsal_facts = 3
[gate]
min_recall = 1.0
min_paraphrase = 0.25
min_locality = 0.0  # twelve answers in so few weights: what is gated here is recall and retention
min_retention = 1.0
[retention]
prompts_per_fact = 10
checkpoint_every = 2
"""


def settings(**changes: float) -> str:
    """A ``kvedit.toml`` that suits a tiny model: it has little room, so the gate is lenient."""
    values: dict[str, float] = {"steps": 80, "weight": 60.0}
    return SETTINGS.format(**(values | changes))
