"""axolotl's own trainer, with the plugin, gives the loss and the gradients of each document alone.

Run where axolotl is installed, which pins older transformers and TRL than packsft's own tests have:
`python -m pytest -o addopts= tests/loops/test_axolotl.py`.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from numerics import error
from tiny import tiny_model, tiny_tokenizer, token_rows

pytest.importorskip("axolotl")

CONFIG = {
    "sequence_len": 64, "pad_to_sequence_len": False, "micro_batch_size": 1, "gradient_accumulation_steps": 2,
    "max_steps": 2, "optimizer": "sgd", "learning_rate": 0.01, "bf16": False, "fp16": False, "tf32": False,
    "attn_implementation": "sdpa", "save_strategy": "no", "seed": 42, "plugins": ["packsft.axolotl"],
}  # fmt: skip


def axolotl_trainer(folder, family, **options):
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import setup_model_and_trainer
    from axolotl.utils.dict import DictDefault

    tiny_model(family).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    with open(folder / "rows.jsonl", "w") as file:
        for row in token_rows(60, max_length=24):
            file.write(json.dumps(row | {"attention_mask": [1] * len(row["input_ids"])}) + "\n")
    own = {
        "base_model": str(folder / "model"), "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": None}],
    }  # fmt: skip
    cfg = load_cfg(DictDefault(CONFIG | own | options))
    return setup_model_and_trainer(cfg, load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))[0]


def alone(model, documents, count):
    """The sum of the losses of documents, each by itself, / count."""
    loss = 0.0
    for ids, labels in documents:
        if len(ids) > 1:
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss = loss + F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100) / count
    return loss


def documents_of_batch(batch):
    if "cu_seq_lens_q" not in batch:
        lengths = batch["row_lengths"].tolist()
        parts = zip(batch["input_ids"], batch["labels"], lengths, strict=True)
        return [(ids[:length], labels[:length]) for ids, labels, length in parts]
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    return list(zip(batch["input_ids"][0].split(lengths), batch["labels"][0].split(lengths), strict=True))


@pytest.mark.parametrize("options", [
    {"sample_packing": True}, {"sample_packing": True, "pad_to_sequence_len": True}, {"micro_batch_size": 6},
    {"sample_packing": True, "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj"],
     "lora_dropout": 0.0, "lora_qkv_kernel": False, "lora_o_kernel": False, "lora_mlp_kernel": False},
], ids=str)  # fmt: skip
def test_a_step_is_that_of_documents_alone(options, tmp_path):
    trainer = axolotl_trainer(tmp_path, "llama", **options)
    model = trainer.model.double()
    trainer.model_wrapped = model
    batches, num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, trainer.args.device)
    assert len(batches) == 2
    assert num_items is None  # axolotl weighs micro-batches, not tokens
    expected = found = 0.0
    for batch in batches:
        documents = documents_of_batch(batch)
        expected += alone(model, documents, sum((labels[1:] != -100).sum() for _, labels in documents)) / 2
    expected.backward()
    truth = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    for batch in batches:
        found += trainer.compute_loss(model, batch) / 2
    found.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    assert error(grads, truth) < 1e-10


def test_training_lowers_the_loss(tmp_path):
    trainer = axolotl_trainer(tmp_path, "llama", sample_packing=True, max_steps=12, learning_rate=0.5, logging_steps=1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
