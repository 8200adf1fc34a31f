"""Script for the tests of several ranks: trains tiny vision-language models on rows with pictures.

usage: pictures_tiny.py OUTPUT_FILE RUNS, with RUNS as JSON: names, and options of the configuration, with `family` and
`dtype` of the model, the `engine` that spreads it ("fsdp2", "zero2", "zero3"; "at load": transformers' FSDP2), and
`folder`, where a run without an engine saves the model for those with one. With `sparse`, most passes have no picture;
with `streams`, the rows are streams; with `each_alone`, Llava's projector runs once for each picture. `frozen` names a
part of the model. The vocabulary is padded to a multiple of `vocabulary`. With `text_first`, the run trains on rows
without pictures, and the result is what `evaluate` then says of those with some.
"""

import json
import sys
import tempfile

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from runs import config, losses, save_and_end
from transformers.distributed import DistributedConfig
from vision import rows_with_pictures, vision_model

from packsft import PackedSFTTrainer
from packsft.app.invariance import engine_fields
from packsft.compat import engine_on_cpu, whole_parameters
from packsft.data.collator import PackingCollator

RUN = {"max_steps": 4, "optim": "sgd", "tokens_per_pass": 128, "per_device_eval_batch_size": 2, "use_cpu": True}
PASSES = {"without": 0}


class EachAlone(torch.nn.Module):
    def __init__(self, projector):
        super().__init__()
        self.projector = projector

    def forward(self, pictures):
        return torch.stack([self.projector(picture) for picture in pictures])


class Counting(PackingCollator):
    def _batch(self, documents):
        PASSES["without"] += not any(document.of_pictures for document in documents)
        return super()._batch(documents)


def rows(count, asks, sparse, streams, seed=0):
    drawn = rows_with_pictures(3 * count if sparse else count, asks, seed)
    if sparse:
        drawn = drawn.filter(lambda row, number: number % 9 == 0 or not row["images"], with_indices=True)
    return drawn.to_iterable_dataset(num_shards=2) if streams else drawn


def layers_of(model):
    classes = {type(module).__name__ for module in model.modules()}
    return sorted(classes & set(model._no_split_modules))


def built(family, engine="", dtype="float64", folder=None, sparse=False, streams=False, **options):
    model, processor, asks = vision_model(family, getattr(torch, dtype))
    if multiple := options.pop("vocabulary", None):
        model.resize_token_embeddings(pad_to_multiple_of=multiple, mean_resizing=False)
    each_alone, frozen = options.pop("each_alone", False), options.pop("frozen", None)
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
    train, held_out = rows(20, asks, sparse, streams), rows(7, asks, sparse, streams, seed=1)
    return model, args, train, held_out, processor


def run(text_first=False, **options):
    model, args, train, held_out, processor = built(**options)
    before = whole_parameters(model)
    if text_first:
        text = train.filter(lambda row: not row["images"]).remove_columns("images")
        ours = PackedSFTTrainer(model, args, train_dataset=text, processing_class=processor)
        ours.train()
        try:
            return ours.evaluate(held_out)["eval_loss"]
        except ValueError as error:
            return str(error)
    ours = PackedSFTTrainer(model, args, train_dataset=train, eval_dataset=held_out, processing_class=processor)
    ours.data_collator.__class__ = Counting
    PASSES["without"] = 0
    ours.train()
    without = gather_object([PASSES["without"]])
    after = whole_parameters(ours.accelerator.unwrap_model(ours.model))
    moved = torch.cat([(after[name] - weight).flatten() for name, weight in before.items()])
    labels = ours.predict(held_out).label_ids
    return {
        "moved": moved,
        "losses": losses(ours),
        "evaluation": ours.evaluate()["eval_loss"],
        "predicted": [row[row != -100].tolist() for row in labels if (row != -100).any()],
        "without pictures": without,
    }


PartialState(cpu=True)
save_and_end({name: run(**options) for name, options in json.loads(sys.argv[2]).items()}, sys.argv[1])
