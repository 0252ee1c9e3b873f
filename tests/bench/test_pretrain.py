"""The script that makes the embedded model: what it holds out, how it packs, which sizes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvedit.errors import OutOfTimeError
from kvedit.training.resume import TrainingCheckpoints
from tests.bench import pretrain
from tests.bench.bench_data import write_data

documents = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=pretrain.ROW), max_size=60)


@given(documents)
def test_every_document_is_packed_once_and_whole(packed: list[list[int]]) -> None:
    rows = pretrain.pack(packed)
    assert sorted(doc for row in rows for doc in row) == sorted(packed)
    assert all(sum(map(len, row)) <= pretrain.ROW for row in rows)


def test_a_document_sees_itself_up_to_here_and_no_other() -> None:
    batch = pretrain.to_batch([[[1, 2, 3], [4, 5]]], pad=0)
    seen = batch.mask[0, 0] == 0
    assert seen[2].nonzero().flatten().tolist() == [0, 1, 2]
    assert seen[4].nonzero().flatten().tolist() == [3, 4]
    assert batch.positions[0, :5].tolist() == [0, 1, 2, 0, 1]
    assert batch.labels[0, :6].tolist() == [-100, 2, 3, -100, 5, -100]  # no first token, no padding


def test_what_is_held_out_depends_on_the_name_alone(tmp_path: Path) -> None:
    names = [f"name {number}" for number in range(2000)]
    held = [name for name in names if pretrain.is_held_out(name, 0.3)]
    assert 0.25 < len(held) / len(names) < 0.35
    data = write_data(tmp_path)
    corpus = pretrain.load_corpus(data)
    assert {p.key for p in corpus.poets} | set(corpus.held_out_poets) == {
        json.loads(line)["key"] for line in (data / "poets.jsonl").read_text("utf-8").splitlines()
    }
    assert not {p.key for p in corpus.poets} & set(corpus.held_out_poets)


def test_the_rate_rises_and_falls() -> None:
    rates = [pretrain.schedule(step, 1000) for step in range(1000)]
    assert rates[99] == 1.0 == max(rates) and rates[0] == 0.01
    assert rates[99:] == sorted(rates[99:], reverse=True)
    assert rates[-1] == pytest.approx(0.02, abs=1e-4)


class Words:
    """As much of a tokenizer as a model is made from."""

    bos_token_id = eos_token_id = 0
    pad_token_id = 1

    def __len__(self) -> int:
        return 50


@pytest.mark.parametrize("width", [16, 64])
def test_a_model_of_any_size(width: int) -> None:
    model = pretrain.new_model(Words(), width, 2)  # type: ignore[arg-type]
    block = 4 * width * width + 3 * width * 4 * width + 2 * width
    assert model.num_parameters() == 50 * width + 2 * block + width
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 50)


def test_tokens_that_were_never_seen_can_be_told_apart() -> None:
    model = pretrain.new_model(Words(), 16, 1)  # type: ignore[arg-type]
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[10:] = weight[10]  # all in one point
    before = weight[:10].detach().clone()
    assert pretrain.fill_unused(model, [[[list(range(10))]]]) == 40
    assert torch.equal(weight[:10], before)
    apart = torch.pdist(weight[10:].detach().float())
    assert float(apart.min()) > 0.1 * float(before.norm(dim=1).mean())


PLAN = [[[[step, 3, 4, 5, 6]], [[7, 8, step]]] for step in range(10, 16)]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[pretrain.Run, torch.nn.Module]]:
    """A new run over the same plan each time, from other weights than the last, not compiled."""
    monkeypatch.setattr(torch, "compile", lambda model: model)

    def make() -> tuple[pretrain.Run, torch.nn.Module]:
        model = pretrain.new_model(Words(), 16, 1)  # type: ignore[arg-type]
        return pretrain.Run(model, PLAN, pad=1, muon=True), model

    return make


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    run: Callable[[], tuple[pretrain.Run, torch.nn.Module]], tmp_path: Path
) -> None:
    whole, expected = run()
    begun = copy.deepcopy(whole.state())
    assert whole.finish() == 8 * len(PLAN)

    stopped, _ = run()
    stopped.resume(begun)
    with pytest.raises(OutOfTimeError):  # keeps where it stands, then ends
        pretrain.train(stopped, TrainingCheckpoints(tmp_path, deadline=0.0), "a run")
    assert stopped.step == 1

    resumed, model = run()
    assert pretrain.train(resumed, TrainingCheckpoints(tmp_path), "a run") == 8 * len(PLAN)
    assert (resumed.step, resumed.loss) == (whole.step, whole.loss)
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


def test_another_run_does_not_go_on_from_it() -> None:
    assert pretrain.name_of(PLAN, "shape", 0) == pretrain.name_of(list(PLAN), "shape", 0)
    assert len({pretrain.name_of(*given) for given in ((PLAN, 0), (PLAN, 1), (PLAN[1:], 0))}) == 3


def test_a_width_that_heads_do_not_divide_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        pretrain.main(["--data", str(tmp_path), "--out", str(tmp_path / "m"), "--width", "100"])
    assert "--width must be a multiple of 8, got 100" in capsys.readouterr().err


@pytest.mark.slow
def test_it_makes_a_model_that_can_be_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data, out = write_data(tmp_path), tmp_path / "made"
    sizes = ["--width", "32", "--layers", "2", "--vocabulary", "400", "--epochs", "2"]
    pretrain.main(["--data", str(data), "--out", str(out), "--rows", "1", "--threads", "1", *sizes])
    model, tokenizer = (kind.from_pretrained(out) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.hidden_size == 32 and len(tokenizer) <= 400
    record = json.loads((out / "pretraining.json").read_text())
    assert record["parameters"] == model.num_parameters() and record["epochs"] == 2
    listed = (out / "pretrained_poets.txt").read_text("utf-8").split()
    assert listed == [p.key for p in pretrain.load_corpus(data).poets]
