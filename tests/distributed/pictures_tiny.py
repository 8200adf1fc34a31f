"""Script for the tests of several ranks: trains tiny vision-language models on rows with pictures.

usage: pictures_tiny.py OUTPUT_FILE RUNS, with RUNS as JSON: names, and options of the configuration, with `family` and
`dtype` of the model, the `engine` that spreads it ("fsdp2", "zero2", "zero3"; "at load": transformers' FSDP2), and
`folder`, where a run without an engine saves the model for those with one. With `sparse`, most passes have no picture;
with `streams`, the rows are streams; with `each_alone`, Llava's projector runs once for each picture. `frozen` names a
part of the model.
"""

import json
import sys
import tempfile

import torch
from accelerate import PartialState
from runs import config, losses, save_and_end
from transformers.distributed import DistributedConfig
from vision import rows_with_pictures, vision_model

from packsft import PackedSFTTrainer
from packsft.compat import engine_fields, engine_on_cpu, whole_parameters

RUN = {"max_steps": 4, "optim": "sgd", "tokens_per_pass": 128, "per_device_eval_batch_size": 2, "use_cpu": True}


def rows(count, asks, sparse, streams, seed=0):
    drawn = rows_with_pictures(3 * count if sparse else count, asks, seed)
    if sparse:
        drawn = drawn.filter(lambda row, number: number % 9 == 0 or not row["images"], with_indices=True)
    return drawn.to_iterable_dataset(num_shards=2) if streams else drawn


def layers_of(model):
    classes = {type(module).__name__ for module in model.modules()}
    return sorted(classes & set(model._no_split_modules))


class EachAlone(torch.nn.Module):
    def __init__(self, projector):
        super().__init__()
        self.projector = projector

    def forward(self, pictures):
        return torch.stack([self.projector(picture) for picture in pictures])


def run(
    family,
    engine="",
    dtype="float64",
    folder=None,
    sparse=False,
    frozen=None,
    each_alone=False,
    streams=False,
    **options,
):
    model, processor, asks = vision_model(family, getattr(torch, dtype))
    if engine and engine != "at load":
        options |= engine_fields(engine, "")
    if engine == "fsdp2":
        options["fsdp_config"]["transformer_layer_cls_to_wrap"] = layers_of(model)
    args = config(tempfile.mkdtemp(), **RUN | {"max_length": 256} | options)
    if engine:
        engine_on_cpu("fsdp2" if engine == "at load" else engine, args)
    if engine not in ("", "fsdp2"):  # sharded when it is loaded
        how = {"distributed_config": DistributedConfig(fsdp_size=PartialState().num_processes)}
        model = type(model).from_pretrained(folder, dtype=model.dtype, **(how if engine == "at load" else {}))
    elif folder:
        model.save_pretrained(folder)
    if frozen:
        getattr(model.model, frozen).requires_grad_(False)
    if each_alone:
        model.model.multi_modal_projector = EachAlone(model.model.multi_modal_projector)
    before = whole_parameters(model)
    ours = PackedSFTTrainer(
        model, args, train_dataset=rows(20, asks, sparse, streams), eval_dataset=rows(7, asks, sparse, streams, seed=1),
        processing_class=processor,
    )  # fmt: skip
    ours.train()
    after = whole_parameters(ours.accelerator.unwrap_model(ours.model))
    moved = torch.cat([(after[name] - weight).flatten() for name, weight in before.items()])
    return {"moved": moved, "losses": losses(ours), "evaluation": ours.evaluate()["eval_loss"]}


PartialState(cpu=True)
save_and_end({name: run(**options) for name, options in json.loads(sys.argv[2]).items()}, sys.argv[1])
