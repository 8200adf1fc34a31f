"""Script for the tests of several ranks: trains tiny vision-language models on rows with pictures.

usage: pictures_tiny.py OUTPUT_FILE RUNS, with RUNS as JSON: names, and options of the configuration, with `family`.
"""

import json
import sys
import tempfile

import torch
from accelerate import PartialState
from runs import config, losses, save_and_end
from vision import rows_with_pictures, vision_model

from packsft import PackedSFTTrainer

RUN = {"max_steps": 4, "optim": "sgd", "tokens_per_pass": 128, "per_device_eval_batch_size": 2, "use_cpu": True}


def run(family, **options):
    model, processor, asks = vision_model(family)
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    ours = PackedSFTTrainer(
        model, config(tempfile.mkdtemp(), **RUN | {"max_length": 256} | options),
        train_dataset=rows_with_pictures(20, asks), eval_dataset=rows_with_pictures(7, asks, seed=1),
        processing_class=processor,
    )  # fmt: skip
    ours.train()
    moved = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) - before
    return {"moved": moved, "losses": losses(ours), "evaluation": ours.evaluate()["eval_loss"]}


PartialState(cpu=True)
save_and_end({name: run(**options) for name, options in json.loads(sys.argv[2]).items()}, sys.argv[1])
