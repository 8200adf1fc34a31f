"""Script for the tests of several ranks: trains a tiny GPT-2, several times, and saves weights and losses.

usage: train_tiny.py OUTPUT_FILE RUNS, with RUNS as JSON: names, and options of the configuration (and `dtype`,
`lora_on_head`, `adalora`).
"""

import json
import sys
import tempfile

import torch
from accelerate import PartialState
from peft import AdaLoraConfig, LoraConfig
from runs import config, losses
from tiny import tiny_model, tiny_tokenizer, token_rows

from packsft import PackedSFTTrainer


class Recording(PackedSFTTrainer):
    """Adds up what `training_step` returns, by optimizer step: the logged losses are summed in float32."""

    step_losses: dict

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        step = self.state.global_step
        self.step_losses[step] = self.step_losses.get(step, 0.0) + loss.double()
        return loss


def trained(options):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["c_attn", "lm_head"]) if options.pop("lora_on_head", False) else None
    if options.pop("adalora", False):
        lora = AdaLoraConfig(init_r=4, total_step=100, target_modules=["c_attn"])
    ours = Recording(
        model=tiny_model("gpt2", getattr(torch, options.pop("dtype", "float64"))),
        peft_config=lora,
        args=config(tempfile.mkdtemp(), **options),
        train_dataset=token_rows(64),
        eval_dataset=token_rows(9, seed=5),
        processing_class=tiny_tokenizer(),
    )
    ours.step_losses = {}
    ours.train()
    evaluated = ours.evaluate()
    predicted = ours.predict(ours.eval_dataset).label_ids
    logged = [entry for entry in ours.state.log_history if "entropy" in entry][-1]
    return {
        "weights": {name: p.detach() for name, p in ours.accelerator.unwrap_model(ours.model).named_parameters()},
        "losses": losses(ours),
        "step_losses": ours.accelerator.reduce(torch.stack(list(ours.step_losses.values())), reduction="mean"),
        "steps": ours.state.global_step,
        "predicted": int((predicted != -100).sum()),
        "history": {key: logged[key] for key in ("num_tokens", "entropy", "mean_token_accuracy")},
        "evaluated": {key: evaluated[f"eval_{key}"] for key in ("loss", "entropy", "mean_token_accuracy")},
    }


results = {name: trained(options) for name, options in json.loads(sys.argv[2]).items()}
if PartialState().is_main_process:
    torch.save(results, sys.argv[1])
PartialState().wait_for_everyone()  # a rank that aborts below ends the others
PartialState().destroy_process_group()  # gloo's threads, still running at the end, now and then abort the process
