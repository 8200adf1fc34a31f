"""Each bad input is one clear error that names the row or the field, before anything is trained."""

import copy

import pytest
import torch
from datasets import Dataset, IterableDataset
from runs import config, trainer
from tiny import ROWS, tiny_model, tiny_tokenizer, token_rows
from transformers import DataCollatorWithPadding, LlamaForSequenceClassification
from trl import SFTConfig

from packsft import PackedSFTTrainer
from packsft.data.packs import pack_dataset


def rows(*extra):
    return Dataset.from_list([*ROWS, *extra])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": None}, "packing=True needs max_length"),
        ({"packing_strategy": "best"}, "packing_strategy='best' is unknown, expected one of"),
        ({"train_dataset": Dataset.from_dict({"input_ids": [], "labels": []})}, "train_dataset is empty"),
        ({"eval_dataset": Dataset.from_dict({"input_ids": [], "labels": []})}, "eval_dataset is empty"),
        (
            {"train_dataset": Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[-100, -100]]})},
            "no example of the train data set has a token to score",
        ),
        (
            {"train_dataset": rows({"input_ids": [3, 4, 5], "labels": [3, 4]})},
            "row 5 of the data set: 2 labels for 3 input_ids",
        ),
        (
            {"train_dataset": rows({"input_ids": [3, 24], "labels": [3, 4]})},
            "row 5 of the data set: input_ids holds 24, but the vocabulary has 24 entries",
        ),
        (
            {"train_dataset": rows({"input_ids": [3, 4], "labels": [3, -7]})},
            "row 5 of the data set: labels holds -7",
        ),
        ({"eval_dataset": rows({"input_ids": [-1, 4], "labels": [3, 4]})}, "row 5 of the data set: input_ids holds -1"),
        ({"train_dataset": rows(), "max_length": 4, "overlong": "error"}, "row 0 has 5 tokens, more than max_length=4"),
        (
            {"train_dataset": rows(), "max_length": 4, "max_lost_fraction": 0.1},
            r"the train data set loses 2 of 15 tokens \(13.33%\), more than max_lost_fraction=0.1 allows: 1 of 5 "
            r"examples have no token to score and are left out, 1 of 15 tokens are lost; 1 of 5 examples are cut",
        ),
        ({"processing_class": tiny_tokenizer(eos=False)}, "has no eos_token"),
        (
            {"data_collator": DataCollatorWithPadding(tiny_tokenizer())},
            "data_collator=DataCollatorWithPadding is not supported: .* `seq_lengths`",
        ),
        (
            {"train_dataset": Dataset.from_dict({"input_ids": [[], [5]], "labels": [[], [5]]})},
            "no example of the train",
        ),
        ({"train_dataset": IterableDataset.from_generator(lambda: iter(()))}, "train_dataset is empty"),
        (
            {"train_dataset": Dataset.from_list([{"images": ["x"], "text": "why"}])},
            "has pictures, but processing_class is a .*: pass the processor of a vision-language model",
        ),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size=0: expected an integer of at least 1"),
        ({"truncation_mode": "keep_middle"}, "truncation_mode='keep_middle' is unknown"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True is not supported"),
        (
            {"model": LlamaForSequenceClassification(tiny_model().config)},
            "LlamaForSequenceClassification has no language-model head",
        ),
    ],
)
def test_a_bad_argument_is_named(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **arguments)


def test_flash_attention_2_without_its_package_is_named(tmp_path):
    from importlib.util import find_spec

    if find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' needs the package flash-attn"):
        trainer(tmp_path, model="some/model", model_init_kwargs={"attn_implementation": "flash_attention_2"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_backend": "flash"}, "attention_backend='flash' is unknown"),
        ({"on_unpackable": "stop"}, "on_unpackable"),
        ({"overlong": "cut"}, "overlong='cut' is unknown"),
        ({"packing_strategy": "bfdd"}, "packing_strategy='bfdd' is unknown, expected one of"),
        ({"max_length": 0}, "max_length=0: must be at least 1"),
        ({"max_length": None, "packing": True}, "max_length=None: packing=True needs max_length"),
        ({"overlong": "drop", "packing_strategy": "bfd_split"}, "overlong='drop' contradicts the strategy 'bfd_split'"),
        ({"max_lost_fraction": 1.5}, "max_lost_fraction=1.5: must be a number from 0 to 1"),
    ],
)
def test_a_bad_field_of_the_configuration_is_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_a_back_end_that_cannot_run_here_is_refused_with_its_reason(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU may be able to run it")
    with pytest.raises(ValueError, match="backend='torch_varlen' cannot run this attention: it needs a CUDA device"):
        trainer(tmp_path, attention_backend="torch_varlen")


def test_a_model_that_cannot_be_packed_stops_the_run_where_that_was_asked_for(tmp_path):
    with pytest.raises(ValueError, match="cannot be trained on packed documents"):
        trainer(tmp_path, model=tiny_model("stablelm"), on_unpackable="error")


def test_the_callers_configuration_is_left_as_it_was(tmp_path):
    args = SFTConfig(str(tmp_path), packing=True, max_length=32, bf16=False, use_cpu=True, report_to="none")
    before = args.to_dict()
    trainer(tmp_path, args=args, train_dataset=token_rows(4))
    assert args.to_dict() == before


@pytest.mark.parametrize("name", ["", "/no/such/folder"])
def test_a_tokenizer_that_cannot_be_loaded_is_one_error(name, tmp_path):
    model = tiny_model("llama")
    model.config._name_or_path = name
    with pytest.raises(ValueError, match=f"processing_class=None, and no tokenizer can be loaded from '{name}'"):
        PackedSFTTrainer(model, config(tmp_path), train_dataset=token_rows(4))


@pytest.mark.parametrize("column", ["input_ids", "labels"])
def test_a_missing_column_is_named(column):
    dataset = rows().remove_columns(column)
    with pytest.raises(ValueError, match=f"the data set has no column '{column}'"):
        pack_dataset(dataset, 8, strategy="bfd", name="train")


def test_a_name_of_older_versions_is_said():
    with pytest.raises(ValueError, match="pass it as processing_class"):
        PackedSFTTrainer(tiny_model(), train_dataset=rows(), tokenizer=tiny_tokenizer())


def test_arguments_of_another_type_are_refused(tmp_path):
    with pytest.raises(ValueError, match="args is a dict, expected a PackedSFTConfig or an SFTConfig"):
        trainer(tmp_path, args={"output_dir": str(tmp_path)})
    for options, message in (
        ({"packing": "false"}, "packing='false' is a str, expected bool"),
        ({"eval_packing": "no"}, "eval_packing='no' is a str, expected bool"),
        ({"assistant_only_loss": "false"}, "assistant_only_loss='false' is a str, expected bool"),
        ({"max_steps": 2.5}, "max_steps=2.5 is a float, expected int"),
        ({"max_length": True}, "max_length=True is a bool, expected int"),
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3' is a str, expected float"),
        ({"train_sampling_strategy": "x"}, "train_sampling_strategy='x' is unknown, expected one of .'random', 'seq"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size=0: expected an integer of at least 1"),
        ({"pad_to_multiple_of": 1.5}, "pad_to_multiple_of=1.5: expected an integer of at least 1"),
        ({"dataset_kwargs": "x"}, "dataset_kwargs='x': expected a dict"),
        ({"train_dataset": ROWS}, "train_dataset is a list, expected a datasets.Dataset or IterableDataset"),
        ({"eval_dataset": "name"}, "eval_dataset is a str, expected a datasets.Dataset or IterableDataset"),
        ({"eval_dataset": {"a": None}}, r"eval_dataset\['a'\] is a NoneType, expected a datasets.Dataset or Iterable"),
        ({"eval_dataset": {1: token_rows(4)}}, "eval_dataset has the key 1, expected a text: the name of the data set"),
        ({"max_lost_fraction": "5%"}, "max_lost_fraction='5%': must be a number from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **options)


def test_a_model_of_another_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model is a NoneType, expected a model, or the name or folder of one"):
        PackedSFTTrainer(None, config(tmp_path), train_dataset=rows())


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_empty_completions_are_one_notice(stream, tmp_path, caplog):
    texts = [{"prompt": "what is", "completion": completion} for completion in ("", " yes", "", " no", "")]
    data = Dataset.from_list(texts).select([2, 1, 0, 3])  # without the last
    data = data.to_iterable_dataset() if stream else data
    ours = trainer(tmp_path, train_dataset=data, completion_only_loss=True, max_steps=2)
    list(ours.get_train_dataloader())
    counted = "train stream: some completions" if stream else "train data set: 2 of 4 completions"
    notices = [message for message in caplog.messages if "completions are empty" in message]
    assert notices == [f"{counted} are empty: there, at most the EOS token is scored"]
    caplog.clear()
    trainer(tmp_path, train_dataset=Dataset.from_list(texts), completion_only_loss=False)  # the prompts are scored
    assert "are empty" not in caplog.text


def test_a_formatting_function_that_gives_no_text_is_named(tmp_path):
    texts = Dataset.from_list([{"q": "what is"}, {"q": "tell me"}])
    for given, shown in ((["a", "b"], r"\['a', 'b'\]"), (None, "None")):
        with pytest.raises(ValueError, match=rf"row 0 of the train data set: formatting_func gives {shown}, expected"):
            trainer(tmp_path, train_dataset=texts, formatting_func=lambda row, given=given: given)


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    "columns", [{"q": "joke"}, {"messages": [{"role": "user", "content": "joke"}]}], ids=["q", "m"]
)
def test_what_a_formatting_function_gives_is_what_is_trained_on(columns, stream, tmp_path):
    data = Dataset.from_list([columns] * 4)
    ours = trainer(
        tmp_path, train_dataset=data.to_iterable_dataset() if stream else data, dataset_text_field="q", max_steps=1,
        formatting_func=lambda row: "tell me",
    )  # fmt: skip
    batch = next(iter(ours.get_train_dataloader()))
    assert batch["passes"][0]["input_ids"][0, :3].tolist() == [*tiny_tokenizer()("tell me")["input_ids"], 1]


NEVER_NONE = [
    "attention_backend", "check_packing", "loss_normalization", "on_changed", "on_nonfinite", "on_unpackable",
]  # fmt: skip


@pytest.mark.parametrize("name", NEVER_NONE)
def test_a_choice_without_a_default_of_none_is_never_none(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}=None is unknown, expected one of"):
        config(tmp_path, **{name: None})


def test_a_text_may_stand_beside_a_column_of_the_name_of_packs(tmp_path):
    rows = Dataset.from_list([{"text": "a b c", "seq_lengths": [3]}] * 4)
    assert len(trainer(tmp_path, train_dataset=rows).train_dataset) == 4


def test_another_model_than_that_of_the_constructor_is_named(tmp_path):
    ours = trainer(tmp_path)
    ours.model = copy.deepcopy(ours.model)
    ours.evaluate(token_rows(4))
    ours.model = tiny_model("llama")
    for run in (ours.train, lambda: ours.evaluate(token_rows(4))):
        with pytest.raises(ValueError, match="this LlamaForCausalLM is not the model that the trainer was made with"):
            run()
