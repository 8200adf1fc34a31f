"""Dataset packing over epochs: other examples meet, as many packs, nothing lost, ranks balanced."""

import numpy as np
import pytest
import torch
from runs import losses, trainer
from tiny import token_rows

from packsft.packing import attention_costs, cost_imbalance, cut_examples, pack_segments

BEST_FIT = {"packing_strategy": "bfd", "max_length": 32, "per_device_train_batch_size": 1}


def tokens_of(items):
    return [document.input_ids for item in items for document in item]


def test_each_epoch_has_its_own_packs_as_many_and_every_example_in_them(tmp_path):
    rows = token_rows(300)
    packs = trainer(tmp_path, train_dataset=rows, **BEST_FIT).train_dataset
    expected, plans, lengths = sorted(tuple(row["input_ids"]) for row in rows), [], set()
    for epoch in (0, 1, 2, 1):
        packs.set_epoch(epoch)
        plans.append(packs.plan.fingerprint)
        lengths.add(len(packs))
        assert sorted(map(tuple, tokens_of(packs.packs()))) == expected
        assert packs.lengths.max() <= 32
    assert len(lengths) == 1
    assert len(set(plans)) == 3
    assert plans[1] == plans[3]


@pytest.mark.parametrize("seed", range(20))
def test_any_seed_can_have_as_many_packs_as_another(seed):
    rng = np.random.default_rng(seed)
    segments = cut_examples(rng.integers(1, rng.integers(2, 60), rng.integers(1, 60)), 64, strategy="bfd_split")
    most = max(len(pack_segments(segments)[0]), len(pack_segments(segments, seed=0)[0]))
    for other in range(1, 6):
        plan, order = pack_segments(segments, seed=other, num_packs=most)
        assert len(plan) == most
        assert sorted(order) == list(range(len(segments)))
        assert all(plan.seq_lengths(i).sum() <= 64 for i in range(most))


def test_a_number_of_packs_that_cannot_be_is_named():
    segments = cut_examples([30, 30, 30], 64)
    for impossible in (1, 4):
        with pytest.raises(ValueError, match=f"num_packs={impossible}: the plan has 2 packs"):
            pack_segments(segments, num_packs=impossible)


def test_the_loader_takes_every_pack_once_in_a_balanced_order(tmp_path):
    rows = token_rows(600, max_length=64)
    ours = trainer(tmp_path, train_dataset=rows, **BEST_FIT | {"max_length": 64, "per_device_train_batch_size": 4})
    loader, packs = ours.get_train_dataloader(), ours.train_dataset
    for epoch in range(2):
        loader.set_epoch(epoch)
        order = [pack for batch in loader.batch_sampler for at, pack in batch if at == epoch]
        assert sorted(order) == list(range(len(packs)))
        costs = attention_costs(packs.plan)
        assert cost_imbalance(costs[order], 4) < 1.1 < cost_imbalance(costs, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_that_outlive_an_epoch_pack_the_next_one(workers, tmp_path):
    options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    ours = trainer(tmp_path, train_dataset=token_rows(60), **BEST_FIT | options)
    loader, seen = ours.get_train_dataloader(), []
    for epoch in range(3):
        loader.set_epoch(epoch)
        rows = [batch["input_ids"][0].tolist() for batch in loader]
        assert sum(map(len, rows)) == sum(len(row["input_ids"]) for row in token_rows(60))
        seen.append(rows)
    assert seen[0] != seen[1] != seen[2]
    if workers:
        again = trainer(tmp_path, train_dataset=token_rows(60), **BEST_FIT).get_train_dataloader()
        for epoch in range(3):
            again.set_epoch(epoch)
            assert [batch["input_ids"][0].tolist() for batch in again] == seen[epoch]


def test_a_run_resumes_in_the_middle_of_the_second_epoch(tmp_path):
    options = BEST_FIT | {"num_train_epochs": 2, "save_strategy": "steps", "train_dataset": token_rows(60)}
    whole = trainer(tmp_path / "whole", save_steps=1, **options)
    whole.train()
    stop = whole.state.global_step * 3 // 4
    resumed = trainer(tmp_path / "resumed", save_steps=100, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert losses(resumed) == losses(whole)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
