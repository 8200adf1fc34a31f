"""`compile_layers=True`: the same training from compiled decoder layers, one graph for all of a kind and all packs.

61 documents of 2 to 12 tokens, in passes of at most 32. Most tests take the backend aot_eager, which traces forward and
backward as inductor does, but rounds as the model does.
"""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.utils import DynamoBackend
from numerics import assert_accurate
from packaging.version import Version
from runs import trainer
from tiny import tiny_model, token_rows
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from packsft.model import compilation

ROWS, EVAL_ROWS = token_rows(61), token_rows(20, seed=1)
EPOCH = {
    "optim": "sgd", "num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "use_cpu": True,
}  # fmt: skip
CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.fixture(autouse=True)
def _nothing_compiled(request, monkeypatch):
    torch._dynamo.reset()
    compilation._compiled.cache_clear()
    counters.clear()
    clear_compilation_metrics()
    if "inductor" not in request.node.name:
        compile_ = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda f, fullgraph, options: compile_(f, backend="aot_eager", fullgraph=fullgraph)
        )
    yield
    torch._dynamo.reset()


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def graphs() -> int:
    """Of layers; the first run of inductor in a process may compile something of its own."""
    return sum(metrics.co_name == "packed" for metrics in get_compilation_metrics())


def run(tmp_path, model, compiled, **options):
    """The trainer, after training; with the losses of its micro-batches and the number of graphs."""
    if options.pop("lora", False):
        options["peft_config"] = lora()
    torch.manual_seed(0)
    trained = trainer(tmp_path, model, ROWS, EVAL_ROWS, compile_layers=compiled, **EPOCH | options)
    step, losses = trained.training_step, []
    trained.training_step = lambda *args: losses.append(step(*args)) or losses[-1]
    trained.train()
    trained.losses, trained.graphs = torch.stack(losses), graphs()
    return trained


# options, and the number of graphs
CASES = {
    "step": ({"eval_strategy": "epoch"}, 1),  # evaluation is not compiled
    "checkpointed": (CHECKPOINTED, 1),
    "checkpointed, reentrant": (CHECKPOINTED | {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, 2),
    "checkpointed, selective": (CHECKPOINTED | {"gradient_checkpointing_kwargs": {"selective": True}}, 1),
    "checkpointed, every second layer": (CHECKPOINTED | {"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, 2),
    "LoRA": ({"lora": True}, 2),  # the input of the first layer needs no gradient
    "LoRA, checkpointed": ({"lora": True, **CHECKPOINTED}, 1),
    "bfd": ({"packing_strategy": "bfd", "max_length": 16, "gradient_accumulation_steps": 1}, 1),
    "not packed": ({"packing": False}, 1),
    "qwen3": ({"family": "qwen3"}, 1),
    "gemma2": ({"family": "gemma2"}, 2),  # layers with a window, and without
    "gpt2": ({"family": "gpt2"}, 1),
    "router's loss": ({"family": "mixtral", "router_aux_loss_coef": 0.5}, 1),
    "router's loss, checkpointed": ({"family": "mixtral", "router_aux_loss_coef": 0.5, **CHECKPOINTED}, 1),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in ("step", "checkpointed", "LoRA") else pytest.mark.slow) for case in CASES],
)
def test_an_epoch_of_uneven_packs_trains_alike_with_as_many_graphs_as_kinds_of_layers(case, tmp_path):
    options, expected = CASES[case]
    options = dict(options)
    family = options.pop("family", "llama")
    model = tiny_model(family, torch.float64, num_hidden_layers=3)
    if family == "mixtral":  # grouped products, the default, know no float64
        model.set_experts_implementation("batched_mm")
    plain, compiled = (run(tmp_path, copy.deepcopy(model), on, **options) for on in (False, True))
    assert compiled.graphs == expected
    assert not counters["graph_break"]
    torch.testing.assert_close(compiled.losses, plain.losses, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    if "eval_strategy" in options:
        assert compiled.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-12)


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torch 2.11 does not trace grouped products")
def test_grouped_experts_train_alike_with_the_routers_loss(tmp_path):
    routed = {"router_aux_loss_coef": 0.5, "logging_steps": 1}
    plain, compiled = (run(tmp_path, tiny_model("mixtral"), on, **routed) for on in (False, True))
    assert compiled.graphs == 1
    assert compiled.why_compact is None
    torch.testing.assert_close(compiled.losses, plain.losses, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_inductor_trains_alike_where_it_rounds_otherwise(family, tmp_path):
    """Llama computes RMSNorm and rotary angles in float32, GPT-2 nothing."""
    plain, compiled = (run(tmp_path, tiny_model(family, torch.float64), on) for on in (False, True))
    assert compiled.graphs == 1
    torch.testing.assert_close(compiled.losses, plain.losses, rtol=1e-7, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
def test_inductor_in_bfloat16_is_as_close_to_float64_as_the_model_itself(autocast, tmp_path):
    overrides = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    start = tiny_model("llama", torch.bfloat16, **overrides)

    def results(dtype, compiled):
        model = copy.deepcopy(start).to(dtype)
        ours = trainer(
            tmp_path, model, ROWS, bf16=autocast and dtype != torch.float64, compile_layers=compiled, use_cpu=True,
            per_device_train_batch_size=61, tokens_per_pass=512,
        )  # fmt: skip
        (step,) = ours.get_train_dataloader()
        (batch,) = step["passes"]
        ours.training_step(model, batch, batch["num_items"])
        with ours.compute_loss_context_manager():
            logits = ours._prepared.logits(model, batch).logits
        return logits, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    dtype = torch.float32 if autocast else torch.bfloat16
    truth, plain, ours = results(torch.float64, False), results(dtype, False), results(dtype, True)
    assert graphs() == 1
    for what, *values in zip(("logits", "gradients"), ours, plain, truth, strict=True):
        assert_accurate(*values, what)


@pytest.mark.slow
def test_inductor_compiles_once_although_it_fuses_long_rows_otherwise_on_a_gpu(tmp_path, monkeypatch):
    """There it asks whether a norm has 4,096 rows, which becomes a guard of the graph; here it asks for 24."""
    import sympy
    from torch._inductor import config, scheduler
    from torch._inductor.virtualized import V

    order, asked = scheduler.MixOrderReduction, []

    def can_fuse(one, other):
        if not (one.is_reduction() and other.is_reduction() and order.has_mix_reduction_orders(one, other)):
            return False
        asked.append(config.triton.mix_order_reduction)
        if asked[-1]:
            for node in (one, other):
                rows, _ = order.get_numel_rnumel(node)
                V.graph.sizevars.evaluate_expr(sympy.prod(sympy.flatten([rows])) >= 24)
        return False

    monkeypatch.setattr(order, "can_fuse", can_fuse)
    monkeypatch.setattr(config, "force_disable_caches", True)  # they keep guards
    sizes = {
        passed["input_ids"].shape[1]
        for step in trainer(tmp_path, None, ROWS, **EPOCH).get_train_dataloader()
        for passed in step["passes"]
    }
    assert min(sizes) < 24 <= max(sizes)
    assert run(tmp_path, tiny_model("llama", torch.float32), True).graphs == 1
    assert asked


def test_checkpoints_copies_and_later_trainers_know_nothing_of_it(tmp_path):
    model = tiny_model("llama", torch.float64)
    names, layer = list(model.state_dict()), model.model.layers[0]
    trained = run(tmp_path, model, True, save_strategy="epoch")
    assert type(layer) is not LlamaDecoderLayer
    assert isinstance(layer, LlamaDecoderLayer)
    assert list(model.state_dict()) == names
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{trained.state.global_step}")
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    twin = copy.deepcopy(model).train()
    inputs = trained._prepare_inputs(next(iter(trained.get_train_dataloader()))["passes"][0])
    trained.compute_loss(twin, dict(inputs)).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in twin.parameters())

    assert trained.check_packing().holds
    again = run(tmp_path, tiny_model("llama", torch.float64), True)
    assert again.graphs == trained.graphs == 1
    run(tmp_path, model, False)
    assert type(layer) is LlamaDecoderLayer


def test_a_run_resumes(tmp_path):
    whole = run(tmp_path / "whole", tiny_model("llama", torch.float64), True, save_strategy="steps", save_steps=8)
    resumed = trainer(
        tmp_path, tiny_model("llama", torch.float64), ROWS, compile_layers=True, **EPOCH,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"torch_compile": True}, "torch_compile=True the whole model: choose one"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True both replace"),
    ],
)
def test_a_second_way_to_make_layers_faster_is_refused(option, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, compile_layers=True, use_cpu=True, **option)


def test_a_dynamo_backend_of_the_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", DynamoBackend.EAGER)
    with pytest.raises(ValueError, match="dynamo_backend"):
        trainer(tmp_path, compile_layers=True, use_cpu=True)


def test_attention_dropout_is_refused_where_it_would_break_the_graph(tmp_path):
    for family, field in (("llama", "attention_dropout"), ("gpt2", "attn_pdrop")):
        with pytest.raises(ValueError, match=r"compile_layers=True: attention dropout of 0\.1 cannot be compiled"):
            trainer(tmp_path, tiny_model(family, **{field: 0.1}), compile_layers=True, use_cpu=True)


def test_a_layer_that_cannot_be_compiled_names_the_option(tmp_path, monkeypatch):
    forward = LlamaMLP.forward

    def breaks(self, x):
        torch._dynamo.graph_break()
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", breaks)
    with pytest.raises(ValueError, match="LlamaDecoderLayer cannot be compiled: set compile_layers=False"):
        run(tmp_path, tiny_model("llama"), True)


def test_a_forward_that_was_replaced_is_refused(tmp_path):
    model = tiny_model("llama")
    model.model.layers[0].forward = model.model.layers[0].forward
    with pytest.raises(ValueError, match="the forward of LlamaDecoderLayer has been replaced"):
        trainer(tmp_path, model, compile_layers=True, use_cpu=True)


def test_a_model_on_padded_rows_is_not_compiled_and_says_so(tmp_path, caplog):
    ours = run(tmp_path, tiny_model("stablelm"), True)
    assert ours.graphs == 0
    assert caplog.text.count("compile_layers=True: no effect") == 1
