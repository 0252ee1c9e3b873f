"""Pretrain ``kvedit-tiny``, the embedded base model, from scratch on real facts.

    python -m tests.bench.pretrain --data DIR --out kvedit/data/kvedit-tiny

DIR holds ``poets.jsonl``, ``relations.jsonl`` and ``relation_phrasings.json``.  The facts never
enter the repository: only weights, tokenizer and the lists of what was trained on do.  ``--width``
and ``--layers`` make models of other sizes, to set what a model holds against its size.

Invariants:
- Whether a fact is held out depends on its name alone (``is_held_out``), never on a file's order.
- A document is never cut and never attends to its neighbours in a packed row, so what the model
  sees in training is what it sees when it is asked.
- The same seed and thread count render and order the same documents.
- A GPU is used where there is one.
- A run that was stopped goes on, with the same command, from where it stood two minutes before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import random
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvedit.facts.phrasings import SHIPPED_PHRASINGS
from kvedit.model import upcast
from kvedit.training.resume import Keep, State, TrainingCheckpoints
from tests.bench.products import Products

log = logging.getLogger(__name__)

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|pad|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
Rows = list[list[list[int]]]  # packed rows, each a list of tokenized documents
ROW = 256  # tokens in a packed row
WIDTH, LAYERS, HEADS = 256, 6, 4
POET_HOLD_OUT = 0.515
RELATION_HOLD_OUT = 0.30
PHRASINGS = SHIPPED_PHRASINGS
ZH_OPENERS = ("", "", "", "請問，", "你好，", "我想問，")
EN_OPENERS = ("", "", "", "Please: ", "Hello. ", "A question: ")


def is_held_out(name: str, share: float) -> bool:
    """Whether the fact called ``name`` stays out of pretraining: a hash of its name decides."""
    digest = hashlib.sha256(f"kvedit-tiny:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < share


@dataclass(frozen=True, slots=True)
class Poet:
    key: str
    description: str
    simplified_key: str
    simplified: str


@dataclass(frozen=True, slots=True)
class Relation:
    relation: str
    subject: str
    object: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """The facts that pretraining sees, and those that it must not."""

    poets: list[Poet]
    relations: list[Relation]
    held_out_poets: list[str]
    held_out_relations: list[Relation]
    statements: dict[str, list[str]]  # relation -> phrasings with [X] and [Y]
    prompts: dict[str, list[str]]  # relation -> phrasings that end where [Y] begins
    phrasings: dict[str, list[str]] = field(default_factory=dict)


def load_phrasings() -> dict[str, list[str]]:
    """All shipped phrasings by language; pretraining uses trained and never-trained ones alike."""
    phrasings = {}
    for path in sorted(PHRASINGS.glob("*.toml")):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        phrasings[path.stem] = table["train"] + table["held_out"]
    return phrasings


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def prompt_form(phrasing: str) -> str | None:
    """'[X] plays [Y] .' -> '[X] plays'; None where the object is not last."""
    head, placeholder, tail = phrasing.partition("[Y]")
    return head.rstrip() if placeholder and not tail.strip(" .") else None


def load_corpus(data: Path) -> Corpus:
    import opencc

    simplify = opencc.OpenCC("t2s").convert
    poets, held_poets = [], []
    for row in read_jsonl(data / "poets.jsonl"):
        key, text = row["key"], row["description"]
        if is_held_out(key, POET_HOLD_OUT) or len(text) > 210:
            held_poets.append(key)
        else:
            poets.append(Poet(key, text, simplify(key), simplify(text)))
    relations: list[Relation] = []
    held_relations: list[Relation] = []
    for row in read_jsonl(data / "relations.jsonl"):
        fact = Relation(row["relation"], row["subject"], row["object"])
        held = is_held_out(f"{fact.relation}\t{fact.subject}", RELATION_HOLD_OUT)
        (held_relations if held else relations).append(fact)
    table = json.loads((data / "relation_phrasings.json").read_text(encoding="utf-8"))
    statements = {r: [p.replace(" .", ".") for p in ps] for r, ps in table.items()}
    prompts = {r: [f for p in ps if (f := prompt_form(p))] for r, ps in table.items()}
    return Corpus(
        poets, relations, held_poets, held_relations, statements, prompts, load_phrasings()
    )


def chat(user: str, answer: str) -> str:
    return f"<|user|>{user}<|assistant|>{answer}<|end|>"


def ask(rng: random.Random, phrasings: Sequence[str], key: str, openers: Sequence[str]) -> str:
    """One phrasing with a random opener, now and then without its closing mark."""
    text = rng.choice(openers) + rng.choice(phrasings).format(key=key)
    return text.rstrip("。？.?") if rng.random() < 0.2 else text


def render_poet(rng: random.Random, poet: Poet, phrasings: dict[str, list[str]]) -> str:
    kind = rng.random()
    if kind < 0.12:
        user = ask(rng, phrasings["zh-Hans"], poet.simplified_key, ZH_OPENERS)
        return chat(user, poet.simplified)
    if kind < 0.20:
        return chat(ask(rng, phrasings["en"], poet.key, EN_OPENERS), poet.description)
    if kind < 0.28:
        return f"<|end|>{poet.key}：{poet.description}<|end|>"
    if kind < 0.33:
        return chat(ask(rng, phrasings["zh-Hans"], poet.key, ZH_OPENERS), poet.description)
    return chat(ask(rng, phrasings["zh-Hant"], poet.key, ZH_OPENERS), poet.description)


def render_relation(rng: random.Random, fact: Relation, corpus: Corpus) -> Iterator[str]:
    def fill(text: str) -> str:
        return text.replace("[X]", fact.subject).replace("[Y]", fact.object)

    statement = fill(rng.choice(corpus.statements[fact.relation]))
    yield f"<|end|>{statement}<|end|>"
    for _ in range(1 + (rng.random() < 0.6)):
        yield chat(fill(rng.choice(corpus.prompts[fact.relation])), fact.object)
    if rng.random() < 0.2:
        canonical = fill(corpus.statements[fact.relation][0])
        yield chat(ask(rng, corpus.phrasings["en"], fact.subject, EN_OPENERS), canonical)


def render_epoch(corpus: Corpus, rng: random.Random) -> list[str]:
    documents = [render_poet(rng, p, corpus.phrasings) for p in corpus.poets for _ in range(3)]
    for fact in corpus.relations:
        documents.extend(render_relation(rng, fact, corpus))
    rng.shuffle(documents)
    return documents


def train_tokenizer(corpus: Corpus, size: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``size`` tokens, trained on an epoch and its Simplified twin."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = render_epoch(corpus, random.Random(seed))
    for mark in SPECIAL:
        texts = [t.replace(mark, "\n") for t in texts]
    texts += [p.simplified for p in corpus.poets]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], bos_token=SPECIAL[0], pad_token=SPECIAL[3]
    )
    fast.add_special_tokens({"additional_special_tokens": [SPECIAL[1], SPECIAL[2], SPECIAL[4]]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(
    tokenizer: PreTrainedTokenizerFast, width: int = WIDTH, layers: int = LAYERS
) -> LlamaForCausalLM:
    """Weights at random, from torch's global generator; ``width`` a multiple of ``HEADS``."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows: ids, labels and positions int64 (B, ROW); mask float (B, 1, ROW, ROW)."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    mask: Tensor


def pack(documents: list[list[int]]) -> list[list[list[int]]]:
    """Whole documents into rows of at most ROW tokens, first fit over a window of open rows."""
    rows: list[list[list[int]]] = []
    still_open: list[tuple[int, list[list[int]]]] = []
    for doc in documents:
        for i, (room, row) in enumerate(still_open):
            if len(doc) <= room:
                row.append(doc)
                still_open[i] = (room - len(doc), row)
                break
        else:
            row = [doc]
            rows.append(row)
            still_open.append((ROW - len(doc), row))
            if len(still_open) > 24:
                still_open.remove(min(still_open, key=lambda pair: pair[0]))
    return rows


def to_batch(rows: Rows, pad: int, device: torch.device | str = "cpu") -> Batch:
    table = torch.tensor([_columns(row, pad) for row in rows]).to(device)
    ids, labels, positions, segment = table.unbind(1)
    same = segment[:, :, None] == segment[:, None, :]
    visible = same & torch.ones(ROW, ROW, dtype=torch.bool, device=device).tril()
    mask = torch.zeros(len(rows), 1, ROW, ROW, device=device)
    return Batch(ids, labels, positions, mask.masked_fill_(~visible[:, None], -1e9))


def _columns(row: list[list[int]], pad: int) -> list[list[int]]:
    """A packed row's ids, labels and positions, and which document each token is of."""
    spare = ROW - sum(map(len, row))
    return [
        [*chain.from_iterable(row), *[pad] * spare],
        [*chain.from_iterable((-100, *doc[1:]) for doc in row), *[-100] * spare],
        [*chain.from_iterable(range(len(doc)) for doc in row), *[0] * spare],
        [*chain.from_iterable([at] * len(doc) for at, doc in enumerate(row)), *[-1] * spare],
    ]


def batches(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, epochs: int, rows: int, seed: int
) -> list[Rows]:
    """Every batch of the run as packed rows, epoch by epoch."""
    rng = random.Random(seed)
    planned = []
    for _ in range(epochs):
        encoded = tokenizer(render_epoch(corpus, rng), add_special_tokens=False)["input_ids"]
        packed = pack([doc for doc in encoded if len(doc) <= ROW])
        rng.shuffle(packed)
        planned += [packed[i : i + rows] for i in range(0, len(packed) - rows + 1, rows)]
    return planned


def make_optimizers(model: LlamaForCausalLM, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices of the blocks and AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    if not muon:
        return [
            torch.optim.AdamW(
                model.parameters(), lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True
            )
        ]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def schedule(step: int, total: int, warmup: int = 100) -> float:
    """Linear warm-up, then cosine to 2% of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


class Run:
    """One pretraining run over its ``plan``; ``state`` is where it stands between two steps."""

    def __init__(self, model: LlamaForCausalLM, plan: list[Rows], pad: int, muon: bool) -> None:
        self._model, self._plan, self._pad = model, plan, pad
        # On a GPU compiling takes longer than it saves in so few steps.
        self._forward: Any = torch.compile(model) if model.device.type == "cpu" else model
        self._optimizers = make_optimizers(model, muon)
        self._peaks = [[g["lr"] for g in o.param_groups] for o in self._optimizers]
        self.step = self.tokens = 0
        self._loss = torch.zeros((), device=model.device)  # a running mean

    @property
    def loss(self) -> float:
        """The running mean; a GPU is waited for here, and not in a step."""
        return float(self._loss)

    def state(self) -> State:
        return {
            "model": self._model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "progress": [self.step, self.tokens, self.loss],
        }

    def resume(self, state: State) -> None:
        self._model.load_state_dict(state["model"])
        for optimizer, kept in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.tokens, loss = state["progress"]
        self._loss.fill_(loss)

    def finish(self, keep: Keep = lambda state: None) -> int:
        """All steps that are left; returns the number of tokens seen."""
        began, before = time.monotonic(), self.tokens
        while self.step < len(self._plan):
            self._advance(self._plan[self.step])
            if self.step % 50 == 0 or self.step == len(self._plan):
                spent = time.monotonic() - began
                log.info(
                    "step %d/%d  loss %.3f  %.1fM tokens  %.0f tok/s  %.0f s",
                    self.step,
                    len(self._plan),
                    self.loss,
                    self.tokens / 1e6,
                    (self.tokens - before) / spent,
                    spent,
                )
            keep(self.state)
        return self.tokens

    def _advance(self, rows: Rows) -> None:
        factor = schedule(self.step, len(self._plan))
        for optimizer, lrs in zip(self._optimizers, self._peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        loss = self._loss_of(to_batch(rows, self._pad, self._model.device))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        with Products():  # type: ignore[no-untyped-call]  # Muon works in bf16
            for optimizer in self._optimizers:
                optimizer.step()
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._loss.lerp_(loss.detach(), 0.02 if self.step else 1.0)
        self.step += 1
        self.tokens += sum(len(doc) for row in rows for doc in row)

    def _loss_of(self, batch: Batch) -> Tensor:
        place = self._model.device.type
        slow = place == "cpu" and upcast.is_slow(torch.bfloat16)
        with torch.autocast(place, torch.bfloat16, enabled=not slow):
            logits = self._forward(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                use_cache=False,
            ).logits
            return torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100
            )


def train(run: Run, training_checkpoints: TrainingCheckpoints, name: str) -> int:
    """To the end, from where a run of this name stood when its process ended, if one did."""
    if (state := training_checkpoints.find(name)) is not None:
        run.resume(state)
        log.info("going on after step %d", run.step)
    return run.finish(lambda state: training_checkpoints.keep(name, state))


def name_of(plan: list[Rows], *settings: object) -> str:
    """A run by all that it is given: no other goes on from where it stood."""
    return hashlib.sha256(repr((plan, settings)).encode()).hexdigest()


@torch.no_grad()
def fill_unused(model: LlamaForCausalLM, plan: list[Rows]) -> int:
    """Give tokens that pretraining never saw an embedding of their own; returns how many.

    A byte-level BPE keeps the intermediate steps of its merges, and some never occur in the text.
    With tied embeddings training pushes all of them into one point, where none differs from
    another: a fact that needs one could not be learned.  Half of what they share is kept, which
    keeps them unlikely (about 0.5% together where the model is least sure), and each gets a
    random part of its own, half as long as a typical embedding.
    """
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    seen = torch.zeros(len(weight), dtype=torch.bool)
    for rows in plan:
        for row in rows:
            for document in row:
                seen[torch.tensor(document)] = True
    length = weight[seen].float().norm(dim=1).mean()
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
    shared = weight[~seen].float().mean(0)
    weight[~seen] = (0.5 * shared + 0.5 * length * own[~seen]).to(weight.dtype)
    return int((~seen).sum())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=13)
    parser.add_argument("--rows", type=int, default=8, help="packed rows a step")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--width", type=int, default=WIDTH, help=f"a multiple of {2 * HEADS}")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon", action="store_true")
    args = parser.parse_args(argv)
    if args.width < 1 or args.width % (2 * HEADS):
        parser.error(f"--width must be a multiple of {2 * HEADS}, got {args.width}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    corpus = load_corpus(args.data)
    log.info(
        "%d poets and %d relations to learn, %d and %d held out",
        len(corpus.poets),
        len(corpus.relations),
        len(corpus.held_out_poets),
        len(corpus.held_out_relations),
    )
    tokenizer = train_tokenizer(corpus, args.vocabulary, args.seed)
    plan = batches(corpus, tokenizer, args.epochs, args.rows, args.seed)
    model = new_model(tokenizer, args.width, args.layers)
    torch.nn.Module.to(model, args.device)
    size, steps = model.num_parameters() / 1e6, len(plan)
    log.info("%.2fM parameters, %d steps on %s", size, steps, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    training_checkpoints = TrainingCheckpoints(args.out, warn=log.warning)
    name = name_of(plan, model.config.to_json_string(), args.muon, args.seed)
    tokens = train(Run(model, plan, tokenizer.pad_token_id, args.muon), training_checkpoints, name)
    model.cpu()
    log.info("%d tokens were never seen and got an embedding", fill_unused(model, plan))
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record = {
        "parameters": model.num_parameters(),
        "tokens": tokens,
        "steps": len(plan),
        "epochs": args.epochs,
        "seed": args.seed,
        "muon": args.muon,
    }
    (args.out / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.out / "pretrained_poets.txt").write_text(
        "\n".join(p.key for p in corpus.poets) + "\n", encoding="utf-8"
    )
    (args.out / "pretrained_relations.tsv").write_text(
        "".join(f"{r.relation}\t{r.subject}\n" for r in corpus.relations), encoding="utf-8"
    )
    training_checkpoints.clear()


if __name__ == "__main__":
    main()
