"""Vision-language models on packed rows with pictures take the steps of TRL's unpacked run."""

import copy

import pytest
import torch
import transformers
from datasets import Dataset, Image, IterableDataset, List
from numerics import error
from packaging.version import Version
from peft import LoraConfig
from read_counter import CPU_ATTENTION, ReadCounter
from runs import DEFAULTS, config, losses
from trl import SFTConfig, SFTTrainer
from vision import FAMILIES, rows_with_pictures, vision_model

from packsft import PackedSFTTrainer
from packsft.data.batch import model_inputs
from packsft.model.attention import BOUNDARIES, packed_forward
from packsft.model.parts import backbone_of

PADDED = {
    "Gemma3": "gives other hidden states in a pack than alone",
    "Mllama": "cross_attention_mask relates tokens to the pictures of their row",
}
# TRL's collator gives a completion no part in cross_attention_mask, and the model fails; and see below
ONE_EACH = ("Mllama",)

RUN = {"max_steps": 4, "learning_rate": 1e-2, "optim": "sgd", "max_length": 256, "use_cpu": True}
STEP = {"per_device_train_batch_size": 6, "tokens_per_pass": 256}


def of_trl(folder, model, rows, processor, **options):
    # with models that take no number of items, TRL gives rows of micro-batches the same weight, not their tokens
    accepts = getattr(model, "accepts_loss_kwargs", True)
    one_by_one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
    ours = DEFAULTS | RUN | (one_by_one if accepts else {"per_device_train_batch_size": 6}) | options
    trained = SFTTrainer(model, SFTConfig(str(folder), **ours), train_dataset=rows, processing_class=processor)
    trained.train()
    return trained


def packed(folder, model, rows, processor, **options):
    args = config(folder, **RUN | STEP | options)
    return PackedSFTTrainer(model, args, train_dataset=rows, processing_class=processor)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_trl_unpacked(family, tmp_path):
    model, processor, asks = vision_model(family)
    rows = rows_with_pictures(20, asks)
    unused = {}
    if family in ONE_EACH:
        rows, unused = (
            texts(one_picture(rows, asks), asks),
            {"remove_unused_columns": False},
        )  # TRL would drop the texts
    alone, before = copy.deepcopy(model), weights(model)
    theirs = of_trl(tmp_path / "theirs", alone, rows, processor, **unused)
    ours = packed(tmp_path / "ours", model, rows, processor)
    ours.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)  # logged as float32
    assert error(weights(model) - before, weights(alone) - before) < 1e-6
    assert ours.isolation.isolated == (family not in PADDED)
    assert PADDED.get(family, "") in (ours.isolation.reason or "")


@pytest.mark.parametrize("family", ONE_EACH)
def test_a_model_that_other_rows_change_even_on_padded_rows_is_refused(family, tmp_path):
    model, processor, asks = vision_model(family)
    gates = [parameter for name, parameter in model.named_parameters() if "attn_gate" in name]
    assert gates
    assert not any(gate.any() for gate in gates)  # shut at first, so that no picture is seen
    for gate in gates:
        torch.nn.init.ones_(gate)
    rows = texts(rows_with_pictures(20, asks), asks)
    with pytest.raises(ValueError, match=r"row \d+ gives other hidden states beside other rows than alone, by .*TRL's"):
        packed(tmp_path, model, rows, processor)


def chats(rows, asks):
    """The same rows as messages; the template puts pictures before the first question."""
    return rows.map(
        lambda row: {
            "messages": [
                {"role": "user", "content": row["prompt"].replace(asks, "")},
                {"role": "assistant", "content": row["completion"].removesuffix(" <eos>")},
            ]
        },
        remove_columns=["prompt", "completion"],
    )


def texts(rows, asks):
    return rows.map(lambda row: {"text": row["prompt"] + row["completion"]}, remove_columns=["prompt", "completion"])


def one_picture(rows, asks):
    rows = rows.filter(lambda row: len(row["images"]) == 1)
    return rows.map(lambda row: {"image": row["images"][0]}, remove_columns=["images"])


@pytest.mark.parametrize("family", ["Qwen2VL", "Idefics3", "Gemma3"])
@pytest.mark.parametrize(
    ("form", "options"),
    [(chats, {}), (chats, {"assistant_only_loss": True}), (texts, {}), (one_picture, {}),
     (None, {"completion_only_loss": False})],
    ids=["messages", "assistant only", "text", "one picture a row", "prompts too"],
)  # fmt: skip
def test_so_are_those_of_every_form_of_rows(family, form, options, tmp_path):
    if "assistant_only_loss" in options and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("TRL needs transformers 5.18 for it")
    model, processor, asks = vision_model(family)
    rows = rows_with_pictures(20, asks)
    rows = rows if form is None else form(rows, asks)
    alone, before = copy.deepcopy(model), weights(model)
    theirs = of_trl(tmp_path / "theirs", alone, rows, processor, remove_unused_columns=form is not texts, **options)
    ours = packed(tmp_path / "ours", model, rows, processor, **options)
    ours.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)
    assert error(weights(model) - before, weights(alone) - before) < 1e-6


def trained(folder, family="Qwen2VL", evaluates=False, resume=None, **options):
    model, processor, asks = vision_model(family)
    peft = {"peft_config": options.pop("peft_config")} if "peft_config" in options else {}
    args = config(folder, **RUN | STEP | options)
    rows = rows_with_pictures(20, asks)
    held_out = rows_with_pictures(7, asks, seed=1) if evaluates else None
    ours = PackedSFTTrainer(model, args, train_dataset=rows, eval_dataset=held_out, processing_class=processor, **peft)
    ours.train(resume_from_checkpoint=resume)
    return ours


@pytest.mark.parametrize("options", [
    {"packing": False}, {"packing_strategy": "bfd", "max_length": 128, "max_steps": 3},
    {"dataloader_num_workers": 2}, {"tokens_per_pass": 90}, {"max_length": 100, "overlong": "drop"},
], ids=str)  # fmt: skip
def test_other_ways_to_pack_train(options, tmp_path):
    ours = trained(tmp_path, **options)
    assert len(losses(ours)) == ours.args.max_steps
    if not {"packing", "packing_strategy", "max_length"} & options.keys():
        assert losses(ours) == pytest.approx(losses(trained(tmp_path / "whole")), rel=1e-6)


@pytest.mark.parametrize("where", ["language_model", "visual", "both"])
def test_adapters_of_the_tower_and_of_the_language_model(where, tmp_path):
    layers = {"language_model": r".*language_model.*(q_proj|v_proj)", "visual": r".*visual.*qkv"}
    layers["both"] = "|".join(f"({pattern})" for pattern in layers.values())
    ours = trained(tmp_path, peft_config=LoraConfig(target_modules=layers[where], init_lora_weights=False))
    assert len(losses(ours)) == 4
    for name, parameter in ours.model.named_parameters():
        if "lora_A" in name:
            assert ("visual" in name) <= (where != "language_model"), name
            assert not torch.equal(parameter, torch.zeros_like(parameter)), name


def test_evaluation_and_resume(tmp_path):
    options = {"evaluates": True, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
    whole = trained(tmp_path / "whole", **options, save_strategy="steps", save_steps=2)
    resumed = trained(
        tmp_path / "whole", **options, save_strategy="no", resume=str(tmp_path / "whole" / "checkpoint-2")
    )
    assert error(weights(resumed.model), weights(whole.model)) == 0
    assert [e["eval_loss"] for e in resumed.state.log_history if "eval_loss" in e] == [
        e["eval_loss"] for e in whole.state.log_history if "eval_loss" in e
    ]


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen3VL", "LlavaNext", "InternVL", "Gemma3"])
def test_the_claims_hold_with_pictures(family, tmp_path):
    model, processor, asks = vision_model(family)
    ours = packed(tmp_path, model, rows_with_pictures(20, asks), processor)
    check = ours.check_packing()
    assert check.holds == (family not in PADDED), check.rows()
    assert all(claim.holds for claim in check.claims[1:]), check.rows()


def test_pictures_that_come_with_a_later_evaluation_set_are_checked(tmp_path):
    model, processor, asks = vision_model("Qwen2VL")
    rows = rows_with_pictures(20, asks)
    text = rows.filter(lambda row: not row["images"]).remove_columns("images")
    ours = packed(tmp_path, model, text, processor)
    assert ours.data_collator.pictures is None
    found = ours.evaluate(rows)["eval_loss"]
    assert ours.data_collator.pictures is not None
    assert found == pytest.approx(packed(tmp_path, model, rows, processor).evaluate(rows)["eval_loss"], rel=1e-9)


def reads(run):
    """Reads of the device by the host, by operator, and by method."""
    counter = ReadCounter()
    counter.on_step_begin(None, None, None)
    run()
    counter.on_pre_optimizer_step(None, None, None)
    return counter.operators, {where: count for where, count in counter.methods.items() if where != CPU_ATTENTION}


@pytest.mark.parametrize("family", ["Qwen2VL", "LlavaNext", "Idefics3"])
def test_a_pass_reads_back_what_the_model_alone_does(family, tmp_path):
    model, processor, asks = vision_model(family)
    ours = packed(tmp_path, model, rows_with_pictures(20, asks), processor, tokens_per_pass=600)
    (batch,) = next(iter(ours.get_train_dataloader()))["passes"]
    inputs = model_inputs(batch)

    def alone():
        with packed_forward():
            backbone_of(model)(**inputs, use_cache=False).last_hidden_state.sum().backward()

    def trained():
        ours._prepared.loss(model, batch, 1.0).loss.backward()

    alone(), trained()  # what is made once
    assert reads(trained) == reads(alone)


def test_a_tower_that_mixes_pictures_is_found(tmp_path):
    model, processor, asks = vision_model("LlavaNext")
    projector = model.model.multi_modal_projector
    projector.register_forward_hook(lambda module, args, features: features + 1e-9 * features.mean(0))
    ours = packed(tmp_path, model, rows_with_pictures(20, asks), processor)
    assert not ours.isolation.isolated
    assert "sees the pictures of another" in ours.isolation.reason
    assert ours.isolation.leak > 0


@pytest.mark.parametrize("options", [
    {"pad_to_multiple_of": 64}, {"loss_normalization": "example"}, {"gradient_checkpointing": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", ["Qwen2VL", "Idefics3", "Gemma3"])
def test_options_change_nothing_but_what_they_say(family, options, tmp_path):
    ours, expected = trained(tmp_path / "a", family, **options), trained(tmp_path / "b", family)
    if "loss_normalization" in options:
        assert losses(ours) != losses(expected)
    else:
        assert losses(ours) == pytest.approx(losses(expected), rel=1e-6)


def generated(rows):
    yield from rows


STREAMS = {
    "with features": lambda rows: rows.to_iterable_dataset(),
    "of shards": lambda rows: rows.to_iterable_dataset(num_shards=2),
    "of PIL pictures": lambda rows: IterableDataset.from_generator(generated, gen_kwargs={"rows": list(rows)}),
}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("family", ["Qwen2VL", "SmolVLM", "Gemma3"])
def test_a_stream_takes_the_steps_of_the_data_set(family, kind, tmp_path):
    model, processor, asks = vision_model(family)
    rows, other = rows_with_pictures(20, asks), copy.deepcopy(model)
    options = {"train_sampling_strategy": "sequential", "tokens_per_pass": 64}
    theirs = packed(tmp_path, other, rows, processor, **options)
    theirs.train()
    ours = packed(
        tmp_path,
        model,
        STREAMS[kind](rows),
        processor,
        **options | {"dataloader_num_workers": int(kind == "of shards")},
    )
    ours.train()
    assert losses(ours) == losses(theirs)
    assert torch.equal(weights(model), weights(other))
    assert ours.isolation.isolated == theirs.isolation.isolated == (family != "Gemma3")
    assert ours.evaluate(STREAMS[kind](rows))["eval_loss"] == pytest.approx(theirs.evaluate(rows)["eval_loss"])
    assert ours.check_packing().holds == theirs.check_packing().holds


@pytest.mark.parametrize("strategy", ["bfd", "none"])
def test_packs_of_a_stream_hold_every_row_once(strategy, tmp_path):
    model, processor, asks = vision_model("Qwen2VL")
    how = {"packing_strategy": "bfd", "max_length": 128} if strategy == "bfd" else {"packing": False}
    stream = rows_with_pictures(20, asks).to_iterable_dataset()
    ours = packed(tmp_path, model, stream, processor, **how | {"tokens_per_pass": None})
    rows = [row for batch in ours.get_train_dataloader() for row in batch["rows"].tolist()]
    assert sorted(rows) == list(range(20))
    ours.train()
    assert len(losses(ours)) == 4


def test_a_stream_resumes(tmp_path):
    model, processor, asks = vision_model("Qwen2VL")
    stream = rows_with_pictures(20, asks).to_iterable_dataset().shuffle(seed=0)
    saves, again = {"save_strategy": "steps", "save_steps": 2}, copy.deepcopy(model)
    whole = packed(tmp_path, model, stream, processor, **saves)
    whole.train()
    resumed = packed(tmp_path, again, stream, processor, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(again), weights(model))
    other = rows_with_pictures(20, asks, seed=1).to_iterable_dataset().shuffle(seed=0)
    with pytest.raises(ValueError, match="rows read so far"):
        packed(tmp_path, again, other, processor).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_is_wrong_with_a_row_of_a_stream_is_said(tmp_path):
    model, processor, asks = vision_model("Qwen2VL")
    rows = list(rows_with_pictures(20, asks))
    broken = [*rows[:10], rows[10] | {"prompt": asks * 3}, *rows[11:]]
    stream = STREAMS["of PIL pictures"](broken)
    with pytest.raises(ValueError, match=r"row 10 of the train stream has \d pictures, but its text asks for 3"):
        packed(tmp_path, model, stream, processor).train()
    without = STREAMS["of PIL pictures"]([row | {"images": [], "prompt": "hello"} for row in rows] * 51)
    with pytest.raises(ValueError, match="none of the first 1000 rows of the train stream has a picture"):
        packed(tmp_path, model, without, processor)


def test_columns_that_differ_between_rows_of_a_stream(tmp_path):
    model, processor, asks = vision_model("Qwen2VL")
    rows = list(rows_with_pictures(20, asks))
    first = next(row for row in rows if row["images"])
    some = [first, *({key: value for key, value in row.items() if value} for row in rows)]  # none: no key
    other = copy.deepcopy(model)
    packed(tmp_path, model, STREAMS["of PIL pictures"](some), processor).train()
    packed(tmp_path, other, STREAMS["of PIL pictures"]([first, *rows]), processor).train()
    assert torch.equal(weights(model), weights(other))
    without = {"prompt": "hello ", "completion": "hello <eos>"}
    with pytest.raises(ValueError, match="of the train stream has images, which the first row has not"):
        packed(tmp_path, model, STREAMS["of PIL pictures"]([without, *rows]), processor).train()


def test_columns_that_are_not_read_change_nothing(tmp_path):
    model, processor, asks = vision_model("Qwen2VL")
    rows = [row | {"mask": row["images"][:1] and row["images"][0].copy()} for row in rows_with_pictures(20, asks)]
    streams = [STREAMS["of PIL pictures"]([row | {"mask": copy.copy(row["mask"])} for row in rows]) for _ in range(2)]
    packed(tmp_path, copy.deepcopy(model), streams[0], processor, save_strategy="steps", save_steps=2).train()
    resumed = packed(tmp_path, model, streams[1], processor)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(losses(resumed)) == 4


@pytest.mark.parametrize("kind", ["data set", "stream", "PIL"])
def test_a_picture_within_a_message_is_refused(kind, tmp_path):
    model, processor, _ = vision_model("Qwen2VL")
    told = {"role": "assistant", "content": [{"type": "text", "text": "hello", "image": None}]}
    asked = {"role": "user", "content": [{"type": "image", "text": None, "image": "a.png"}]}
    rows = [{"messages": [told, told]}, {"messages": [asked, told]}]
    made = Dataset.from_list(rows)
    given = {"data set": made, "stream": made.to_iterable_dataset(), "PIL": STREAMS["of PIL pictures"](rows)}[kind]
    with pytest.raises(ValueError, match=r"row 1 of the train \w+ ?\w+: messages holds .* would not be read"):
        packed(tmp_path, model, given, processor).train()


def test_tools_are_not_read_beside_pictures(tmp_path, caplog):
    model, processor, asks = vision_model("Qwen2VL")
    rows = chats(rows_with_pictures(4, asks), asks).map(lambda row: {"tools": [{"name": "a"}]})
    packed(tmp_path, model, rows, processor)
    assert "has the column 'images': tools not read beside it, as in TRL" in caplog.text


def test_an_evaluation_stream_without_pictures(tmp_path):
    model, processor, asks = vision_model("Qwen2VL")
    rows = rows_with_pictures(20, asks)
    text = rows.filter(lambda row: not row["images"])
    ours = packed(tmp_path, model, text.remove_columns("images"), processor)
    assert ours.evaluate(text.to_iterable_dataset())["eval_loss"] == pytest.approx(ours.evaluate(text)["eval_loss"])


def test_a_pack_of_a_stream_reads_as_a_row(tmp_path):
    model, processor, asks = vision_model("Qwen2VL")
    pack = next(
        iter(packed(tmp_path, model, rows_with_pictures(20, asks).to_iterable_dataset(), processor).train_dataset)
    )
    assert sum(pack["seq_lengths"]) == len(pack["input_ids"]) == len(pack["labels"])


def test_a_set_without_a_picture_does_not_spare_the_next_one_the_check(tmp_path):
    model, processor, asks = vision_model("Gemma3")
    rows = rows_with_pictures(20, asks)
    empty = rows.map(lambda row: {"images": [], "prompt": row["prompt"].replace(asks, "")})
    ours = packed(tmp_path, model, empty, processor)
    assert ours.isolation.isolated
    assert ours.check_packing().holds
    ours.evaluate(rows)
    assert not ours.isolation.isolated


def test_pictures_of_another_mode_are_those_of_trl(tmp_path):
    model, processor, asks = vision_model("Qwen2VL")
    rows = rows_with_pictures(20, asks).cast_column("images", List(Image(mode="L")))
    alone, before = copy.deepcopy(model), weights(model)
    of_trl(tmp_path / "theirs", alone, rows, processor)
    packed(tmp_path / "ours", model, rows, processor).train()
    assert error(weights(model) - before, weights(alone) - before) < 1e-6


def test_another_image_processor_is_noticed_on_resume(tmp_path):
    trained(tmp_path, save_strategy="steps", save_steps=2)
    model, processor, asks = vision_model("Qwen2VL")
    processor.image_processor.image_mean = [0.1] * 3
    ours = packed(tmp_path, model, rows_with_pictures(20, asks), processor)
    with pytest.raises(ValueError, match="image processor"):
        ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_tower_does_not_get_the_boundaries_of_documents(tmp_path):
    model, processor, asks = vision_model("Llava")
    given = []
    model.model.vision_tower.register_forward_pre_hook(lambda *args: given.append(args[-1]), with_kwargs=True)
    ours = packed(tmp_path, model, rows_with_pictures(20, asks), processor)
    ours.train()
    seen = []
    model.model.vision_tower.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs), with_kwargs=True
    )
    ours.evaluate(rows_with_pictures(7, asks))
    assert any("cu_seq_lens_q" in kwargs for kwargs in given)
    assert not set(seen) & set(BOUNDARIES)
