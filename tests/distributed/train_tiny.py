"""Script for the tests of several ranks: trains a tiny model, several times, and saves weights and losses.

usage: train_tiny.py OUTPUT_FILE RUNS, with RUNS as JSON: names, and options of the configuration. Other options are
`family`, `model` and `dtype` of the model (default: a GPT-2 in float64), `lora` (fields of a `LoraConfig`) and
`adalora`. How it is spread:
- `layer`: the class of the decoder layers, which accelerate's FSDP2 then shards, in so many `replicas`;
- `loads_as`: fields of transformers' `DistributedConfig`, which shards when the model is loaded;
- `tp_size`: transformers' tensor parallelism alone;
- `zero_stage`: DeepSpeed; the model comes from `folder`, where a run without it saves it;
- `configured`: the engine that the configuration of `accelerate launch` has.
`stream` makes a stream of the rows. `added` is what the model gets beside: "previous token" or "convolution".
`of_rank_1` holds options of rank 1 alone; it fails at the step `rank_1_fails_at`, is killed at `rank_1_killed_at`,
and takes the rows in another order with `rank_1_shuffles`. With `save_steps` below `max_steps` (and an `output_dir`),
the model is saved, and a second run resumes. `resume_from` is a checkpoint. With `own_loss`, `compute_loss` is a
user's. With `refused`, the result is the error of each rank. With `proves`, nothing is trained: the claims of
`check_packing` are measured.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from numerics import norms_keep_float64
from packsft_kernels import linear_cross_entropy
from peft import AdaLoraConfig, LoraConfig
from runs import config, losses
from tiny import tiny_model, tiny_tokenizer, token_rows
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from packsft import PackedSFTTrainer
from packsft.app.invariance import engine_fields
from packsft.compat import engine_on_cpu, whole_parameters
from packsft.model import head
from packsft.model.sequence_parallel import SequenceGroup


class Recording(PackedSFTTrainer):
    """Adds up what `training_step` returns, by optimizer step: the logged losses are summed in float32."""

    step_losses: dict

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        step = self.state.global_step
        self.step_losses[step] = self.step_losses.get(step, 0.0) + loss.double()
        return loss


class Failing(TrainerCallback):
    """Rank 1 alone fails at a step, or is killed."""

    def __init__(self, step, killed):
        self.step, self.killed = step, killed

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and os.environ["RANK"] == "1":
            if not self.killed:
                raise ValueError("row 7 is broken")
            Path(args.output_dir, "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


class Shuffling(TrainerCallback):
    """Rank 1 takes the rows in another order, with the same arguments."""

    def on_train_begin(self, args, state, control, **kwargs):
        if os.environ["RANK"] == "1":
            kwargs["train_dataloader"].batch_sampler.sampler.initial_seed = 1


FUSED = {"calls": 0}


def counted(*args, **kwargs):
    FUSED["calls"] += 1
    return linear_cross_entropy(*args, **kwargs)


def exercised(model):
    """Adapters begin with zeros, which would hide the gradient of their other half. The same on every engine."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or "trainable_tokens_delta" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def with_previous_token(layer):
    """What a layer that hands a state on does, each document by itself: a token also gets half of the one before."""

    def add(module, args, kwargs, output):
        continues = kwargs["position_ids"][..., None] > 0
        return output + continues * torch.nn.functional.pad(output, (0, 0, 1, -1)) / 2

    layer.register_forward_hook(add, with_kwargs=True)


def built(options):
    torch.manual_seed(0)
    peft = LoraConfig(r=4, **options.pop("lora")) if "lora" in options else None
    if options.pop("adalora", False):
        peft = AdaLoraConfig(init_r=4, total_step=100, target_modules=["c_attn"])
    dtype = getattr(torch, options.pop("dtype", "float64"))
    model = tiny_model(options.pop("family", "gpt2"), dtype, **options.pop("model", {}))
    if dtype == torch.float64:
        norms_keep_float64(model)
    added = options.pop("added", None)
    if added == "previous token":
        with_previous_token(model.model.layers[0])
    elif added == "convolution":
        model.model.layers[1].conv = torch.nn.Conv1d(4, 4, kernel_size=3)
    layer = options.pop("layer", None)
    if layer:
        of_fsdp = options.pop("fsdp_config", {})
        options |= engine_fields("fsdp2", layer)
        options["fsdp_config"] |= of_fsdp
    tp, replicas = options.pop("tp_size", None), options.pop("replicas", None)
    if tp or replicas:
        shards = int(os.environ["WORLD_SIZE"]) // (tp or 1) // (replicas or 1) if layer else 1
        options["parallelism_config"] = ParallelismConfig(
            tp_size=tp or 1, dp_replicate_size=replicas or 1, dp_shard_size=shards
        )
    if zero := options.pop("zero_stage", None):
        options |= engine_fields(f"zero{zero}", "")
    rows = token_rows(64).to_iterable_dataset() if options.pop("stream", False) else token_rows(64)
    configured = options.pop("configured", None)
    attention, loading = options.pop("attention", None), options.pop("loads_as", None)
    folder = options.pop("folder", None)
    if differing := options.pop("of_rank_1", None):
        options |= differing if os.environ["RANK"] == "1" else {}
    args = config(options.pop("output_dir", tempfile.mkdtemp()), **options)
    if configured:
        engine_on_cpu(configured, args)
    if zero:
        engine_on_cpu(f"zero{zero}", args)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)  # partitioned by ZeRO-3
    elif folder:
        model.save_pretrained(folder)
    if layer or tp or loading:
        engine_on_cpu("fsdp2", args)
    if tp or loading:
        (folder,) = broadcast_object_list([tempfile.mkdtemp()])
        model.save_pretrained(folder)  # rank 0 does
        PartialState().wait_for_everyone()
        how = {"distributed_config": DistributedConfig(**loading)} if loading else {"tp_plan": "auto", "tp_size": tp}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how)
    if attention:
        model.set_attn_implementation(attention)
    ours = Recording(
        model=model,
        peft_config=peft,
        args=args,
        train_dataset=rows,
        eval_dataset=token_rows(9, seed=5),
        processing_class=tiny_tokenizer(),
    )
    layer, zero = layer or configured == "fsdp2", zero or (configured or "").startswith("zero")
    assert bool(layer) == (ours.accelerator.distributed_type == DistributedType.FSDP)
    accumulation = options.get("accelerator_config", {}).get("gradient_accumulation_kwargs", {})
    sums_up = ours.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    sharded = (
        layer
        or configured == "fsdp2"
        or (loading and loading.get("fsdp_size", 1) > 1 and "dp_replicate_size" not in loading)
    )
    assert sums_up == (bool(sharded) and accumulation.get("sync_each_batch", True))
    assert bool(zero) == (ours.accelerator.distributed_type == DistributedType.DEEPSPEED)
    exercised(ours.model)
    FUSED["calls"] = 0
    ours.step_losses = {}
    return ours


def results_of(ours):
    return {
        "weights": whole_parameters(ours.accelerator.unwrap_model(ours.model)),
        "fused": FUSED["calls"],
        "losses": losses(ours),
        "step_losses": ours.accelerator.reduce(torch.stack(list(ours.step_losses.values())), reduction="mean"),
        "steps": ours.state.global_step,
    }


def proved(options, how):
    """Of each claim whether it holds, on every rank."""
    if how == "heads in another order":
        to_tokens = SequenceGroup.to_tokens
        SequenceGroup.to_tokens = lambda group, out: to_tokens(group, out.roll(1, dims=1))
        try:
            built(options)
        except ValueError:
            return "refused"
        finally:
            SequenceGroup.to_tokens = to_tokens
    claims = [{claim.claim: claim.holds for claim in built(options).check_packing().claims}]
    return {claim: tuple(holds[claim] for holds in gather_object(claims)) for claim in claims[0]}


def trained(options):
    if options.pop("refused", False):
        try:
            built(dict(options))
        except ValueError as error:
            return gather_object([str(error)])
    if how := options.pop("proves", None):
        return proved(options, how)
    own_loss = options.pop("own_loss", False)
    resume_from, fails_at = options.pop("resume_from", None), options.pop("rank_1_fails_at", None)
    shuffles, killed_at = options.pop("rank_1_shuffles", False), options.pop("rank_1_killed_at", None)
    ours = built(dict(options))
    if fails_at or killed_at:
        ours.add_callback(Failing(fails_at or killed_at, killed=bool(killed_at)))
    if shuffles:
        ours.add_callback(Shuffling())
    if own_loss:
        ours.compute_loss = lambda model, inputs, return_outputs=False, num_items_in_batch=None: model(**inputs).loss
        ours.train()
        return results_of(ours) | {"evaluated": ours.evaluate()["eval_loss"]}
    ours.train(resume_from_checkpoint=resume_from)
    evaluated = ours.evaluate()
    shares_rows = options.get("sequence_parallel_size", 1) > 1
    predicted = [] if shares_rows else ours.predict(ours.eval_dataset).label_ids
    logged = [entry for entry in ours.state.log_history if "entropy" in entry][-1]
    results = results_of(ours) | {
        "predicted": None if shares_rows else int((predicted != -100).sum()),
        "history": {key: logged[key] for key in ("num_tokens", "entropy", "mean_token_accuracy")},
        "evaluated": {key: evaluated[f"eval_{key}"] for key in ("loss", "entropy", "mean_token_accuracy")},
    }
    if "save_steps" in options and options["save_steps"] < options["max_steps"] and resume_from is None:
        ours.save_model(f"{options['output_dir']}/model")
        again = built(dict(options))
        again.train(resume_from_checkpoint=f"{options['output_dir']}/checkpoint-{options['save_steps']}")
        results |= {"resumed": results_of(again)}
    return results


head.linear_cross_entropy = counted
results = {name: trained(options) for name, options in json.loads(sys.argv[2]).items()}
if PartialState().is_main_process:
    torch.save(results, sys.argv[1])
PartialState().wait_for_everyone()  # a rank that aborts below ends the others
PartialState().destroy_process_group()  # gloo's threads, still running at the end, now and then abort the process
