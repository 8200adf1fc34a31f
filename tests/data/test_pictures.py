"""Rows with pictures: their lengths come from headers, their pictures from columns, paths and bytes."""

import io

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from runs import config
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from vision import FAMILIES, drawn, rows_with_pictures, vision_model

from packsft import PackedSFTTrainer
from packsft.data.pictures import PictureRows, RowProcessor, with_hidden_pictures

TEXT = Value("string")


def planned(rows, processor, max_length=256, **options):
    collator = DataCollatorForVisionLanguageModeling(processor, **{"completion_only_loss": True} | options)
    return PictureRows(with_hidden_pictures(rows), collator, max_length, None, "train")


@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_are_those_of_the_processed_rows(family, caplog):
    _, processor, asks = vision_model(family)
    rows = rows_with_pictures(20, asks)
    found = planned(rows, processor)
    from_headers = "every picture is processed once, to plan it" not in caplog.text
    # their processors have no count, or read it too
    assert from_headers == (family not in ("InternVL", "SmolVLM", "Mllama"))
    for row in range(20):
        document = found.document(row, 0, found.lengths[row])
        assert len(document) == found.lengths[row]
        assert document.num_scored == found.count_scored(np.array([row]), np.array([0]), found.lengths[[row]])[0]
        assert bool(document.of_pictures) == bool(rows[row]["images"]) == bool(found.picture_tokens[row])


@pytest.mark.parametrize("by_processing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_the_last_picture_is_known(family, by_processing, monkeypatch):
    model, processor, asks = vision_model(family)
    config = model.config
    token = getattr(config, "image_token_index", getattr(config, "image_token_id", None))
    if by_processing:
        monkeypatch.setattr(RowProcessor, "planner", lambda process, *_: process)
    found = planned(rows_with_pictures(20, asks), processor)
    for row in range(20):
        of_pictures = np.flatnonzero(found.document(row, 0, found.lengths[row]).input_ids == token)
        assert found.pictures_end[row] >= of_pictures.max(initial=-1) + 1
        assert found.picture_tokens[row] >= len(of_pictures)


def test_no_picture_is_decoded_for_the_plan(monkeypatch):
    _, processor, asks = vision_model("Qwen2VL")
    rows = rows_with_pictures(100, asks)
    loads, load = [], PIL.ImageFile.ImageFile.load
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: loads.append(1) or load(self))
    found = planned(rows, processor)
    assert len(found.lengths) == 100
    assert len(loads) <= 4 * 2 * 4  # of the rows that were tried


def png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def turned(picture):
    """A JPEG that a viewer turns by 90 degrees."""
    file, exif = io.BytesIO(), PIL.Image.Exif()
    exif[0x0112] = 6
    picture.save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["feature", "bytes", "path", "turned", "grey", "transparent", "palette"])
def test_pictures_in_every_form(kind, tmp_path):
    _, processor, asks = vision_model("Qwen2VL")
    picture = drawn(20, 48)
    modes = {"grey": "L", "transparent": "RGBA", "palette": "P"}
    picture = picture.convert(modes.get(kind, "RGB"))
    path = tmp_path / "picture.png"
    path.write_bytes(png(picture))
    given = {"path": str(path), "bytes": {"bytes": png(picture)}}.get(kind, picture)
    if kind == "turned":
        given = {"bytes": turned(picture)}
    features = Features({"text": TEXT, "image": TEXT if kind == "path" else Image()})
    rows = Dataset.from_list([{"text": f"{asks}hello <eos>", "image": given}] * 2, features=features)
    found = planned(rows, processor, completion_only_loss=False)
    document = found.document(0, 0, found.lengths[0])
    expected = processor(text=[f"{asks}hello <eos>"], images=[[rows[0]["image"] if kind != "path" else picture]],
                         return_tensors="pt")  # fmt: skip
    assert document.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert torch.equal(document.of_pictures["pixel_values"], expected["pixel_values"])


def of_columns(row, **types):
    return Dataset.from_list([row], features=Features({"text": TEXT, "images": List(Image())} | types))


@pytest.mark.parametrize(("text", "pictures", "message"), [
    ("{asks}hello", [b"no picture"], "row 0 of the train data set: picture 0 cannot be read: cannot identify"),
    ("{asks}hello", ["/no/such/file.png"], "row 0 of the train data set: picture 0 cannot be read: .*No such file"),
    ("{asks}hello {asks}", [drawn(20, 20)], "row 0 of the train data set has 1 pictures, but its text asks for 2"),
    (None, [drawn(20, 20)], "row 0 of the train data set: text is None"),
    ("{asks}hello", ["https://x.org/a.png"], "row 0 of the train data set: picture 0 cannot be read: addresses"),
    ("hello", [drawn(20, 20)], "row 0 of the train data set has 1 pictures, but its text asks for 0"),
    ("{asks}hello", [drawn(1, 400)], "row 0 of the train data set cannot be processed: ValueError: .*aspect ratio"),
], ids=["broken", "missing", "more placeholders", "fewer placeholders", "too thin", "null", "address"])  # fmt: skip
def test_what_is_wrong_with_a_row_is_said(text, pictures, message):
    _, processor, asks = vision_model("Qwen2VL")
    given = [{"bytes": picture} if isinstance(picture, bytes) else picture for picture in pictures]
    images = {"images": List(TEXT)} if isinstance(given[0], str) else {}
    rows = of_columns({"text": text and text.format(asks=asks), "images": given}, **images)
    with pytest.raises(ValueError, match=message):
        planned(rows, processor, completion_only_loss=False)


def test_a_picture_is_never_cut():
    _, processor, asks = vision_model("Qwen2VL")
    long = "what is the capital of france paris a joke"
    rows = Dataset.from_list(
        [{"text": f"{asks}hello <eos>", "images": [drawn(48, 64)]},
         {"text": f"hello {asks}{long} <eos>", "images": [drawn(20, 24)]},
         {"text": "hello <eos>", "images": []}],
        features=Features({"text": TEXT, "images": List(Image())}),
    )  # fmt: skip
    options = {"bf16": False, "use_cpu": True, "report_to": "none", "max_length": 12}
    model, processor, _ = vision_model("Qwen2VL")
    ours = PackedSFTTrainer(model, config("unused", **options), train_dataset=rows, processing_class=processor)
    account = ours.train_dataset.plan.account
    assert (account.examples_overlong_dropped, account.examples_truncated, account.examples_packed) == (1, 1, 2)
    assert account.tokens_in == account.tokens_kept + account.tokens_truncated + account.tokens_dropped
    cut = next(document for pack in ours.train_dataset.packs() for document in pack if document.row == 1)
    assert len(cut) == 12
    assert cut.of_pictures


REFUSED = {
    "wrapped": ({"packing_strategy": "wrapped"}, "no picture may be cut"),
    "split": ({"overlong": "split"}, "no picture may be cut"),
    "keep_end": ({"truncation_mode": "keep_end"}, "truncation_mode='keep_end' would cut off"),
    "own packs": ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "packs of your own cannot hold"),
    "a transform": ({}, "and a transform, which would run while a plan is made"),
    "a formatting function": ({}, "formatting_func gives texts alone"),
    "two columns of pictures": ({}, "has the column 'images', and 'image', too"),
    "no text": ({}, "has pictures and the columns conversations, expected messages, prompt and completion, or text"),
    "a tokenizer": ({}, "pass the processor of a vision-language model"),
    "shared rows": ({"sequence_parallel_size": 2}, "sequence_parallel_size=2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_with_pictures_is_refused_by_name(name, tmp_path):
    model, processor, asks = vision_model("Qwen2VL")
    options, message = REFUSED[name]
    rows = rows_with_pictures(4, asks)
    processor = processor.tokenizer if name == "a tokenizer" else processor
    if name == "a transform":
        rows = rows.with_transform(lambda batch: batch)
    elif name == "two columns of pictures":
        rows = rows.map(lambda row: {"image": drawn(20, 20)})
    elif name == "no text":
        rows = rows.remove_columns("completion").rename_column("prompt", "conversations")
    formats = {"formatting_func": lambda row: "a"} if name == "a formatting function" else {}
    with pytest.raises(ValueError, match=message):
        PackedSFTTrainer(
            model, config(tmp_path, use_cpu=True, **options), train_dataset=rows, processing_class=processor, **formats
        )


def test_columns_that_trl_does_not_read_are_left_out(caplog):
    _, processor, asks = vision_model("Qwen2VL")
    rows = rows_with_pictures(8, asks)
    found = planned(rows.add_column("text", ["a caption"] * 8), processor)
    assert found.lengths.tolist() == planned(rows, processor).lengths.tolist()
    assert "prompt and completion is trained on; text is not read" in caplog.text


def test_a_picture_is_asked_for_by_the_image_token_even_where_there_is_a_token_before_it():
    _, processor, asks = vision_model("Qwen2VL")
    processor.boi_token = "<|vision_start|>"
    assert planned(rows_with_pictures(8, asks.replace("<|vision_start|> ", "")), processor).picture_tokens.any()


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas"])
def test_a_format_changes_nothing(form):
    _, processor, asks = vision_model("Qwen2VL")
    rows = rows_with_pictures(8, asks)
    assert planned(rows.with_format(form), processor).lengths.tolist() == planned(rows, processor).lengths.tolist()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_a_turned_picture_is_planned_as_it_is_seen(kind):
    _, processor, asks = vision_model("LlavaNext")
    file, exif = io.BytesIO(), PIL.Image.Exif()
    exif[0x0112] = 6
    drawn(20, 64).save(file, kind, exif=exif)
    rows = of_columns({"text": f"{asks}hello", "images": [{"bytes": file.getvalue()}]})
    found = planned(rows, processor, completion_only_loss=False)
    assert len(found.document(0, 0, found.lengths[0])) == found.lengths[0]
