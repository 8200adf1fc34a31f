"""Lightning: `python examples/lightning_loop.py MODEL OUTPUT`.

A step has as many passes as its examples need, so the module takes its optimizer steps itself ("manual optimization").
"""

import sys

import lightning
import torch
from docstrings import tokenised_docstrings
from transformers import AutoModelForCausalLM, AutoTokenizer

import packsft


class Packed(lightning.LightningModule):
    def __init__(self, model, data, learning_rate):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.data, self.learning_rate = packsft.prepare(model), data, learning_rate

    def train_dataloader(self):
        return self.data.loader(
            self.trainer.global_rank, self.trainer.world_size, padded=self.model.packing.padded, num_workers=2
        )

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch.to(device)

    def training_step(self, step, index):
        optimizer = self.optimizers()
        for batch in step:
            self.manual_backward(self.model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=0.0)


def main(name, output, *, num_rows=240, batch_size=16, epochs=1, learning_rate=1e-5, dtype=torch.float32):
    rows = tokenised_docstrings(AutoTokenizer.from_pretrained(name), num_rows)
    data = packsft.pack(rows, max_length=1024, batch_size=batch_size, tokens_per_pass=4096)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).train()
    trainer = lightning.Trainer(
        max_epochs=epochs, use_distributed_sampler=False, logger=False, enable_checkpointing=False,
        default_root_dir=output,
    )  # fmt: skip
    trainer.fit(Packed(model, data, learning_rate))
    packsft.unprepare(model).save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:3])
