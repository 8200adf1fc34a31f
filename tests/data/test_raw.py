"""Texts and messages as users give them: of several forms, with nulls or doubled tokens: right or named."""

import datetime
import json

import pyarrow as pa
import pytest
from datasets import Dataset
from documents import documents, ids_of, said, streamed
from forms import character_tokenizer
from runs import trainer
from tiny import ROWS, VOCAB, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from packsft.data.streams import PackedStream

QUESTION, ANSWER = {"role": "user", "content": "why"}, {"role": "assistant", "content": "no"}
CHAT = [QUESTION, ANSWER]


def words(text):
    return [VOCAB.index(word) for word in text.split()]


# ---- forms ----

FORMS = {
    "text": {"text": "tell me a joke"},
    "prompt": {"prompt": "two plus two", "completion": " four"},
    "messages": {"messages": CHAT},
    "conversations": {"conversations": [{"from": "user", "value": "hello"}, {"from": "assistant", "value": "yes"}]},
}
IDS = {
    "text": words("tell me a joke <eos>"),
    "prompt": words("two plus two four <eos>"),
    "messages": words("user why assistant no <eos>"),
    "conversations": words("user hello assistant yes <eos>"),
}


@pytest.mark.parametrize("source", [Dataset.from_list, streamed], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("forms", "trained", "left"),
    [
        (["text", "prompt", "messages"], "prompt", "prompt and completion is trained on; messages and text is not"),
        (["text", "messages"], "messages", "messages is trained on; text is not"),
        (["conversations", "text"], "conversations", "conversations is trained on; text is not"),
        (["messages"], "messages", ""),
    ],
)
def test_of_several_forms_one_is_trained_on_and_a_notice_names_the_others(
    forms, trained, left, source, tmp_path, caplog
):
    row = {key: value for form in forms for key, value in FORMS[form].items()}
    ours = trainer(tmp_path, train_dataset=source([row, row]), max_steps=1)
    assert ids_of(ours.train_dataset) == [IDS[trained]] * 2
    assert "".join(said(caplog, "is trained on")).removeprefix("train data set: ").removesuffix(" read") == left


def test_rows_of_a_stream_may_lack_columns_of_the_first_and_have_others(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if tools %}hello {% endif %}" + tokenizer.chat_template
    rows = [{"messages": CHAT, "id": 1, "tools": []}, {"messages": CHAT, "tools": [{"a": 1}]}, {"messages": CHAT}]
    rows += [{"messages": CHAT, "prompt": "why", "completion": " no", "text": "two"}]
    ours = trainer(tmp_path, train_dataset=streamed(rows), processing_class=tokenizer, max_steps=1)
    plain, with_tools = IDS["messages"], words("hello") + IDS["messages"]
    assert ids_of(ours.train_dataset) == [plain, with_tools, plain, plain]
    for row, message in (
        (FORMS["text"] | {"labels": 1}, "row 1 of the train stream has labels, which the first row has not"),
        (FORMS["messages"], "row 1 of the train stream: text is None, expected a text"),
    ):
        with pytest.raises(ValueError, match=message):
            list(trainer(tmp_path, train_dataset=streamed([FORMS["text"], row]), max_steps=1).train_dataset)


@pytest.mark.parametrize("form", [None, "numpy"])
def test_a_column_that_the_format_hides_is_not_read(form, tmp_path):
    rows = Dataset.from_list([FORMS["text"] | FORMS["messages"]]).with_format(form, columns=["text"])
    assert ids_of(trainer(tmp_path, train_dataset=rows).train_dataset) == [IDS["text"]]


@pytest.mark.parametrize("row", [{"prompt": "why", "messages": CHAT}, {"completion": "no", "messages": CHAT}], ids=str)
def test_a_prompt_or_completion_alone_is_no_form(row, tmp_path):
    assert ids_of(trainer(tmp_path, train_dataset=Dataset.from_list([row])).train_dataset) == [IDS["messages"]]


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")], ids=str)
def test_both_keys_of_messages_work_in_both_columns(column, keys, tmp_path):
    chat = [dict(zip(keys, message.values(), strict=True)) for message in CHAT]
    rows = Dataset.from_list([{column: chat}])
    assert ids_of(trainer(tmp_path, train_dataset=rows).train_dataset) == [IDS["messages"]]


@pytest.mark.parametrize("column", ["labels", "attention_mask", "position_ids", "completion_mask", "assistant_masks"])
@pytest.mark.parametrize("value", [1, [0, 1]], ids=["a class", "one-hot"])
def test_a_column_of_tokens_beside_a_text_is_refused(column, value, tmp_path):
    rows = Dataset.from_list([{"text": "why", column: value}])
    with pytest.raises(ValueError, match=f"the train data set has the column '{column}', which goes with input_ids"):
        trainer(tmp_path, train_dataset=rows)


def test_rows_of_no_form_are_named_with_their_columns(tmp_path):
    rows = Dataset.from_list([{"question": "why", "answer": "no"}])
    with pytest.raises(ValueError, match="eval data set has only the columns question, answer: expected input"):
        trainer(tmp_path, eval_dataset=rows)


# ---- nulls ----

SILENT = [
    [{"role": "user", "content": None}],
    [{"role": None, "content": "why"}],
    [{"role": "user", "content": "why", "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": []}],
    [{"role": "user", "content": "why", "name": "a"}, {"role": "assistant", "content": None, "name": "b"}],
]


@pytest.mark.parametrize("chat", SILENT, ids=str)
@pytest.mark.parametrize("column", ["messages", "prompt"])
@pytest.mark.parametrize("source", [Dataset.from_list, streamed], ids=["map", "stream"])
def test_a_message_without_a_role_or_anything_to_say_is_named_by_its_row(chat, column, source, tmp_path):
    beside = {"completion": [ANSWER]} if column == "prompt" else {}
    rows = [{column: CHAT} | beside, {column: CHAT} | beside, {column: chat} | beside]
    with pytest.raises(
        ValueError, match=rf"row 2 of the train (data set|stream): {column} is \[.*, expected a list of"
    ):
        list(trainer(tmp_path, train_dataset=source(rows), max_steps=1).train_dataset)


def test_a_number_is_no_content_and_a_call_needs_none(tmp_path):
    with pytest.raises(ValueError, match="row 0 of the train data set: messages is"):
        trainer(tmp_path, train_dataset=Dataset.from_list([{"messages": [{"role": "user", "content": 5}]}]))
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "joke"}}]}
    ours = trainer(tmp_path, train_dataset=Dataset.from_list([{"messages": [QUESTION, call]}]))
    assert len(ids_of(ours.train_dataset)) == 1


CALL = {"role": "assistant"}
ARROW_ROWS = [
    {
        "messages": [
            QUESTION,
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        ],
        "tools": [{"name": "f", "parameters": {"a": {"type": "integer"}}}],
        "chat_template_kwargs": {"flag": "yes"},
    },
    {
        "messages": [{"role": "user", "content": "why", "name": "me"}, ANSWER],
        "tools": [{"name": "g", "parameters": {"b": {"type": "string"}}}],
        "chat_template_kwargs": {"other": 1},
    },
    {"messages": CHAT},
]


@pytest.mark.parametrize("source", [Dataset.from_list, lambda rows: Dataset.from_list(rows).to_iterable_dataset()])
def test_ids_are_those_of_the_original_messages_and_not_of_the_nulls_that_arrow_fills_in(source, tmp_path):
    tokenizer = character_tokenizer()
    expected = []
    for row in ARROW_ROWS:
        kwargs = row.get("chat_template_kwargs", {})
        messages = [{"content": None} | message for message in row["messages"]]  # of a call, content is null or absent
        messages = [
            {key: message[key] for key in ("role", "content", *message) if key in message} for message in messages
        ]
        expected.append(
            tokenizer.apply_chat_template(messages, tools=row.get("tools"), return_dict=True, **kwargs)["input_ids"]
        )
    model = tiny_model(vocab_size=len(tokenizer))
    ours = trainer(
        tmp_path, model=model, train_dataset=source(ARROW_ROWS), processing_class=tokenizer, max_length=400, max_steps=1
    )
    assert sorted(ids_of(ours.train_dataset)) == sorted(expected)
    assert "null" not in tokenizer.decode(expected[2])


# ---- tokens that come twice ----


def bos_and_eos_tokenizer():
    """Adds `hello` before and `<eos>` after a text."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "hello"
    ends = [("hello", VOCAB.index("hello")), ("<eos>", VOCAB.index("<eos>"))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="hello $A <eos>", special_tokens=ends)
    return tokenizer


@pytest.mark.parametrize("source", [Dataset.from_list, streamed], ids=["map", "stream"])
@pytest.mark.parametrize("form", ["text", "prompt and completion"])
def test_a_text_begins_and_ends_with_one_token_that_the_tokenizer_adds(source, form, tmp_path, caplog):
    texts = ["hello why no <eos>", "why no", "why no <eos> \n ", "hello hello no <eos>"]
    rows = [{"text": text} for text in texts]
    if form != "text":
        rows = [{"prompt": text.rsplit("no", 1)[0], "completion": "no" + text.rsplit("no", 1)[1]} for text in texts]
    tokenizer = bos_and_eos_tokenizer()
    ours = trainer(tmp_path, train_dataset=source(rows), processing_class=tokenizer, max_steps=1)
    found = documents(ours.train_dataset)
    whole = words("hello why no <eos>")
    assert [ids for ids, _ in found] == [whole, whole, whole, words("hello hello no <eos>")]
    unscored = 1 if form == "text" else 2
    assert found[0][1] == [-100] * unscored + whole[unscored:]
    assert len(said(caplog, "4 texts hold the bos_token or eos_token that the tokenizer adds")) == 1


def test_tokens_that_the_user_doubled_stay(tmp_path):
    tokenizer = bos_and_eos_tokenizer()
    ids = words("hello hello why <eos> <eos>")
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids}])
    ours = trainer(tmp_path, train_dataset=rows, processing_class=tokenizer)
    assert ids_of(ours.train_dataset) == [ids]


# ---- too few ----


def test_a_last_batch_that_is_dropped_and_is_the_only_one_is_refused(tmp_path):
    options = {"packing": True, "packing_strategy": "bfd", "dataloader_drop_last": True, "max_length": 8}
    few, many = Dataset.from_list(ROWS), Dataset.from_list(ROWS * 8)
    for sets, name in (({"train_dataset": few}, "train"), ({"train_dataset": many, "eval_dataset": few}, "eval")):
        with pytest.raises(ValueError, match=f"leaves nothing of the {name} data set: 2 packs, and a batch .* takes 8"):
            trainer(tmp_path, **sets, **options)


# ---- evaluation and prediction ----


def test_each_evaluation_set_has_its_own_metrics_and_one_chooses_the_best_model(tmp_path):
    rows = Dataset.from_list(ROWS)
    ours = trainer(
        tmp_path, eval_dataset={"a": rows.select([0, 1]), "b": rows.select([2, 4])}, eval_strategy="epoch",
        save_strategy="best", metric_for_best_model="eval_b_mean_token_accuracy", num_train_epochs=2,
    )  # fmt: skip
    ours.train()
    metrics = ours.evaluate()
    keys = ("loss", "mean_token_accuracy", "entropy", "num_tokens")
    assert {f"eval_{name}_{key}" for name in "ab" for key in keys} <= metrics.keys()
    assert not {f"eval_{key}" for key in keys} & metrics.keys()
    assert metrics["eval_a_entropy"] == pytest.approx(ours.evaluate(rows.select([0, 1]))["eval_entropy"])
    assert ours.state.best_metric is not None


@pytest.mark.parametrize("packing", [True, False])
def test_predict_prepares_raw_rows_as_evaluate_does(packing, tmp_path):
    rows = Dataset.from_list([{"prompt": "why", "completion": " no why two"}, {"prompt": "tell", "completion": " me"}])
    ours = trainer(tmp_path, train_dataset=rows, packing=packing, max_length=4)
    predicted = ours.predict(rows)
    evaluated = ours.evaluate(rows)
    assert predicted.metrics["test_loss"] == pytest.approx(evaluated["eval_loss"])
    assert (predicted.label_ids != -100).sum() == 3 + 2  # within max_length, without prompts


# ---- steps ----


@pytest.mark.parametrize("epochs", [0, -1, float("inf")])
def test_max_steps_needs_no_epochs(epochs, tmp_path):
    assert trainer(tmp_path, max_steps=3, num_train_epochs=epochs).train().global_step == 3
    with pytest.raises(ValueError, match=f"num_train_epochs={epochs}: must be above 0, unless max_steps is set"):
        trainer(tmp_path, num_train_epochs=epochs).train()


# ---- chat templates ----

OWN_ROLES = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% elif m.role == 'bad' %}{{ fail() }}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")], ids=str)
def test_a_role_that_the_template_leaves_out_is_noticed_on_its_first_row(keys, tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = OWN_ROLES
    chats = [
        [("user", "why two"), ("assistant", "no")],
        [("user", "why two"), ("human", "hello")],
        [("human", "hello")],
    ]
    rows = Dataset.from_list([{"messages": [dict(zip(keys, m, strict=True)) for m in chat]} for chat in chats])
    trainer(tmp_path, train_dataset=rows, processing_class=tokenizer)
    trainer(tmp_path, train_dataset=rows.select([0]), processing_class=tokenizer)
    found = said(caplog, "the chat template leaves out what the role")
    assert found == ["train data set: the chat template leaves out what the role 'human' says, as in row 1: 'hello'"]


@pytest.mark.parametrize("source", [Dataset.from_list, streamed], ids=["map", "stream"])
def test_a_template_that_fails_shows_the_messages(source, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = OWN_ROLES
    rows = source([{"messages": [{"role": "bad", "content": "why"}]}])
    with pytest.raises(
        ValueError, match=r"the chat template fails on a row of the train data set, \[\{'content': 'why'"
    ):
        list(trainer(tmp_path, train_dataset=rows, processing_class=tokenizer, max_steps=1).train_dataset)


@pytest.mark.parametrize("source", [Dataset.from_list, streamed], ids=["map", "stream"])
def test_a_row_without_an_assistant_is_shown_where_assistants_alone_are_scored(source, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} {% endgeneration %}"
        "{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    rows = source([{"messages": CHAT}, {"messages": [QUESTION | {"content": "hello"}]}])
    options = {"assistant_only_loss": True, "max_steps": 1, "processing_class": tokenizer}
    with pytest.raises(ValueError, match=r"assistant_only_loss=True: a row of the train data set .*'hello'"):
        list(trainer(tmp_path, train_dataset=rows, **options).train_dataset)


def test_a_role_whose_parts_the_template_leaves_out_is_noticed(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}why {{ m.content if m.content is string else '' }} {% endfor %}"
    question = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "no"}]}
    trainer(tmp_path, train_dataset=Dataset.from_list([{"messages": [question, answer]}]), processing_class=tokenizer)
    assert said(caplog, "the chat template leaves out what the role 'user' says, as in row 0")


def test_half_of_a_surrogate_pair_is_no_text(tmp_path):
    with pytest.raises(ValueError, match=r"row 1 of the train stream: text is '\\ud83d', expected a text"):
        list(
            trainer(tmp_path, train_dataset=streamed([{"text": "why"}, {"text": "\ud83d"}]), max_steps=1).train_dataset
        )


# ---- what must not pass in silence ----


def test_streams_that_differ_late_in_a_row_have_other_samples(tmp_path):
    rows = [{"input_ids": [3] * 200 + [i], "labels": [3] * 200 + [i]} for i in range(8)]
    samples = [PackedStream(streamed(part), None, strategy="none").sample() for part in (rows, rows[::-1], rows[:4])]
    assert len(set(samples)) == 3
    assert PackedStream(streamed(rows), None, strategy="none").sample() == samples[0]
    dated = [row | {"at": datetime.date(2000, 1, 1), "id": b"a"} for row in rows]
    assert len(ids_of(trainer(tmp_path, train_dataset=streamed(dated), max_length=400, max_steps=1).train_dataset)) == 8


@pytest.mark.parametrize("source", [Dataset.from_list, streamed], ids=["map", "stream"])
def test_completion_only_loss_without_an_effect_is_noticed(source, tmp_path, caplog):
    masked = source([{"input_ids": [3, 4, 5], "completion_mask": [0, 1, 1]}] * 2)
    ours = trainer(tmp_path, train_dataset=masked, max_steps=1)
    assert documents(ours.train_dataset)[0][1] == [-100, 4, 5]
    assert said(caplog, "completion_mask beside input_ids: not read")
    ours = trainer(tmp_path, train_dataset=masked, completion_only_loss=True, max_steps=1)
    assert documents(ours.train_dataset)[0][1] == [-100, 4, 5]
    for rows, missing in (([{"input_ids": [3, 4]}], "completion_mask or labels"), ([FORMS["messages"]], "prompt")):
        trainer(tmp_path, train_dataset=source(rows), completion_only_loss=True, max_steps=1)
        assert said(caplog, f"completion_only_loss=True: no effect on train_dataset, which has no {missing}")


@pytest.mark.parametrize(
    "later", [{"labels": [-100, 7]}, {"seq_lengths": [1, 1]}, {"assistant_masks": [0, 1]}], ids=str
)
def test_a_column_of_tokens_that_begins_later_in_a_stream_is_named(later, tmp_path):
    rows = [{"input_ids": [3, 4]}, {"input_ids": [6, 7]} | later]
    with pytest.raises(
        ValueError, match=f"row 1 of the train stream has {next(iter(later))}, which the first row has not"
    ):
        list(trainer(tmp_path, train_dataset=streamed(rows), max_steps=1).train_dataset)


def test_nulls_that_the_user_wrote_stay_in_python_objects_and_in_json(tmp_path):
    tokenizer = character_tokenizer()
    tools = [{"name": "f", "parameters": {"a": {"default": None}}}]
    call = {"role": "assistant", "content": "no", "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]}
    model = tiny_model(vocab_size=len(tokenizer))
    options = {"model": model, "processing_class": tokenizer, "max_length": 400, "max_steps": 1}
    ours = trainer(tmp_path, train_dataset=streamed([{"messages": [QUESTION, call], "tools": tools}]), **options)
    expected = tokenizer.apply_chat_template([QUESTION, call], tools=tools, return_dict=True)["input_ids"]
    assert ids_of(ours.train_dataset) == [expected]
    ours = trainer(
        tmp_path, train_dataset=Dataset.from_list([{"messages": CHAT, "tools": json.dumps(tools)}]), **options
    )
    expected = tokenizer.apply_chat_template(CHAT, tools=tools, return_dict=True)["input_ids"]
    assert ids_of(ours.train_dataset) == [expected]


def test_evaluate_and_predict_check_rows_as_the_constructor_does(tmp_path):
    ours = trainer(tmp_path, eval_dataset={"a": Dataset.from_list(ROWS)})
    packed = Dataset.from_list([{"input_ids": [3, 4, 5, 6], "seq_lengths": [2, 2]}])
    empty = Dataset.from_dict({"input_ids": [], "labels": []})
    for call in (ours.evaluate, ours.predict):
        for rows, message in (
            (packed, "has the column seq_lengths"),
            (empty, "is empty"),
            (ROWS, "is a list, expected"),
        ):
            with pytest.raises(ValueError, match=f"(eval|test) data set {message}"):
                call(rows)
    with pytest.raises(ValueError, match="there is no evaluation set 'b', only a"):
        ours.evaluate("b")


def test_a_set_of_another_form_than_the_training_set_is_scored_by_it_and_a_notice_says_so(tmp_path, caplog):
    rows = Dataset.from_list([FORMS["prompt"]])
    trainer(tmp_path, train_dataset=Dataset.from_list([FORMS["text"]]), eval_dataset=rows)
    assert said(caplog, "eval data set: prompts are scored too, as the first row of the training set decides")


def test_columns_beside_those_of_a_format_are_read_if_it_gives_them(tmp_path, caplog):
    rows = Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [-100, -100, 5]}])
    whole = rows.with_format("torch", columns=["input_ids"], output_all_columns=True)
    assert documents(trainer(tmp_path, train_dataset=whole).train_dataset)[0][1] == [-100, -100, 5]
    assert not said(caplog, "its format hides")
    trainer(tmp_path, train_dataset=rows.with_format("torch", columns=["input_ids"]))
    assert said(caplog, "train data set: its format hides labels: not read")


@pytest.mark.parametrize("extra", [{"id": 1}, {"weight": 0.0}, {"function_call": {"name": None}}], ids=str)
def test_a_message_whose_content_is_null_says_nothing_whatever_else_it_holds(extra, tmp_path):
    rows = Dataset.from_list(
        [{"messages": CHAT}, {"messages": [QUESTION, {"role": "assistant", "content": None} | extra]}]
    )
    with pytest.raises(ValueError, match="row 1 of the train data set: messages is"):
        trainer(tmp_path, train_dataset=rows)


def test_a_role_that_the_template_leaves_out_is_noticed_in_a_stream(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = OWN_ROLES
    rows = streamed([{"messages": [{"role": "human", "content": "hello"}, QUESTION]}])
    trainer(tmp_path, train_dataset=rows, processing_class=tokenizer, max_steps=1)
    assert said(caplog, "the chat template leaves out what the role 'human' says, as in row 0")


def test_the_notice_about_roles_reads_the_arguments_of_the_template(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ who.upper() }} {% if show %}" + tokenizer.chat_template + "{% endif %}"
    rows = Dataset.from_list([{"messages": CHAT, "chat_template_kwargs": {"who": "bob", "show": True}}])
    trainer(tmp_path, train_dataset=rows, processing_class=tokenizer)
    assert not said(caplog, "leaves out")


def test_tokens_are_taken_once_only_if_the_tokenizer_adds_them(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "why"
    rows = Dataset.from_list([{"text": "why why no <eos> <eos>"}])
    ours = trainer(tmp_path, train_dataset=rows, processing_class=tokenizer)
    assert ids_of(ours.train_dataset) == [words("why why no <eos> <eos>")]


BESIDE = {
    "broken tools": ({"tools": "not json"}, "tools is 'not json', which is no JSON"),
    "a number": ({"tools": "3"}, "tools is 3, expected a list of tools"),
    "text for arguments": ({"chat_template_kwargs": "x"}, "chat_template_kwargs is 'x', expected a dict"),
    "what the trainer sets": ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs has 'tokenize'"),
}


@pytest.mark.parametrize("source", [Dataset.from_list, streamed], ids=["map", "stream"])
@pytest.mark.parametrize("case", list(BESIDE))
def test_what_goes_with_messages_is_checked_by_row(case, source, tmp_path):
    beside, message = BESIDE[case]
    good = {"tools": "[]"} if "tools" in beside else {"chat_template_kwargs": None}
    rows = [FORMS["messages"] | good, FORMS["messages"] | beside]
    with pytest.raises(ValueError, match=f"row 1 of the train (data set|stream): {message}"):
        list(trainer(tmp_path, train_dataset=source(rows), max_steps=1).train_dataset)
    trainer(tmp_path, train_dataset=source([FORMS["text"] | beside]), max_steps=1)  # no message: not read


def test_json_of_a_selected_row_is_checked_where_the_same_stands_in_one_that_is_not(tmp_path):
    rows = Dataset.from_list([FORMS["messages"] | {"tools": tools} for tools in ("no json", "[]", "no json")])
    with pytest.raises(ValueError, match="row 1 of the train data set: tools is 'no json', which is no JSON"):
        trainer(tmp_path, train_dataset=rows.select([1, 2]))
    trainer(tmp_path, train_dataset=rows.select([1]))


def test_a_text_may_be_in_a_column_of_any_name_and_type(tmp_path):
    for field in ("prompt", "tools", "chat_template_kwargs", "body"):
        for source in (Dataset.from_list, streamed):
            rows = source([{field: FORMS["text"]["text"]}])
            ours = trainer(tmp_path, train_dataset=rows, dataset_text_field=field, max_steps=1)
            assert ids_of(ours.train_dataset) == [IDS["text"]]
    views = Dataset(pa.table({"text": pa.array([FORMS["text"]["text"]], pa.string_view())}))
    assert ids_of(trainer(tmp_path, train_dataset=views).train_dataset) == [IDS["text"]]


def test_a_stream_of_arrays_is_read_as_plain_messages(tmp_path):
    rows = Dataset.from_list([FORMS["messages"]]).with_format("numpy").to_iterable_dataset()
    assert ids_of(trainer(tmp_path, train_dataset=rows, max_steps=1).train_dataset) == [IDS["messages"]]
