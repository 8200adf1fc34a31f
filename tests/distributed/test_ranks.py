"""Two gloo processes under `accelerate launch` give the weights and the losses of one process.

And under FSDP2, compiled layers give the losses of those that are not."""

import json
from pathlib import Path

import pytest
from launch import launch, results_of
from numerics import error

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("train_tiny.py")


def sizes(batch_size, accumulation, **more):
    return {
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation,
        "packing": False, "num_train_epochs": 2,
    } | more  # fmt: skip


# 64 examples, 16 a step: as 4 x 4 in one process, and as 4 x 2 in each of two. The thirty steps take 10 examples, and
# the last of each epoch 4: as 2 x 5, and as 5 x 1 in each of two.
THIRTY = {"max_steps": 30, "learning_rate": 1e-3}
EXAMPLES = {"loss_normalization": "example"}
STEP = {"packing": True, "tokens_per_pass": 24, "per_device_eval_batch_size": 2}
BFD = sizes(8, 2, packing=True, packing_strategy="bfd", max_length=24)
ONE = {
    "unpacked": sizes(4, 4),
    "bfd": BFD,
    "thirty, float64": sizes(5, 2, **THIRTY),
    "thirty, float32": sizes(5, 2, dtype="float32", **THIRTY),
    "by example": sizes(4, 4, **EXAMPLES),
    "LoRA on the head": sizes(4, 4, lora={"target_modules": ["c_attn", "lm_head"]}),
    "AdaLoRA": sizes(4, 4, adalora=True),
}
TWO = {
    "unpacked": sizes(4, 2),
    "step": sizes(4, 2, **STEP),
    "step, compiled layers": sizes(4, 2, **STEP, compile_layers=True),
    "own loss": sizes(4, 2, **STEP, own_loss=True),
    "thirty, float64": sizes(1, 5, **THIRTY, **STEP),
    "thirty, float32": sizes(1, 5, dtype="float32", **THIRTY, **STEP),
    "unpacked, by example": sizes(4, 2, **EXAMPLES),
    "step, by example": sizes(4, 2, **EXAMPLES, **STEP),
    "LoRA on the head": sizes(4, 2, lora={"target_modules": ["c_attn", "lm_head"]}, **STEP),
    "AdaLoRA": sizes(4, 2, adalora=True, **STEP),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return results_of(SCRIPT, 1, tmp_path_factory.mktemp("one") / "runs.pt", json.dumps(ONE))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return results_of(SCRIPT, 2, tmp_path_factory.mktemp("two") / "runs.pt", json.dumps(TWO))


@pytest.fixture(scope="module", params=[1, 2], ids=["one node", "two nodes"])
def four(request, tmp_path_factory):
    runs = {"step": sizes(2, 2, **STEP), "unpacked": sizes(2, 2), "bfd": BFD | {"per_device_train_batch_size": 2}}
    folder = tmp_path_factory.mktemp("four")
    return results_of(SCRIPT, 4, folder / "runs.pt", json.dumps(runs), nodes=request.param)


def assert_same_weights(ours, theirs):
    for name, weight in ours["weights"].items():
        assert error(weight, theirs["weights"][name]) < 1e-9, name


def off(ours, theirs):
    assert len(ours["step_losses"]) == len(theirs["step_losses"])
    return ((ours["step_losses"] - theirs["step_losses"]) / theirs["step_losses"]).abs().max()


@pytest.mark.parametrize("how", ["unpacked", "step", "step, compiled layers"])
def test_two_processes_give_the_weights_of_one(how, one, two):
    assert two[how]["steps"] == one["unpacked"]["steps"] == 8
    assert_same_weights(two[how], one["unpacked"])
    # logged in float32, averaged over ranks
    assert two[how]["losses"] == pytest.approx(one["unpacked"]["losses"], rel=1e-5)
    assert two[how]["history"] == pytest.approx(one["unpacked"]["history"], rel=1e-9)


def test_a_loss_of_ones_own_counts_the_tokens_of_all_ranks(one, two):
    assert_same_weights(two["own loss"], one["unpacked"])
    assert two["own loss"]["evaluated"] == pytest.approx(one["unpacked"]["evaluated"]["loss"], rel=1e-9)


@pytest.mark.parametrize("how", ["unpacked", "step", "bfd"])
def test_four_processes_give_the_weights_of_one(how, one, four):
    theirs = one["bfd" if how == "bfd" else "unpacked"]
    assert four[how]["steps"] == theirs["steps"]
    assert_same_weights(four[how], theirs)
    assert four[how]["history"] == pytest.approx(theirs["history"], rel=1e-9)


def test_a_lora_on_the_head_is_trained_alike_on_two_processes(one, two):
    assert_same_weights(two["LoRA on the head"], one["LoRA on the head"])
    assert one["LoRA on the head"]["weights"]["base_model.model.lm_head.lora_B.default.weight"].abs().max() > 1e-3


def test_what_an_adapter_adds_to_the_loss_counts_once_on_two_processes(one, two):
    assert_same_weights(two["AdaLoRA"], one["AdaLoRA"])
    assert off(two["AdaLoRA"], one["AdaLoRA"]) < 1e-10


def test_an_evaluation_of_exact_steps_counts_no_row_twice(one, two):
    # nine rows, which two ranks cannot share evenly
    assert two["step"]["evaluated"] == pytest.approx(one["unpacked"]["evaluated"], rel=1e-9)
    assert two["step"]["predicted"] == one["unpacked"]["predicted"]
    assert two["step, by example"]["evaluated"] == pytest.approx(one["by example"]["evaluated"], rel=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_thirty_losses_on_two_processes_are_those_of_the_unpacked_run(dtype, tolerance, one, two):
    assert len(two[f"thirty, {dtype}"]["step_losses"]) == 30
    assert off(two[f"thirty, {dtype}"], one[f"thirty, {dtype}"]) < tolerance


@pytest.mark.parametrize("how", ["unpacked", "step"])
def test_examples_count_the_same_on_two_processes(how, one, two):
    assert off(two[f"{how}, by example"], one["by example"]) < 1e-10
    assert off(one["by example"], one["unpacked"]) > 1e-6


def test_layers_that_fsdp_shards_are_compiled_once_and_train_alike(tmp_path):
    found = results_of(SCRIPT.with_name("shard_tiny.py"), 2, tmp_path / "runs.pt")
    for checkpointing in (False, True):
        plain, compiled = (found[checkpointing][how] for how in ("plain", "compiled"))
        assert error(compiled["losses"], plain["losses"]) < 1e-12
        assert compiled["names"] == plain["names"]
        assert found[checkpointing]["graphs and breaks"] == (1, 0)


@pytest.mark.parametrize("differing", [{"seed": 1}, {"tokens_per_pass": 32}, {"max_steps": 7}], ids=str)
def test_a_rank_with_other_arguments_is_named_before_the_first_step(differing, tmp_path):
    runs = {"x": sizes(4, 2, **STEP, max_steps=6) | {"of_rank_1": differing}}
    said = launch(SCRIPT, 2, tmp_path / "runs.pt", json.dumps(runs))
    (name,) = differing
    assert said.count(f"ValueError: rank 1 would train otherwise than rank 0 ({name}: ") == 2


def test_texts_are_tokenised_once_on_a_node(tmp_path):
    found = results_of(SCRIPT.with_name("tokenise_tiny.py"), 2, tmp_path / "found.pt")
    for kind in ("in memory", "on a disk"):
        (first, packs), (other, as_many) = found[kind]
        assert packs == as_many
        assert first >= 64
        assert other <= 1, kind  # what the tokenizer adds to a text
    assert all("holds other rows on rank 1 than on rank 0" in error for error in found["other rows"])


def test_a_failing_rank_is_named_by_every_rank(tmp_path):
    runs = {"x": sizes(4, 2, **STEP, max_steps=6) | {"rank_1_fails_at": 2}}
    said = launch(SCRIPT, 2, tmp_path / "runs.pt", json.dumps(runs))
    assert "ValueError: row 7 is broken" in said
    assert "RuntimeError: rank 1 failed: ValueError: row 7 is broken" in said


def test_a_rank_that_takes_other_examples_is_named_before_the_first_step(tmp_path):
    runs = {"x": sizes(4, 2, **STEP, max_steps=6) | {"rank_1_shuffles": True}}
    said = launch(SCRIPT, 2, tmp_path / "runs.pt", json.dumps(runs))
    assert said.count("ValueError: rank 1 would train otherwise than rank 0 (examples: ") == 2
