"""Options of the parent mean what they mean in TRL: in exact steps, packed as a whole, unpacked, and on padded rows."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from numerics import assert_accurate
from packsft_kernels import LossOptions, cross_entropy
from runs import config, losses, trainer
from tiny import tiny_model, tiny_tokenizer, token_rows
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from packsft import PackedSFTTrainer, compat
from packsft.model.isolation import IsolationVerdict

WAYS = {
    "exact steps": {},
    "exact steps of several passes": {"tokens_per_pass": 14},
    "unpacked": {"packing": False},
    "best fit": {"packing_strategy": "bfd", "max_length": 16},
}
AS_TRL = [way for way in WAYS if way != "best fit"]  # the same examples in each step
# The first token of a row is never scored: transformers counts it where GPT-2's labels do not mask it.
ROWS = token_rows(30).filter(lambda row: row["labels"][0] == -100).select(range(24))
ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 3}


def run(cls, tmp_path, model=None, rows=None, eval_dataset=None, train=True, **options):
    constructor = {key: options.pop(key) for key in ("compute_loss_func", "peft_config") if key in options}
    args = config(tmp_path, use_cpu=True, **options)
    if cls is SFTTrainer:
        fields = {name: getattr(args, name) for name in SFTConfig.__dataclass_fields__ if name in args.to_dict()}
        args = SFTConfig(**fields | {"packing": False, "packing_strategy": "bfd"})
    torch.manual_seed(0)
    ran = cls(
        model=tiny_model("gpt2", torch.float64) if model is None else model, args=args, eval_dataset=eval_dataset,
        train_dataset=ROWS if rows is None else rows, processing_class=tiny_tokenizer(), **constructor,
    )  # fmt: skip
    if train:
        ran.train()
    return ran


def logged(ran, *names):
    return [[entry[name] for name in names] for entry in ran.state.log_history if "loss" in entry]


def assert_same_weights(ours, theirs, tolerance):
    for (name, our), their in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert (our - their).abs().max() <= tolerance * their.abs().max(), name


@pytest.fixture
def trains_padded(monkeypatch):
    """A model that cannot keep packed documents apart."""
    monkeypatch.setattr("packsft.model.prepared.check_isolation", lambda *_: IsolationVerdict(False, "a stand-in's"))


# ---- losses ----

ROUNDED_BY_TRL = 1e-6  # which takes log-probabilities (DFT) and their sum (smoothing) in float32

LOSSES = [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}, {"loss_type": "dft", "label_smoothing_factor": 0.1}]


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_weights_after_steps_of_other_losses_are_those_of_trl(options, tmp_path):
    # plain gradient descent: the weights have moved by the gradients, of steps of 2 x 3 examples
    options = options | ACCUMULATED | {"optim": "sgd", "learning_rate": 0.1}
    theirs = run(SFTTrainer, tmp_path, **options)
    for way in AS_TRL:
        ours = run(PackedSFTTrainer, tmp_path, **options | WAYS[way])
        assert_same_weights(ours, theirs, ROUNDED_BY_TRL)
        assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)


@pytest.mark.parametrize("options", LOSSES[:2], ids=str)
def test_other_losses_on_padded_rows_are_those_of_trl(options, tmp_path, trains_padded):
    options = options | ACCUMULATED | {"optim": "sgd", "learning_rate": 0.1}
    theirs = run(SFTTrainer, tmp_path, **options)
    for way in AS_TRL:
        assert_same_weights(run(PackedSFTTrainer, tmp_path, **options | WAYS[way]), theirs, ROUNDED_BY_TRL)


@pytest.mark.parametrize("way", WAYS)
def test_label_smoothing_takes_one_forward(way, tmp_path):
    counts = []
    for smoothing in (0.0, 0.1):
        model = tiny_model("llama")
        forwards = []
        ours = run(
            PackedSFTTrainer, tmp_path, model, train=False, label_smoothing_factor=smoothing, **ACCUMULATED | WAYS[way]
        )
        model.model.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        ours.train()
        counts.append(len(forwards))
    assert counts[0] == counts[1] > 0


ROUTED = ACCUMULATED | {"router_aux_loss_coef": 0.5}


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}], ids=str)
def test_the_routers_loss_over_accumulated_batches_is_that_of_trl(options, tmp_path):
    theirs, ours = (
        run(cls, tmp_path, tiny_model("mixtral"), packing=False, **ROUTED | options)
        for cls in (SFTTrainer, PackedSFTTrainer)
    )
    names = "loss", "aux_loss", "grad_norm"
    assert np.allclose(logged(ours, *names), logged(theirs, *names), rtol=2e-5)


def test_the_routers_loss_on_padded_rows_leaves_out_the_padding(tmp_path, trains_padded):
    theirs, ours = (
        run(cls, tmp_path, tiny_model("mixtral"), packing=False, **ROUTED) for cls in (SFTTrainer, PackedSFTTrainer)
    )
    names = "loss", "aux_loss", "grad_norm"
    assert np.allclose(logged(ours, *names), logged(theirs, *names), rtol=2e-5)


def test_a_row_without_documents_has_no_routers_loss_in_an_evaluation(tmp_path):
    """As a rank has that gets no rows: only the padding of its row goes through the router."""
    ours = run(PackedSFTTrainer, tmp_path, tiny_model("mixtral"), packing=False, **ROUTED)
    ours.model.eval()
    sums = []
    for batches in ([token_rows(2)[:2]], [token_rows(2)[:2], {}]):
        for columns in batches:
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            ours.compute_loss(ours.model, ours.data_collator(rows or [[]]))
        sums.append(ours._sums["eval"].drain(ours.accelerator)["aux_loss"])
    assert sums[0] == pytest.approx(sums[1], rel=1e-12)


def test_the_evaluation_loss_of_a_mixture_of_experts_has_the_routers_loss_in_it(tmp_path):
    options = {"max_steps": 1, "router_aux_loss_coef": 0.5, "packing": False, "per_device_eval_batch_size": 4}
    theirs, ours = (
        run(cls, tmp_path, tiny_model("mixtral"), eval_dataset=token_rows(8, seed=3), **options).evaluate()
        for cls in (SFTTrainer, PackedSFTTrainer)
    )
    # TRL averages over batches, we over scored tokens
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-3)
    assert ours["eval_aux_loss"] == pytest.approx(theirs["eval_aux_loss"], rel=2e-5)


def test_a_loss_function_of_the_users_is_the_whole_loss(tmp_path):
    def loss_of_logits(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    theirs, ours = (
        run(cls, tmp_path, tiny_model("mixtral"), packing=False, compute_loss_func=loss_of_logits, **ROUTED)
        for cls in (SFTTrainer, PackedSFTTrainer)
    )
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-5)


# ---- metrics of the logits ----


def metrics_of_logits(prediction, compute_result=True):
    """Mean loss of the scored tokens, by the shift of transformers."""
    logits, labels = torch.as_tensor(prediction.predictions)[:, :-1], torch.as_tensor(prediction.label_ids)[:, 1:]
    mean = F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten())
    given = {} if prediction.losses is None else {"given_loss": float(prediction.losses[0])}
    if prediction.losses is not None:  # one for each row
        assert len(prediction.losses) == len(prediction.label_ids)
        given["mean_of_losses"] = float(prediction.losses.mean())
    return {"mean": mean.item(), "scored": int((labels != -100).sum()), **given}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"eval_accumulation_steps": 2}], ids=str)
def test_the_loss_of_the_logits_that_metrics_get_is_the_evaluation_loss(options, way, tmp_path):
    ours = trainer(
        tmp_path, compute_metrics=metrics_of_logits, eval_dataset=token_rows(21, seed=3),
        per_device_eval_batch_size=4, **options | WAYS[way],
    )  # fmt: skip
    metrics = ours.evaluate()
    assert metrics["eval_mean"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert metrics["eval_scored"] == sum(sum(x != -100 for x in r["labels"][1:]) for r in token_rows(21, seed=3))


@pytest.mark.parametrize("options", [{}, {"eval_packing": False}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_metrics_of_a_padded_model_are_those_of_the_examples(way, options, tmp_path):
    ours = trainer(
        tmp_path, model=tiny_model("stablelm"), compute_metrics=metrics_of_logits,
        eval_dataset=token_rows(21, seed=3), per_device_eval_batch_size=4, **WAYS[way] | options,
    )  # fmt: skip
    metrics = ours.evaluate()
    assert metrics["eval_mean"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert metrics["eval_scored"] == sum(sum(x != -100 for x in r["labels"][1:]) for r in token_rows(21, seed=3))


def test_the_losses_that_metrics_get_are_means_over_scored_tokens(tmp_path):
    ours = trainer(
        tmp_path, compute_metrics=metrics_of_logits, eval_dataset=token_rows(21, seed=3), tokens_per_pass=14,
        per_device_eval_batch_size=21, include_for_metrics=["loss"],
    )  # fmt: skip
    metrics = ours.evaluate()
    assert metrics["eval_given_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


def test_a_last_batch_of_fewer_rows_counts_for_fewer(tmp_path):
    options = {"per_device_eval_batch_size": 8, "include_for_metrics": ["loss"], "compute_metrics": metrics_of_logits}
    ours = trainer(tmp_path, eval_dataset=token_rows(9, seed=3), **options)
    batches = [ours.evaluate(token_rows(9, seed=3).select(rows))["eval_loss"] for rows in (range(8), range(8, 9))]
    assert ours.evaluate()["eval_mean_of_losses"] == pytest.approx((8 * batches[0] + batches[1]) / 9, rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_logits_are_preprocessed_before_they_are_kept(way, tmp_path):
    seen = []

    def best(logits, labels):
        assert logits.shape == (*labels.shape, 24)
        return logits.argmax(-1)

    def accuracy(prediction):
        hit = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        seen.append(prediction.predictions.shape)
        return {"accuracy": hit[prediction.label_ids[:, 1:] != -100].mean()}

    ours = trainer(
        tmp_path, compute_metrics=accuracy, preprocess_logits_for_metrics=best, eval_dataset=token_rows(21, seed=3),
        per_device_eval_batch_size=4, **WAYS[way],
    )  # fmt: skip
    metrics = ours.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_mean_token_accuracy"], rel=1e-6)
    assert [len(shape) for shape in seen] == [2]


@pytest.mark.parametrize("way", WAYS)
def test_metrics_can_be_computed_batch_by_batch(way, tmp_path):
    batches = []

    def accumulate(prediction, compute_result):
        batch = metrics_of_logits(prediction)
        batches.append((batch["mean"] * batch["scored"], batch["scored"]))
        return {"mean": sum(loss for loss, _ in batches) / sum(n for _, n in batches)} if compute_result else {}

    ours = trainer(
        tmp_path, compute_metrics=accumulate, batch_eval_metrics=True, eval_dataset=token_rows(21, seed=3),
        per_device_eval_batch_size=4, **WAYS[way],
    )  # fmt: skip
    metrics = ours.evaluate()
    assert len(batches) > 1
    assert metrics["eval_mean"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


def test_the_cost_of_whole_logits_is_said_once(tmp_path, caplog):
    rows = token_rows(4)
    ours = trainer(tmp_path, compute_metrics=lambda prediction: {}, eval_dataset=rows)
    ours.evaluate()
    ours.evaluate()
    tokens = len(rows) * max(len(row["input_ids"]) for row in rows)
    notice = f"for the first batch {tokens} tokens, with padding, x 24 entries, {tokens * 24 * 4 / 1e6:.3g} MB"
    assert caplog.text.count(notice) == 1
    quiet = trainer(tmp_path, compute_metrics=lambda prediction: {}, eval_dataset=rows, prediction_loss_only=True)
    quiet.evaluate()
    assert caplog.text.count("a second forward") == 1


# ---- NEFTune ----


def test_noise_on_one_example_a_batch_is_that_of_trl(tmp_path):
    options = {"neftune_noise_alpha": 20.0, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}
    theirs, ours = (
        run(cls, tmp_path, tiny_model("llama"), packing=False, max_steps=3, **options)
        for cls in (SFTTrainer, PackedSFTTrainer)
    )
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-5)
    without = run(PackedSFTTrainer, tmp_path, tiny_model("llama"), packing=False, **options | {
        "neftune_noise_alpha": None, "max_steps": 3})  # fmt: skip
    assert losses(ours) != pytest.approx(losses(without), rel=1e-3)


@pytest.mark.parametrize("lora", [False, True], ids=["the whole model", "an adapter"])
def test_noise_in_a_pack_is_as_large_as_the_length_of_each_document_says(lora, tmp_path):
    from peft import LoraConfig

    model, noise = tiny_model("llama", tie_word_embeddings=False), []
    adapter = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if lora else {}
    ours = trainer(
        tmp_path, model=model, neftune_noise_alpha=5.0, max_steps=1, learning_rate=0.0, train_dataset=token_rows(48),
        per_device_train_batch_size=48, tokens_per_pass=512, use_cpu=True, **adapter,
    )  # fmt: skip
    (step,) = ours.get_train_dataloader()
    (batch,) = step["passes"]
    embeddings = model.get_input_embeddings()
    torch.nn.init.zeros_(embeddings.weight)  # so that what comes out of them is the noise
    model.model.layers[0].register_forward_pre_hook(lambda _, args: noise.append(args[0].detach()))
    ours.train()
    (noise_1TM,) = noise
    sizes = noise_1TM[0].abs()
    for start, stop in itertools.pairwise(batch["cu_seq_lens_q"].tolist()):
        bound = 5.0 / math.sqrt((stop - start) * 32)
        assert 0.9 * bound < sizes[start:stop].max() <= bound
    model.train()
    assert not embeddings(torch.tensor([[3, 4]])).any()  # gone with the training


def test_noise_on_padded_rows_is_as_large_as_the_length_of_each_document_says(tmp_path):
    model, noise = tiny_model("stablelm", tie_word_embeddings=False), []
    ours = trainer(
        tmp_path, model=model, neftune_noise_alpha=5.0, max_steps=1, learning_rate=0.0, train_dataset=token_rows(24),
        per_device_train_batch_size=24, tokens_per_pass=512, use_cpu=True,
    )  # fmt: skip
    (step,) = ours.get_train_dataloader()
    (batch,) = step["passes"]
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    model.model.layers[0].register_forward_pre_hook(lambda _, args: noise.append(args[0].detach()))
    ours.train()
    (noise_BSM,) = noise
    for sizes, length in zip(noise_BSM.abs(), batch["row_lengths"].tolist(), strict=True):
        bound = 5.0 / math.sqrt(length * 32)
        assert 0.9 * bound < sizes.max() <= bound


# ---- precision and memory ----


def float16_run(cls, tmp_path, scale, **options):
    """fp16=True needs a GPU in accelerate: here with autocast to float16 and a gradient scaler, on the CPU."""
    ran = run(cls, tmp_path, tiny_model("llama"), train=False, **ACCUMULATED | options)
    ran.accelerator.native_amp, ran.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
    AcceleratorState._shared_state["_mixed_precision"] = "fp16"
    try:
        ran.train()
    finally:
        AcceleratorState._shared_state["_mixed_precision"] = "no"
    return ran


# Plain gradient descent: Adam would turn the rounding of a small gradient into a whole step. As many steps as make the
# largest error of their losses no luck.
MANY_STEPS = ACCUMULATED | {"max_steps": 16, "optim": "sgd", "learning_rate": 0.1}


def of_all_steps(ran):
    losses, norms = zip(*logged(ran, "loss", "grad_norm"), strict=True)
    found = {"loss": torch.tensor(losses), "grad_norm": torch.tensor(norms)}
    return found | {"weights": torch.cat([p.detach().flatten() for p in ran.model.parameters()])}


@pytest.fixture(scope="module")
def float16_of_trl(tmp_path_factory):
    """Losses, norms and weights of TRL in float16, and the same in float64."""
    path = tmp_path_factory.mktemp("float16")
    exact = run(SFTTrainer, path, tiny_model("llama").double(), **MANY_STEPS)
    return of_all_steps(float16_run(SFTTrainer, path, 2.0**16, **MANY_STEPS)), of_all_steps(exact)


@pytest.mark.parametrize("way", AS_TRL)
def test_float16_with_a_scaler_is_as_close_to_float64_as_trl(way, float16_of_trl, tmp_path):
    ours = float16_run(PackedSFTTrainer, tmp_path, 2.0**16, **MANY_STEPS | WAYS[way])
    for name, values in of_all_steps(ours).items():
        theirs, exact = (found[name] for found in float16_of_trl)
        assert_accurate(values, theirs, exact.double(), name)
    assert ours.accelerator.scaler.get_scale() == 2.0**16


@pytest.mark.parametrize("way", AS_TRL)
def test_a_step_whose_gradients_overflow_is_skipped_and_the_scale_halved(way, tmp_path):
    ours = float16_run(PackedSFTTrainer, tmp_path, 2.0**40, **WAYS[way])
    assert ours.accelerator.scaler.get_scale() == 2.0**37
    for our, start in zip(ours.model.parameters(), tiny_model("llama").parameters(), strict=True):
        assert torch.equal(our, start)


def head_gradients(fused, dtype, scale, num_items):
    """Of hidden states and weight, in `dtype`, of a loss that a scaler has multiplied by `scale`."""
    generator, targets = torch.Generator().manual_seed(0), torch.arange(12)
    hidden, weight = (torch.randn(n, 8, generator=generator).half().to(dtype).requires_grad_() for n in (12, 30))
    options = LossOptions()
    if fused:  # the operator, as on a GPU: the public function would compute float16 on the CPU in float32
        share = torch.tensor(1 / num_items, dtype=torch.float64)
        given = hidden, weight, None, None, None, targets, None, None, share
        loss = torch.ops.packsft.linear_cross_entropy(
            *given, *options.fields(), dtype, True, True, False, False, False
        )[0]
    else:
        logits = hidden @ weight.t()
        loss = cross_entropy(
            logits, shift=False, targets=targets, num_items=num_items, options=options, inplace=True
        ).loss
    (loss * scale).backward()
    return hidden.grad, weight.grad


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "compact logits"])
def test_the_scalers_factor_reaches_the_gradients_before_they_round_to_float16(fused):
    # of a million items each gradient is about 1e-7, for which float16 has a bit or two; times 65,536 it has all eleven
    ours, exact = (
        head_gradients(fused, dtype, scale=2.0**16, num_items=1_000_000) for dtype in (torch.float16, torch.float64)
    )
    for our, truth in zip(ours, exact, strict=True):
        assert (our.double() - truth).abs().max() < 5e-3 * truth.abs().max()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "compact logits"])
def test_an_overflow_of_the_scaled_gradients_is_there_for_the_scaler_to_see(fused):
    for gradient in head_gradients(fused, torch.float16, scale=2.0**24, num_items=12):
        assert not gradient.isfinite().all()


CHECKPOINTING = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {"selective": True},
    "every second layer": {"every_n_layers": 2},
}


@pytest.mark.parametrize("lora", [False, True], ids=["the whole model", "an adapter"])
@pytest.mark.parametrize("flavour", [*CHECKPOINTING, "switched on before"])
def test_every_flavour_of_checkpointing_recomputes_and_changes_nothing(flavour, lora, tmp_path):
    from peft import LoraConfig

    if flavour == "selective" and lora:
        pytest.skip("TRL 1.16 hands its own key on to PyTorch there, and fails in the same way")
    if flavour == "every second layer" and not hasattr(PreTrainedModel, "activation_checkpointing_enable"):
        pytest.skip("this transformers checkpoints all layers or none")
    forwards, results = [], []
    for on in (False, True):
        model, kwargs = tiny_model("llama"), {"gradient_checkpointing": False}
        if on and flavour == "switched on before":
            model.gradient_checkpointing_enable()
        elif on:
            kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": dict(CHECKPOINTING[flavour])}
        counted = []
        adapter = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])} if lora else {}
        ours = run(PackedSFTTrainer, tmp_path, model, train=False, tokens_per_pass=14, **ACCUMULATED | kwargs | adapter)
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        ours.train()
        forwards.append(len(counted))
        results.append(losses(ours))
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    assert forwards[1] > forwards[0]


def test_selective_checkpoints_know_the_operators_of_attention(tmp_path, monkeypatch):
    known, build = [], compat.trl_selective._build_policy_fn
    monkeypatch.setattr(compat.trl_selective, "_build_policy_fn", lambda ops: known.append(ops) or build(ops))
    trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"selective": True})
    aten, own = torch.ops.aten, torch.ops.packsft.varlen_sdpa
    operators = aten._flash_attention_forward, own, aten._scaled_dot_product_flash_attention_for_cpu
    assert known[0] >= {operator.default for operator in operators}


@pytest.mark.parametrize("way", WAYS)
def test_activations_are_offloaded_in_every_pass(way, tmp_path):
    """TRL's offloading needs an accelerator: here a context of the same kind, which counts what a pass saves."""

    class Offloading(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self):
            super().__init__(lambda x: saved.append(x.shape) or x.clone(), lambda x: x)

    saved, passes = [], []
    ours = run(PackedSFTTrainer, tmp_path, tiny_model("llama"), train=False, **ACCUMULATED | WAYS[way])
    plain = run(PackedSFTTrainer, tmp_path, tiny_model("llama"), **ACCUMULATED | WAYS[way])
    ours.maybe_activation_offload_context = Offloading()
    compute_loss = ours.compute_loss

    def counting(*args, **kwargs):
        before = len(saved)
        loss = compute_loss(*args, **kwargs)
        passes.append(len(saved) - before)
        return loss

    ours.compute_loss = counting
    ours.train()
    assert min(passes) > 10
    assert losses(ours) == losses(plain)


def test_offloading_to_the_cpu_from_the_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="activation_offloading=True moves activations from an accelerator to the CPU"):
        trainer(tmp_path, activation_offloading=True, use_cpu=True)


@pytest.mark.parametrize("way", ["unpacked", "best fit"])
def test_auto_find_batch_size_halves_a_batch_that_does_not_fit(way, tmp_path, monkeypatch):
    compute_loss = PackedSFTTrainer.compute_loss

    def small_memory(self, *args, **kwargs):
        if self._train_batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(PackedSFTTrainer, "compute_loss", small_memory)
    options = WAYS[way] | {"num_train_epochs": 1}
    found = run(PackedSFTTrainer, tmp_path, auto_find_batch_size=True, per_device_train_batch_size=4, **options)
    given = run(PackedSFTTrainer, tmp_path, per_device_train_batch_size=2, **options)
    assert found._train_batch_size == 2
    assert losses(found) == losses(given)


def test_ligers_layers_are_taken_and_its_head_is_not(tmp_path, monkeypatch):
    liger = pytest.importorskip("liger_kernel.transformers")
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # which Liger replaces for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    apply, calls = liger._apply_liger_kernel_to_instance, []
    monkeypatch.setattr(liger, "_apply_liger_kernel_to_instance", lambda **given: calls.append(given))
    ours = run(PackedSFTTrainer, tmp_path, tiny_model("llama"), use_liger_kernel=True, max_steps=1)
    ((given),) = calls
    assert given == {"model": ours.model, "fused_linear_cross_entropy": False}
    forward = ours.model.forward
    apply(**given)  # its kernels need a GPU: that they are in place is all that can be seen here
    assert ours.model.forward is forward
    assert "Liger" in ours.model.model.norm.forward.__qualname__


# ---- the order of examples ----


@pytest.mark.parametrize("family", ["gpt2", "stablelm"])
def test_examples_grouped_by_length_make_the_steps_of_trl(family, tmp_path):
    options = ACCUMULATED | {"train_sampling_strategy": "group_by_length"}
    theirs = run(SFTTrainer, tmp_path, tiny_model(family), **options)
    for way in ("exact steps", "unpacked"):
        ours = run(PackedSFTTrainer, tmp_path, tiny_model(family), **options | WAYS[way])
        assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    random = run(PackedSFTTrainer, tmp_path, tiny_model(family), **ACCUMULATED)
    assert losses(random) != pytest.approx(losses(theirs), rel=1e-4)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packs_are_not_grouped_by_length(strategy, tmp_path):
    with pytest.raises(ValueError, match=f"'group_by_length' groups .* packing_strategy='{strategy}' it would see"):
        trainer(tmp_path, packing_strategy=strategy, train_sampling_strategy="group_by_length")


@pytest.mark.parametrize("way", AS_TRL)
def test_a_stream_of_so_many_steps_is_trained_as_in_trl(way, tmp_path):
    theirs = run(SFTTrainer, tmp_path, rows=ROWS.to_iterable_dataset(), **ACCUMULATED)
    ours = run(PackedSFTTrainer, tmp_path, rows=ROWS.to_iterable_dataset(), **ACCUMULATED | WAYS[way])
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_without_a_number_of_steps_is_refused(way, tmp_path):
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        run(PackedSFTTrainer, tmp_path, rows=ROWS.to_iterable_dataset(), **WAYS[way])


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
def test_an_optimizer_that_steps_in_every_backward_is_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=f"optim='{optim}' updates weights within a backward"):
        trainer(tmp_path, optim=optim)


def test_a_pad_token_that_is_text_is_counted_as_text(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = token_rows(24).map(lambda row: {"input_ids": [*row["input_ids"][:-1], 1]})
    for way in AS_TRL:
        ours = trainer(
            tmp_path, train_dataset=rows, processing_class=tokenizer, include_num_input_tokens_seen="non_padding",
            num_train_epochs=1, pad_to_multiple_of=8, **WAYS[way],
        )  # fmt: skip
        ours.train()
        assert ours.state.num_input_tokens_seen == sum(len(row["input_ids"]) for row in rows)
