"""`packsft inspect`: every form of data gives the report of the trainer that gets the same; bad input is one line."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict
from forms import FORMS
from PIL import Image
from runs import config, trainer
from tiny import ROWS, tiny_tokenizer
from vision import rows_with_pictures, vision_model

from packsft import compat
from packsft.app import rows as rows_of_files
from packsft.app.cli import main
from packsft.app.drawing import draw_plan
from packsft.app.inspect import inspect_data
from packsft.app.rows import load_rows
from packsft.compat import prepare_rows
from packsft.packing import plan_packs

STEPS = {"per_device_train_batch_size": 2, "num_train_epochs": 2.0}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tokens(tmp_path) -> str:
    """The five rows of the tour, of lengths 5, 2, 3, 1 and 4."""
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "tokens")
    return str(tmp_path / "tokens")


def write(tmp_path, text: str, name: str = "rows.jsonl") -> str:
    (tmp_path / name).write_text(text, errors="surrogateescape")
    return str(tmp_path / name)


# ---- the same as the trainer ----


@pytest.mark.parametrize("form", [form for form in FORMS if "another name" not in form])
def test_report_is_the_trainers(form, tmp_path, tokenizer_folder):
    dataset, options = FORMS[form]
    dataset.to_json(tmp_path / "rows.jsonl")
    got = inspect_data(str(tmp_path / "rows.jsonl"), model=tokenizer_folder, max_length=8, **STEPS, **options)
    expected = trainer(tmp_path, train_dataset=dataset, max_length=8, packing_strategy="bfd", **STEPS, **options)
    assert got.report == expected.packing_report
    assert got.plan.fingerprint == expected.train_dataset.plan.fingerprint


@pytest.mark.parametrize("form", [form for form in FORMS if form != "tokens and labels"])
def test_rows_prepared_without_a_trainer_are_those_in_the_trainer(form, tmp_path):
    dataset, options = FORMS[form]
    rows = prepare_rows(dataset, tiny_tokenizer(), config(tmp_path, **options | {"max_length": None, "packing": False}))
    expected = trainer(tmp_path, train_dataset=dataset, max_length=64, **options).train_dataset.rows
    for row in range(len(dataset)):
        ids, labels = expected.tokens(row, 0, 64)
        assert (rows[row]["input_ids"], rows[row]["labels"]) == (ids.tolist(), labels.tolist())


@pytest.mark.parametrize("completion_only_loss", [None, True])
def test_masks_of_tokenised_rows_become_the_labels_that_trl_makes(tmp_path, completion_only_loss):
    rows = Dataset.from_list(
        [
            {"input_ids": [3, 4, 5, 6], "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 1, 0]},
            {"input_ids": [7, 8], "completion_mask": [0, 1], "assistant_masks": [1, 1]},
            {"input_ids": [9], "completion_mask": [1], "assistant_masks": [1]},
        ]
    ).select([2, 0, 1])
    got = rows_of_files.label_rows(rows, completion_only_loss)
    expected = trainer(tmp_path, train_dataset=rows, completion_only_loss=completion_only_loss).train_dataset.rows
    for row in range(3):
        ids, labels = expected.tokens(row, 0, 4)
        assert (got[row]["input_ids"], got[row]["labels"]) == (ids.tolist(), labels.tolist())


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 2)])
def test_tokens_without_labels_are_all_scored_whatever_the_kind_of_list(tmp_path, kind):
    lists = pa.array([[3, 4], [5, 6]]).cast(kind)
    Dataset(pa.table({"input_ids": lists})).save_to_disk(tmp_path / "tokens")
    report = inspect_data(str(tmp_path / "tokens")).report
    assert (report.account.examples_packed, report.account.tokens_kept, report.packs) == (2, 4, 1)


def test_several_processes_tokenise_as_one(tmp_path, tokenizer_folder, monkeypatch):
    dataset, _ = FORMS["prompt and completion"]
    dataset.to_json(tmp_path / "rows.jsonl")
    alone = inspect_data(str(tmp_path / "rows.jsonl"), model=tokenizer_folder)
    seen = []
    monkeypatch.setattr(rows_of_files, "ROWS_PER_PROCESS", 2)
    monkeypatch.setattr(rows_of_files.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(
        compat,
        "prepare_rows",
        lambda rows, *rest: (seen.append(rest[1].dataset_num_proc), prepare_rows(rows, *rest))[1],
    )
    assert inspect_data(str(tmp_path / "rows.jsonl"), model=tokenizer_folder).report == alone.report
    assert seen == [2]


# ---- sources ----


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow", "folder", "folder with splits"])
def test_every_kind_of_file_holds_the_same_rows(tmp_path, suffix):
    dataset, path = Dataset.from_list(ROWS), tmp_path / f"rows.{suffix}"
    if suffix == "folder":
        dataset.save_to_disk(path)
    elif suffix == "folder with splits":
        DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(path)
    elif suffix == "arrow":
        dataset.save_to_disk(tmp_path / "saved")
        path = next((tmp_path / "saved").glob("*.arrow"))
    elif suffix == "parquet":
        dataset.to_parquet(path)
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    else:
        dataset.to_json(path)
    assert load_rows(str(path)).to_list() == ROWS


ODD_NAMES = ("rows[1]", "*", "a{b}", "[/y]", ":cat:", "a  b", "üç", "http:", "a#b", "a$", "?", "a\nb", "~")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "arrow", "folder"])
def test_a_path_is_never_a_pattern(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # so that the name is all of the path
    for number, name in enumerate(ODD_NAMES):  # each has other rows, so that no other file is read
        rows, path = Dataset.from_dict({"text": [f"row {number}"]}), Path(f"{name}.{suffix}")
        path.parent.mkdir(exist_ok=True)
        if suffix == "folder":
            rows.save_to_disk("saved")
            os.replace("saved", path)
        elif suffix == "arrow":
            rows.save_to_disk("saved")
            os.replace(next(Path("saved").glob("*.arrow")), path)
        else:
            with path.open("wb") as file:
                getattr(rows, f"to_{'json' if suffix == 'jsonl' else suffix}")(file)
        assert load_rows(str(path)).to_list() == rows.to_list(), name


def test_a_file_that_changed_is_read_again(tmp_path):
    assert load_rows(write(tmp_path, '{"text": "a"}')).to_list() == [{"text": "a"}]
    assert load_rows(write(tmp_path, '{"text": "b"}')).to_list() == [{"text": "b"}]


@pytest.mark.parametrize("name", ["a::b.jsonl", "$HOME.jsonl", "[f]"])
def test_a_path_that_datasets_cannot_take_as_it_is_is_refused_by_name(name, tmp_path, capsys):
    (tmp_path / name).mkdir()
    fails_with([str(tmp_path / name)], f"{name}: datasets takes", capsys)


def test_names_are_printed_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("[").mkdir()
    (tmp_path / "[/y]:cat:  b.jsonl").write_text('{"input_ids": [3, 4]}')
    assert main(["inspect", "[/y]:cat:  b.jsonl"]) == 0
    assert "Packing of [/y]:cat:  b.jsonl\n" in capsys.readouterr().out
    fails_with(["[/z]:cat:  b.jsonl"], "no such file or folder: [/z]:cat:  b.jsonl", capsys)


def test_csv_holds_texts(tmp_path):
    assert load_rows(write(tmp_path, "text\nhello\n", "rows.csv")).to_list() == [{"text": "hello"}]


def test_a_file_with_two_columns_of_one_name_is_refused(tmp_path):
    ids = pa.array([[3, 4]])
    table = pa.table([ids, ids], names=["input_ids", "input_ids"])
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match=r'rows.arrow cannot be read: .*"input_ids" exists 2 times'):
        load_rows(str(tmp_path / "rows.arrow"))


# ---- the command ----


def test_json_is_all_of_stdout_and_the_report(tokens, tmp_path, capsys):
    options = ["--max-length", "4", "--strategy", "bfd", "--batch-size", "2", "--devices", "1", "--epochs", "1"]
    assert main(["inspect", tokens, *options, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    # packs [5 cut to 4], [4], [3], [2]; the row of a single token has nothing to score
    report = printed["report"]
    assert (report["examples_in"], report["examples_packed"], report["examples_unscored"]) == (5, 4, 1)
    assert (report["tokens_in"], report["tokens_kept"], report["tokens_lost"]) == (15, 13, 2)
    assert (report["packs"], report["steps_packed"], report["steps_unpacked"]) == (4, 2, 2)
    got = inspect_data(tokens, max_length=4, per_device_train_batch_size=2, num_train_epochs=1.0)
    assert printed == got.as_dict()
    assert [each["max_length"] for each in printed["max_lengths"]] == [4, 1024, 2048, 4096, 8192, 16384, 32768]
    assert printed["recommended_max_length"] == 1024


def test_table_names_losses_steps_and_the_recommendation(tokens, capsys):
    assert main(["inspect", tokens, "--max-length", "4"]) == 0
    printed = capsys.readouterr().out
    for text in ("examples kept", "no scored token", "truncated", "steps, packed", "Recommended: max_length=1024"):
        assert text in printed


def test_picture_is_written(tokens, tmp_path, capsys):
    assert main(["inspect", tokens, "--max-length", "4", "--plot", str(tmp_path / "plan.png")]) == 0
    assert Image.open(tmp_path / "plan.png").size == (1920, 576)
    assert f"Written: {tmp_path / 'plan.png'}\n" in capsys.readouterr().out


def test_documents_of_a_pack_differ_in_black_and_white():
    # one pack of two documents that fill it: in its panel, the two blocks must not be one grey
    picture = Image.open(io.BytesIO(draw_plan(np.array([512, 512]), 1024, plan_packs([512, 512], 1024)))).convert("L")
    panel = np.asarray(picture)[288, 1400:1900]  # a line through the middle of the third panel
    greys = [grey for grey in np.unique(panel) if (panel == grey).sum() > 100]
    assert len(greys) == 2
    assert int(greys[1]) - int(greys[0]) > 40


def test_tokenised_data_needs_neither_trl_nor_transformers(tokens, monkeypatch):
    for name in ("trl", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    assert inspect_data(tokens).report.account.examples_in == 5


# ---- bad input ----

BAD_FILES = {
    "a malformed line": ("rows.jsonl", '{"text": "a"}\n\n{text\n', "line 3: not JSON"),
    "no object": ("rows.jsonl", '{"text": "a"}\n[1]\n', "line 2: a JSON list, expected an object"),
    "a malformed array": ("rows.json", '[{"text": "a"},\n {"text": }]', "line 2: not JSON"),
    "an empty file": ("rows.jsonl", "", "is empty"),
    "blank lines": ("rows.jsonl", "\n\n", "holds no examples"),
    "unknown columns": ("rows.jsonl", '{"question": "a"}\n', "has only the columns question: expected input_ids"),
    "two forms": (
        "rows.jsonl",
        '{"text": "a"}\n{"messages": [{"role": "user"}]}\n',
        "data set: messages is None, expected a list",
    ),
    "pictures": (
        "rows.jsonl",
        '{"text": "a", "image": "a.png"}\n',
        "holds pictures, which need a processor",
    ),
    "numbers for text": ("rows.jsonl", '{"text": 3}\n', "data set: text is 3, expected a text"),
    "texts for ids": ("rows.jsonl", '{"input_ids": ["a"]}\n', "row 0 of the data set: input_ids holds string"),
    "short labels": ("rows.jsonl", '{"input_ids": [3, 4], "labels": [3]}\n', "row 0 of the data set: 1 labels for 2"),
    "a short mask": (
        "rows.jsonl",
        '{"input_ids": [3, 4], "assistant_masks": [1]}\n',
        "row 0 of the data set: 1 assistant_masks for 2",
    ),
    "nothing scored": ("rows.jsonl", '{"input_ids": [3]}\n', "no example of the train data set has a token to score"),
    "no parquet": ("rows.parquet", "garbage", "cannot be read"),
    "another kind of file": ("rows.txt", "hello", "has an unknown file type, expected .jsonl"),
    "100,000 lists in each other": (
        "rows.jsonl",
        '{"input_ids": [3]}\n{"a": ' + "[" * 10**5,
        "line 2: nested 100001 deep",
    ),
    "lists in each other, line by line": ("rows.json", "[\n" * 10**5, "line 33: nested 33 deep, at most 32"),
    "null for an object": ("rows.jsonl", '{"input_ids": [3]}\n null\n', "line 2: a JSON null, expected an object"),
    "null in an array": ("rows.json", '[null, {"input_ids": [3]}]', "row 0: a JSON null, expected an object"),
    "bytes that are no text": ("rows.jsonl", '{"text": "\udcff"}\n', "line 1: not UTF-8 text: invalid start byte"),
    "a packed file": ("rows.jsonl", "\x1f\udc8b\x08", "line 1: not UTF-8 text: invalid start byte at byte 1"),
    "half a character": ("rows.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: an escape such as"),
    "text without a model": ("rows.jsonl", '{"text": "a"}\n', "needs a tokenizer: name its model with --model"),
}


def fails_with(arguments, message, capsys):
    assert main(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("packsft: error: ")
    assert message in line
    assert captured.out == ""


@pytest.mark.parametrize("case", list(BAD_FILES))
def test_bad_file_is_one_line_and_code_2_and_no_picture(case, tmp_path, capsys):
    name, text, message = BAD_FILES[case]
    fails_with([write(tmp_path, text, name), "--plot", str(tmp_path / "plan.png")], message, capsys)
    assert not (tmp_path / "plan.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "validation"], "no split 'validation', only train: choose one with --split"),
        (["--plot", "/nowhere/plan.png"], "there is no folder /nowhere"),
        (["--plot", "rows.jsonl"], "--plot rows.jsonl: expected a name that ends in .png"),
    ],
)
def test_bad_option_is_named(arguments, message, tmp_path, capsys):
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "tokens")
    fails_with([str(tmp_path / "tokens"), *arguments], message, capsys)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--epochs", ["nan", "inf", "-1", "0", "1e300"]),
        ("--max-length", ["0", "-1", "1e9", str(10**30), "9" * 5000]),
        ("--seed", ["-1", str(10**30)]),
        ("--devices", ["0", "1e9", "1000000000"]),
        ("--batch-size", ["0", "1000000000"]),
        ("--accumulation", ["0", "1000000000"]),
        ("--tokens-per-pass", ["0", str(10**30)]),
    ],
)
def test_a_number_out_of_range_is_argparses_error(option, values, capsys):
    for value in values:
        with pytest.raises(SystemExit, match="2"):
            main(["inspect", "rows.jsonl", option, value])
        assert f"packsft inspect: error: argument {option}: " in capsys.readouterr().err


def test_missing_file_and_unreachable_data_set_are_named(tmp_path, capsys):
    fails_with([str(tmp_path / "rows.jsonl")], "no such file or folder", capsys)
    for name in ("", "json"):  # for which datasets reads all of the working folder
        fails_with([name], "no such file or folder", capsys)
    fails_with(["nobody/nothing"], "nobody/nothing is neither a local file or folder nor a data set", capsys)


def test_a_damaged_folder_is_named(tmp_path, tokenizer_folder, capsys):
    for name, files in {
        "saved": {"state.json": "{}", "dataset_info.json": "{}"},
        "model": {"config.json": "[]"},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            write(tmp_path / name, text, file)
    fails_with([str(tmp_path / "saved")], "saved cannot be read", capsys)
    text = write(tmp_path, '{"text": "hello"}\n')
    fails_with([text, "--model", str(tmp_path / "model")], "could not load the tokenizer of", capsys)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"from": "human"}]}, "expected a list of messages, each with a role and content"),
        ({"messages": []}, "messages is [], expected a list of messages, each with a role and content or"),
        ({"prompt": "what", "completion": [{"role": "assistant", "content": "yes"}]}, "expected a text"),
    ],
)
def test_rows_are_checked_as_in_the_trainer(row, message, tmp_path, tokenizer_folder, capsys):
    file = write(tmp_path, f"{json.dumps(row)}\n")
    fails_with([file, "--model", tokenizer_folder], f"row 0 of the {file} data set: ", capsys)
    fails_with([file, "--model", tokenizer_folder], message, capsys)


def test_a_split_is_that_of_load_dataset(tmp_path, tokens, capsys):
    file = write(tmp_path, '{"input_ids": [3, 4]}\n' * 5)
    assert [len(load_rows(file, split)) for split in ("train", "train[:2]", "train[50%:]")] == [5, 2, 3]
    fails_with([file, "--split", "test"], "cannot be read: Unknown split \"test\". Should be one of ['train']", capsys)
    fails_with([tokens, "--split", "test"], "has no split 'test': it is a data set without splits", capsys)
    fails_with([tokens, "--tokens-per-pass", "8"], "--tokens-per-pass needs --strategy step, not bfd", capsys)


def test_tokenizer_must_have_what_the_rows_need(tmp_path, capsys):
    no_template, no_eos = tiny_tokenizer(), tiny_tokenizer(eos=False)
    no_template.chat_template = None
    for name, tokenizer in (("no_template", no_template), ("no_eos", no_eos)):
        tokenizer.save_pretrained(tmp_path / name)
    FORMS["messages"][0].to_json(tmp_path / "chat.jsonl")
    chat = str(tmp_path / "chat.jsonl")
    fails_with([chat, "--model", str(tmp_path / "no_template")], "the tokenizer has no chat template", capsys)
    fails_with([chat, "--model", str(tmp_path / "no_eos")], "has no EOS token", capsys)
    text = write(tmp_path, '{"text": "hello"}\n')
    fails_with([text, "--model", str(tmp_path / "no_template"), "--assistant-only-loss"], "conversational", capsys)
    fails_with([text, "--model", str(tmp_path / "missing")], "missing", capsys)


def test_pictures_are_counted_and_drawn(tmp_path, capsys):
    _, processor, asks = vision_model("Idefics3")
    processor.save_pretrained(tmp_path / "processor")
    rows_with_pictures(40, asks).save_to_disk(tmp_path / "rows")
    arguments = ["inspect", str(tmp_path / "rows"), "--model", str(tmp_path / "processor"), "--max-length", "128"]
    assert main([*arguments, "--json", "--plot", str(tmp_path / "plan.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.5 < found["pictures"]["share"] < 1
    assert found["report"]["examples_in"] == 40
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert main(arguments) == 0
    assert "tokens of pictures" in capsys.readouterr().out


@pytest.mark.parametrize(("family", "holds"), [("Idefics3", True), ("Gemma3", False)])
def test_check_proves_packing_with_pictures(family, holds, tmp_path, capsys):
    model, processor, asks = vision_model(family, torch.float32)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows_with_pictures(20, asks).save_to_disk(tmp_path / "rows")
    assert main(["check", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows")]) == (not holds)
    said = capsys.readouterr().out
    assert ("in a pack than alone" in " ".join(said.split())) != holds
