"""Five literal rows through every stop, from tokens to gradient, each with a value that can be checked by hand.

At 8 tokens a pack, lengths 5, 2, 3, 1 and 4 give two packs that both hold two documents, one full and one with room
left; row 3, of one token, has nothing to score. `docs/how-it-works.md` walks the same rows and is run here.
"""

import doctest
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from packsft_kernels import reference, varlen_attention
from runs import trainer
from tiny import ROWS, tiny_model

from packsft import PackedSFTTrainer, plan_packs
from packsft.step.normalization import items_in_step

HOW_IT_WORKS = Path(__file__).parents[1] / "docs" / "how-it-works.md"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> PackedSFTTrainer:
    """The rows as the trainer takes them: two packs, one optimizer step of two micro-steps, in float64."""
    return trainer(
        tmp_path_factory.mktemp("tour"), model=tiny_model("gpt2", dtype=torch.float64),
        train_dataset=Dataset.from_list(ROWS), max_length=8, packing_strategy="bfd",
        train_sampling_strategy="sequential", per_device_train_batch_size=1, gradient_accumulation_steps=2,
        num_train_epochs=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def batches(packed):
    return [packed.data_collator([packed.train_dataset.pack(i)]) for i in range(2)]


def test_rows_to_plan():
    plan = plan_packs([len(row["input_ids"]) for row in ROWS], 8)
    assert [plan[i].tolist() for i in range(len(plan))] == [[0, 2], [4, 1, 3]]


def test_the_trainer_leaves_out_the_row_without_a_scored_token(packed):
    plan = packed.train_dataset.plan
    assert [plan[i].tolist() for i in range(len(plan))] == [[0, 2], [4, 1]]
    account = packed.packing_report.account
    assert (account.examples_in, account.examples_packed, account.examples_unscored) == (5, 4, 1)
    assert (account.tokens_in, account.tokens_kept, account.tokens_lost) == (15, 14, 1)
    assert packed.packing_report.fill == 14 / 16


def test_plan_to_packs(packed):
    packs = [[(d.input_ids.tolist(), d.labels.tolist()) for d in pack] for pack in packed.train_dataset.packs()]
    assert packs == [
        [([3, 4, 5, 6, 1], [-100, -100, 5, 6, 1]), ([8, 9, 1], [-100, 9, 1])],
        [
            ([11, 12, 13, 1], [-100, -100, 13, 1]),
            ([7, 1], [-100, 1]),
        ],  # the first label of a row, here 7, is gone
    ]


def test_packs_to_batches(batches):
    first, second = ({k: v.tolist() if hasattr(v, "tolist") else v for k, v in batch.items()} for batch in batches)
    assert first == {
        "input_ids": [[3, 4, 5, 6, 1, 8, 9, 1]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2]],
        "seq_idx": [[0, 0, 0, 0, 0, 1, 1, 1]],
        "cu_seq_lens_q": [0, 5, 8],
        "cu_seq_lens_k": [0, 5, 8],
        "max_length_q": 5,
        "max_length_k": 5,
        "labels": [[-100, -100, 5, 6, 1, -100, 9, 1]],
        "loss_rows": [1, 2, 3, 5, 6],
        "loss_targets": [5, 6, 1, 9, 1],
        "num_items": 5,
        "num_scored": 5,
        "num_tokens": 8,
        "num_documents": 2,
        "rows": [0, 2],
    }
    assert second == {
        "input_ids": [[11, 12, 13, 1, 7, 1]],
        "position_ids": [[0, 1, 2, 3, 0, 1]],
        "seq_idx": [[0, 0, 0, 0, 1, 1]],
        "cu_seq_lens_q": [0, 4, 6],
        "cu_seq_lens_k": [0, 4, 6],
        "max_length_q": 4,
        "max_length_k": 4,
        "labels": [[-100, -100, 13, 1, -100, 1]],
        "loss_rows": [1, 2, 4],
        "loss_targets": [13, 1, 1],
        "num_items": 3,
        "num_scored": 3,
        "num_tokens": 6,
        "num_documents": 2,
        "rows": [4, 1],
    }


@pytest.mark.parametrize("attend", [varlen_attention, reference.varlen_attention], ids=["fast", "reference"])
def test_batch_to_mask(batches, attend):
    # equal scores, and values that say which key they come from: row t is token t's attention weights
    equal, one_hot = torch.zeros(8, 1, 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)[:, None]
    weights = attend(equal, equal, one_hot, batches[0]["cu_seq_lens_q"], 5)[:, 0]
    a, b, c, d, e = 1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5  # each token's weight is shared by those that it sees
    expected = [
        [a, 0, 0, 0, 0, 0, 0, 0],
        [b, b, 0, 0, 0, 0, 0, 0],
        [c, c, c, 0, 0, 0, 0, 0],
        [d, d, d, d, 0, 0, 0, 0],
        [e, e, e, e, e, 0, 0, 0],
        [0, 0, 0, 0, 0, a, 0, 0],
        [0, 0, 0, 0, 0, b, b, 0],
        [0, 0, 0, 0, 0, c, c, c],
    ]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0.0)


def test_batches_to_denominator(batches):
    assert [batch["num_scored"] for batch in batches] == [5, 3]
    assert items_in_step(batches, accelerator=None, across_ranks=False) == 8


def test_a_model_without_knowledge_has_the_loss_of_a_guess(packed, batches):
    # with a head of zeros all 24 words are equally likely: 5 and 3 of the step's 8 tokens cost log(24) each
    head = packed.model.get_output_embeddings().weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.zero_()
        losses = [packed.compute_loss(packed.model, batch, num_items_in_batch=8).item() for batch in batches]
        head.copy_(kept)
    assert losses == pytest.approx([5 / 8 * math.log(24), 3 / 8 * math.log(24)], rel=1e-12)


def test_two_packs_at_an_accumulation_of_two_are_one_optimizer_step(packed):
    # unpacked, the four examples with something to score would be two
    assert (packed.packing_report.steps_packed, packed.packing_report.steps_unpacked) == (1, 2)
    micro_batches, num_items = packed.get_batch_samples(iter(packed.get_train_dataloader()), 2, packed.args.device)
    assert (len(micro_batches), num_items) == (2, 8)


def test_two_exact_steps_take_two_examples_each_and_pack_those(tmp_path):
    # in order: rows 0 and 1 are 7 tokens and one pass of 8; rows 2 and 4 are 7 more. Row 3 has nothing to score.
    ours = trainer(
        tmp_path, train_dataset=Dataset.from_list(ROWS), max_length=8, train_sampling_strategy="sequential",
        per_device_train_batch_size=1, gradient_accumulation_steps=2, num_train_epochs=1,
    )  # fmt: skip
    seen = []
    walk = ours._passes.walk
    ours._passes.walk = lambda model, step, num_items: seen.append((step, num_items)) or walk(model, step, num_items)
    ours.train()
    assert ours.state.global_step == 2
    tokens = [[batch["input_ids"].flatten().tolist() for batch in step["passes"]] for step, _ in seen]
    assert tokens == [[[3, 4, 5, 6, 1, 7, 1]], [[11, 12, 13, 1, 8, 9, 1]]]
    assert [num_items for _, num_items in seen] == [3 + 1, 2 + 2]


def test_the_gradients_of_the_micro_batches_add_up_to_those_of_the_rows_alone(packed, batches):
    # the truth: plain transformers, one row at a time, the labels shifted by hand
    alone = tiny_model("gpt2", dtype=torch.float64)
    for row in ROWS:
        logits = alone(torch.tensor([row["input_ids"]])).logits[0]
        (F.cross_entropy(logits[:-1], torch.tensor(row["labels"])[1:], reduction="sum") / 8).backward()
    for batch in batches:
        packed.compute_loss(packed.model, batch, num_items_in_batch=8).backward()
    allowed = 1e-12 * max(p.grad.abs().max() for p in alone.parameters())
    for (name, ours), truth in zip(packed.model.named_parameters(), alone.parameters(), strict=True):
        assert (ours.grad - truth.grad).abs().max() <= allowed, name


def test_the_tensors_of_how_it_works_are_the_real_ones():
    text = re.sub(r"^```.*$", "", HOW_IT_WORKS.read_text(), flags=re.M)  # a closing fence would count as output
    page = doctest.DocTestParser().get_doctest(text, {}, HOW_IT_WORKS.name, str(HOW_IT_WORKS), 0)
    failures: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(page, out=failures.append, clear_globs=False)
    assert results.attempted > 40
    assert not failures, "".join(failures)
    assert page.globs["rows"] == ROWS
