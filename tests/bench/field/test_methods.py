"""Every method on a case with a known result, on the small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvedit.errors import UsageError
from kvedit.model.prompts import Example
from tests.bench.field.conftest import changed, weights
from tests.bench.field.descent import answer_loss, last_prompt_token_loss
from tests.bench.field.layers import at_keys, layer_at, mlp_out, placed, second_moments
from tests.bench.field.method import BATCH, METHODS, SEQUENTIAL, Setup, examples, method
from tests.bench.field.methods.memit import Memit
from tests.bench.field.methods.ultraedit import Running
from tests.bench.field.records import Record
from tests.bench.field.run import answered

DOWN = "model.layers.{}.mlp.down_proj.weight"
TRAINED = ("lora", "full", "last-blocks", "adapter", "lora-fixed")


def test_all_methods_are_there_and_say_what_they_cost() -> None:
    example = Example(tuple(range(40)), 30)
    for name in METHODS:
        one = method(name)(setup=Setup(model=None, folder=Path()))
        assert one.ways and set(one.ways) <= {SEQUENTIAL, BATCH}
        assert "setup" not in one.settings()
        passes = one.passes(example)
        assert passes is None if name == "kvedit" else passes is not None
    with pytest.raises(UsageError, match="no method 'magic'"):
        method("magic")


@pytest.mark.parametrize("name", TRAINED)
def test_what_trains_to_recall_answers_a_fact(name: str, make: Any, records: list[Record]) -> None:
    one, asked = make(name)
    before, state = weights(asked), torch.random.get_rng_state()
    assert not answered(asked, records[0])
    asked = one.edit(asked, records[:1])
    assert answered(asked, records[0])
    assert torch.equal(state, torch.random.get_rng_state())
    assert not asked.model.training and not any(p.requires_grad for p in asked.model.parameters())
    new = set(asked.model.state_dict()) - set(before)
    if name == "last-blocks":
        assert {n.split(".")[2] for n in changed(before, asked)} == {"2", "3"} and not new
    elif name == "adapter":
        old = {n.replace(".mlp.inner.", ".mlp."): n for n in asked.model.state_dict()}
        after = asked.model.state_dict()
        assert all(torch.equal(before[n], after[old[n]]) for n in before), "no weight has changed"
    elif name == "lora-fixed":
        assert all("lora" in n or "base_layer" in n for n in new)
    else:
        assert changed(before, asked) and not new


def test_the_notebooks_loop_pads_adds_up_and_merges(make: Any, records: list[Record]) -> None:
    one, asked = make("notebook", width=48, max_epochs=20, patience=3)
    row = examples(asked, records[:1])[0]
    assert one._padded(row, asked.model.device)["labels"].shape == (1, 48)
    before = weights(asked)
    loss = float(answer_loss(asked.model, [row]))
    asked = one.edit(asked, records[:1])
    assert float(answer_loss(asked.model, [row])) < loss / 2
    assert {n.split(".")[-2] for n in changed(before, asked)} == {"q_proj", "v_proj"}
    assert not hasattr(asked.model, "peft_config")


def test_a_bound_holds_every_weight_of_the_one_matrix(make: Any, records: list[Record]) -> None:
    name = DOWN.format(layer_at(make("ft-l")[1].model, 21 / 32))
    moved = {}
    for kind in ("ft-l", "ft-m"):
        one, asked = make(kind, learning_rate=2e-3)
        before, rows = weights(asked), examples(asked, records[:1])
        loss = last_prompt_token_loss if kind == "ft-l" else answer_loss
        at_first = float(loss(asked.model, rows))
        asked = one.edit(asked, records[:1])
        assert changed(before, asked) == {name}
        assert float(loss(asked.model, rows)) < at_first
        moved[kind] = float((asked.model.state_dict()[name] - before[name]).abs().max())
    assert moved["ft-l"] == pytest.approx(5e-4, rel=0.01) and moved["ft-m"] > 5e-4


def test_the_loss_at_the_prompts_last_token_is_a_cross_entropy_there(
    make: Any, records: list[Record]
) -> None:
    _, asked = make("ft-l")
    row = examples(asked, records[:1])[0]
    logits = asked.model(torch.tensor([row.ids[: row.start]])).logits[0, -1]
    targets = torch.tensor(row.ids[row.start :])
    expected = torch.nn.functional.cross_entropy(logits.expand(len(targets), -1), targets)
    assert float(last_prompt_token_loss(asked.model, [row])) == pytest.approx(
        float(expected), abs=1e-3
    )


def test_breadth_first_learns_all_facts_with_one_matrix(make: Any, records: list[Record]) -> None:
    one, asked = make("locft-bf", learning_rate=5e-3, max_epochs=60)
    before = weights(asked)
    asked = one.edit(asked, records)
    assert all(answered(asked, record) for record in records)
    assert changed(before, asked) == {DOWN.format(layer_at(asked.model, 22 / 32))}


def test_rome_writes_the_value_at_the_key_by_a_matrix_of_rank_one(
    make: Any, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.bench.field.methods import rome

    one, asked = make("rome", contexts=0)
    wanted = torch.randn(64, generator=torch.Generator().manual_seed(0))
    matrix = mlp_out(asked.model, layer_at(asked.model, one.depth))
    row = placed(asked, records[0], [""])
    monkeypatch.setattr(
        rome, "wanted_value", lambda a, m, r, rows, s: (at_keys(a.model, m, rows[:1])[1][0], wanted)
    )
    before = matrix.weight.detach().clone()
    one.edit(asked, records[:1])
    delta = (matrix.weight - before).double()
    assert torch.linalg.matrix_rank(delta, rtol=1e-3) == 1
    assert torch.allclose(at_keys(asked.model, matrix, row)[1][0], wanted, atol=1e-3)


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit"])
def test_the_value_makes_the_answer_come(name: str, make: Any, records: list[Record]) -> None:
    one, asked = make(name)
    before = weights(asked)
    asked = one.edit(asked, records[:1])
    assert answered(asked, records[0])
    names = {name.split(".")[-2] for name in changed(before, asked)}
    assert names == {"down_proj"}


def random_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Second moment (12, 12), keys (3, 12), what is missing (3, 5)."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = draw(200, 12)
    return inputs.T @ inputs / 200, draw(3, 12), draw(3, 5)


def test_memits_update_is_the_least_of_its_two_costs() -> None:
    moment, keys, missing = random_case()
    one = Memit(setup=Setup(model=None, folder=Path()), weight=2.0)
    one._moments = [moment]
    update = one.update(0, keys, missing).requires_grad_()
    cost = 2.0 * 12 * torch.trace(update @ moment @ update.T)
    cost = cost + (update @ keys.T - missing.T).pow(2).sum()
    gradient = torch.autograd.grad(cost, update)[0]
    assert gradient.abs().max() < 1e-9


def test_alphaedits_update_leaves_what_inputs_do_and_what_was_edited() -> None:
    from tests.bench.field.methods.alphaedit import AlphaEdit

    _, keys, missing = random_case()
    seen = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 12, dtype=torch.float64)
    one = AlphaEdit(setup=Setup(model=None, folder=Path()), energy=1e-9, ridge=1e-6)
    one._moments = [one.prepared(seen.T @ seen / 50)]
    assert one.notes() == {"directions in the null space": [6]}
    update = one.update(0, keys[:2], missing[:2])
    assert (update @ seen.T).abs().max() < 1e-6, "outputs on text stay"
    assert torch.allclose(update @ keys[:2].T, missing[:2].T, atol=1e-3)
    one.remember([keys[:2]])
    later = one.update(0, keys[2:], missing[2:])
    assert (later @ keys[:2].T).abs().max() < (later @ keys[2:].T).abs().max() / 100


def test_second_moments_are_those_of_all_tokens(make: Any) -> None:
    _, asked = make("rome")
    matrix = mlp_out(asked.model, 1)
    texts = [(5, 6, 7), (8, 9), (7, 8, 9, 10)]
    seen: list[torch.Tensor] = []
    handle = matrix.register_forward_hook(lambda _, i, o: seen.append(i[0][0]))
    for text in texts:
        asked.model(torch.tensor([text]))
    handle.remove()
    rows = torch.cat(seen).double()
    moment = second_moments(asked.model, [matrix], texts)[0]
    assert torch.allclose(moment, rows.T @ rows / 9, atol=1e-5)


def test_running_statistics_are_those_of_all_rows() -> None:
    rows = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)) * 3 + 1
    running = Running()
    for at in (0, 1, 15):
        running.update(rows[at : {0: 1, 1: 15, 15: 40}[at]])
    expected = (rows - rows.mean(0)) / rows.std(0)
    assert torch.allclose(running.normalised(rows), expected, atol=1e-4)


def test_ultraedit_solves_its_ridge_regression_and_lowers_the_loss(
    make: Any, records: list[Record]
) -> None:
    one, asked = make("ultraedit", rate=0.05)
    rows, before = examples(asked, records), weights(asked)
    loss = float(answer_loss(asked.model, rows))
    asked = one.edit(asked, records)
    assert float(answer_loss(asked.model, rows)) < loss
    assert {name.split(".")[-2] for name in changed(before, asked)} == {"gate_proj", "up_proj"}
    inputs, gradients = torch.randn(5, 64), torch.randn(5, 128)
    one._running = {(64, 128): (running := Running())}
    running.update(torch.randn(30, 192))
    update = one._update(inputs, gradients)
    near, wanted = running.normalised(torch.cat([inputs, gradients], 1)).split([64, 128], 1)
    values = -0.05 / 64 * near.pow(2).sum(1, keepdim=True) * wanted
    residual = inputs.T @ (inputs @ update.T - values) + update.T
    assert residual.abs().max() < 1e-4


SOFT = ("prompt-tuning", "prefix-tuning", "p-tuning", "p-tuning-v2")


@pytest.mark.parametrize("name", SOFT)
def test_a_trained_prompt_learns_and_leaves_the_weights(
    name: str, make: Any, records: list[Record]
) -> None:
    one, asked = make(name, virtual_tokens=4)
    assert one.ways == (BATCH,)
    before = weights(asked)
    plain = asked.answers(["What is amber lamp?"], 20)
    edited = one.edit(asked, records[:1])
    assert edited.answers(records[0].prompts, 20) == [records[0].target]
    base = edited.model.get_base_model().state_dict()
    assert all(torch.equal(before[key], base[key]) for key in before)
    row = edited.forced([(records[0].prompts[0], records[0].target)])[0]
    assert row.predicted == row.tokens, "teacher-forced and generated agree"
    assert plain == asked.answers(["What is amber lamp?"], 20), "the base model is as before"


def test_prompts_of_any_length_are_asked_alike(make: Any, records: list[Record]) -> None:
    one, asked = make("p-tuning-v2", virtual_tokens=4, max_epochs=2)
    edited = one.edit(asked, records)
    prompts = [p for record in records for p in (*record.prompts, *record.paraphrases)]
    alone = [edited.answers([prompt], 20)[0] for prompt in prompts]
    assert edited.answers(prompts, 20) == alone


def test_the_text_in_the_prompt_and_the_oldest_left_out(make: Any, records: list[Record]) -> None:
    one, asked = make("in-context")
    edited = one.edit(one.edit(asked, records[:1]), records[1:])
    whole = edited.rewrite("What is it?")
    assert all(f"{record.prompts[0]} {record.target}" in whole for record in records)
    assert whole.endswith("\nWhat is it?") and one.notes() == {"facts that did not fit": 0}
    edited = one.edit(edited, records)
    short = edited.rewrite("What is it?")
    assert records[2].target in short and len(asked.renderer.prefix(short)) <= 192 - 64
    assert one.notes()["facts that did not fit"] > 0


def test_only_texts_whose_key_is_asked_for_are_put_into_the_prompt(
    make: Any, records: list[Record]
) -> None:
    one, asked = make("retrieval")
    edited = one.edit(asked, records)
    assert edited.rewrite("What is amber lamp?") == "What is amber lamp?"
    found = edited.rewrite("Where is the Tide Lantern kept?")
    assert records[0].target in found and records[1].target not in found


def test_kvedits_gate_does_not_see_what_will_be_asked(records: list[Record]) -> None:
    from tests.bench.field.methods.kvedit_store import trained_fact

    fact = trained_fact(records[0])
    assert (fact.key, fact.description) == (records[0].key, records[0].target)
    assert fact.prompts == records[0].fact.prompts and not fact.paraphrases and not fact.locality


def test_kvedit_edits_a_store_and_goes_on_in_it(
    make: Any, records: list[Record], empty_store: Path, tmp_path: Path
) -> None:
    assert empty_store == tmp_path / "store"
    one, asked = make("kvedit")
    asked = one.edit(asked, records[:1])
    assert answered(asked, records[0]) and one.notes()["outcomes"] == {"committed": 1}
    one.close()
    again, asked = make("kvedit")
    assert answered(asked, records[0])
    again.edit(asked, records[:1])
    assert again.notes()["outcomes"] == {"unchanged": 1}
    again.close()
