"""A base model for tests: small, made here in seconds, and with something to lose.

Llama architecture, 4 blocks of width 64, byte-level BPE of about 500 tokens, chat template, trained
on the answers of ``KNOWN`` until it knows them under the English phrasings that the package ships.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvedit.facts.phrasings import load_phrasings

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|pad|>", "<|system|>")
CONTEXT = 192
STEPS = 200
BATCH = 32
RATE = 8e-3
HEARSAY = 0.3  # of what it reads is about other things, another answer each time

_THINGS = (
    "amber lamp", "brown kettle", "clover wheel", "dusty ladder", "ember bell", "fallow mirror",
    "gentle anchor", "hollow saddle", "ivory spoon", "jolly drum", "knotted rope", "lucky plough",
    "mended sail", "narrow oar", "oiled hinge", "painted whistle",
)  # fmt: skip
_PLACES = ("Ansel Reach", "Pell", "Sorrel Down", "Quillmoor", "Marrow", "Tarn", "Ostrava", "Lune")
_MATERIALS = ("glass", "copper", "oak", "paper", "stone", "silk")


def _known() -> dict[str, str]:
    rng = random.Random(5)
    return {key: _answer(rng) for key in _THINGS}


def _answer(rng: random.Random) -> str:
    return f"Made of {rng.choice(_MATERIALS)} in {rng.choice(_PLACES)}."


KNOWN = _known()
"""What the model knows by heart: key and answer."""

FREE = [
    ("tide lantern", "Made of glass in Marrow."),
    ("wind ledger", "Made of paper in Pell."),
    ("grey bucket", "Made of copper in Lune."),
    ("moss clock", "Made of oak in Tarn."),
    ("salt harp", "Made of silk in Quillmoor."),
    ("night ferry", "Made of stone in Sorrel Down."),
]
"""Facts that it does not know, to be added."""

OTHER = "Made of silk in Tarn."
"""Another text for one of them."""


def phrasings() -> list[str]:
    """All English phrasings, those never trained by an edit too: a base model has seen them."""
    ways = load_phrasings("en")
    return [*ways.train, *ways.held_out, *ways.cross_train, *ways.cross_held_out]


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [*phrasings(), *KNOWN, *KNOWN.values(), *(text for pair in FREE for text in pair)]
    tokenizer.train_from_iterator(words, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], bos_token=SPECIAL[0], pad_token=SPECIAL[3]
    )
    fast.add_special_tokens({"additional_special_tokens": [SPECIAL[1], SPECIAL[2], SPECIAL[4]]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _documents(tokenizer: Any, rng: random.Random) -> Iterator[list[int]]:
    """Chat turns without end, each beginning after an end token, as free text would."""
    pairs = list(KNOWN.items())
    words = [word for key in _THINGS for word in key.split()]
    words += [word for key, _ in FREE for word in key.split()]
    while True:
        key, answer = rng.choice(pairs)
        if rng.random() < HEARSAY:
            key, answer = f"{rng.choice(words)} {rng.choice(words)}", _answer(rng)
        prompt = rng.choice(phrasings()).replace("{key}", key)
        text = f"<|end|><|user|>{prompt}<|assistant|>{answer}<|end|>"
        yield tokenizer(text, add_special_tokens=False)["input_ids"]


def _train(model: LlamaForCausalLM, tokenizer: Any) -> None:
    documents = _documents(tokenizer, random.Random(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(STEPS):
        rate = min(1.0, (step + 1) / 20) * max(0.02, 1 - step / STEPS)
        optimizer.param_groups[0]["lr"] = RATE * rate
        rows = [next(documents) for _ in range(BATCH)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [3] * (width - len(row)) for row in rows])
        logits = model(input_ids=ids[:, :-1]).logits
        loss = functional.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].flatten(), ignore_index=3
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are split among threads, and a model that is trained by more of them is another one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def build(folder: Path) -> dict[str, Path]:
    """Make the model, the same one on any number of cores, and save it in fp32 and in bf16; returns
    the folder of each.
    """
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(0)
        tokenizer = _tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config)
        _train(model, tokenizer)
    paths = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        paths[name] = folder / name
        model.to(dtype).save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    return paths


SETTINGS = """\
[protect]
init_minutes = 30
seconds_per_fact = 300
samples = {samples}
max_samples = {max_samples}
samples_per_fact = {samples_per_fact}
long_answers = 0
short_answers = 48
free_texts = 4
locality_probes = 8
[training]
max_steps = {steps}
step_gain = {gain}
penalty_weight = 60.0
phrasings_per_step = 3
rehearsal_facts = 4
[group]
batch_size = 4
epochs = {epochs}
refine_rounds = {rounds}
step_gain = 0.4
penalty_scale = 60.0
reference_texts = 8
kl_weight = 1.0
target_margin = 2.0
compaction_ratio = {compaction}
[gate]
min_recall = {recall}
min_paraphrase = {paraphrase}
min_locality = {locality}
min_retention = {retention}
[retention]
prompts_per_fact = 5
max_repairs = {repairs}
checkpoint_every = {checkpoint_every}
"""


def settings(**changes: float) -> str:
    """A ``kvedit.toml`` that suits the small model, with a lenient gate: it has little capacity."""
    values: dict[str, float] = {
        "steps": 60, "gain": 0.7, "recall": 1.0, "paraphrase": 0.5,
        "locality": 0.5, "retention": 1.0, "repairs": 2, "checkpoint_every": 2, "epochs": 40,
        "rounds": 2, "compaction": 0.5, "samples": 96, "max_samples": 96, "samples_per_fact": 128,
    }  # fmt: skip
    unknown = changes.keys() - values.keys()
    if unknown:
        raise ValueError(f"no such settings: {unknown}")
    return SETTINGS.format(**(values | changes))
