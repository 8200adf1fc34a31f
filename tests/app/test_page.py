"""`packsft inspect --html`: one page without a network, whose blocks and texts are those of the plan."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast
from vision import rows_with_pictures, vision_model

from packsft.app.cli import main
from packsft.app.inspect import inspect_data
from packsft.app.page import SHOWN_BLOCKS, SHOWN_CHARACTERS, SHOWN_PACKS, SHOWN_PARTS, _text, write_whole

VOID = ("meta", "br", "path", "use")


class Page(HTMLParser):
    """The packs of a page: of each its title, and of each block its width, its title and its parts (tag, text)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.packs, self.open, self.tags, self.links, self.tables = [], [], set(), [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.add(tag)
        self.links += [given[name] for name in ("src", "href", "xlink:href") if name in given]
        if tag not in VOID:
            self.open.append((tag, given.get("class")))
        if given.get("class") == "pack":
            self.packs.append({"title": "", "blocks": []})
        if given.get("class") == "block":
            width = float(given["style"].split("width: ")[1].split("%")[0])
            self.packs[-1]["blocks"].append({"width": width, "title": "", "parts": []})
        if tag == "tr":
            self.tables.append([])
        if tag in ("mark", "span") and ("div", "text") in self.open:
            self.packs[-1]["blocks"][-1]["parts"].append([tag, ""])

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag  # well formed

    def handle_data(self, text):
        if not self.open:
            return
        if ("div", "text") in self.open:
            block = self.packs[-1]["blocks"][-1]
            if self.open[-1][0] == "strong":
                block["title"] += text
            elif self.open[-1][0] in ("mark", "span"):
                block["parts"][-1][1] += text
        elif ("div", "pack") in self.open and self.open[-1][0] == "p":
            self.packs[-1]["title"] += text
        elif self.open[-1][0] in ("td", "th"):
            self.tables[-1].append(text)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def page_of(tmp_path, *arguments: str) -> Page:
    file = tmp_path / "page.html"
    assert main(["inspect", *arguments, "--html", str(file)]) == 0
    return Page(file.read_text())


ROWS = [
    {"prompt": "the cat", "completion": " sits"},
    {"prompt": "a", "completion": " the <b>cat</b> & the mat"},
    {"prompt": "the mat", "completion": " is a cat" * 9},
] * 4


def test_blocks_and_texts_are_those_of_the_plan(tmp_path, tokenizer_folder):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    arguments = {"model": tokenizer_folder, "max_length": 16}
    page = page_of(tmp_path, str(tmp_path / "rows.jsonl"), "--model", tokenizer_folder, "--max-length", "16")
    plan, rows = (found := inspect_data(str(tmp_path / "rows.jsonl"), **arguments)).plan, found.rows
    decode = tiny_tokenizer().decode
    assert len(page.packs) == len(plan)
    cut = 0
    for number, pack in enumerate(page.packs):
        segments = plan.segments(number).tolist()
        tokens = sum(stop - start for _, start, stop in segments)
        assert pack["title"].startswith(f"{number}: {len(segments)} document")
        assert pack["title"].endswith(f", {tokens} of 16 tokens")
        for block, (example, start, stop) in zip(pack["blocks"], segments, strict=True):
            ids, labels = rows.tokens(example, start, stop)
            scored = np.flatnonzero(labels[1:] != -100) + 1
            first = scored[0]  # the completion
            prompt = decode(ids[:first])
            assert block["parts"] == [["span", prompt], ["mark", decode(ids)[len(prompt) :]]]
            assert block["width"] == pytest.approx(100 * (stop - start) / 16, abs=1e-3)
            of_all = "" if stop == rows.lengths[example] else f" of {rows.lengths[example]} (from token {start})"
            assert block["title"] == f"row {example}: {stop - start}{of_all} tokens, {len(scored)} scored"
            cut += bool(of_all)
    assert cut == found.report.account.examples_truncated == 4
    tables = [row for _, *rows in found.tables().values() for row in rows]
    assert all(list(row) in page.tables for row in tables)


def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path, tokenizer_folder):
    rows = [{"text": "<script>alert(1)</script> </div>"}] * 3
    (tmp_path / "<i>rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = page_of(tmp_path, str(tmp_path / "<i>rows.jsonl"), "--model", tokenizer_folder)
    assert not {"script", "link", "img", "iframe", "i"} & page.tags
    assert all(link.startswith("#") for link in page.links)
    ids = [part.split('"')[0] for part in (tmp_path / "page.html").read_text().split(' id="')[1:]]
    assert ids
    # matplotlib numbers the parts of each chart from 1; what is referred to is named once
    referred = {link[1:] for link in page.links}
    assert all(ids.count(name) == 1 for name in referred)


def test_without_a_tokenizer_the_ids_are_shown(tmp_path):
    Dataset.from_dict({"input_ids": [[3, 4, 5]], "labels": [[-100, -100, 5]]}).save_to_disk(tmp_path / "rows")
    (pack,) = page_of(tmp_path, str(tmp_path / "rows")).packs
    assert pack["blocks"][0]["parts"] == [["span", "3 4"], ["mark", "5"]]


def test_many_packs_long_texts_and_many_turns_are_shown_in_part(tmp_path, tokenizer_folder):
    turns = np.tile([-100, 7], 40)
    labels = np.concatenate([turns, np.full(2_000, 7)])
    ids = np.full_like(labels, 7)
    Dataset.from_dict({"input_ids": [ids] * 200, "labels": [labels] * 200}).save_to_disk(tmp_path / "rows")
    page = page_of(tmp_path, str(tmp_path / "rows"), "--max-length", "2080")
    assert len(page.packs) == SHOWN_PACKS
    assert [pack["title"].split(":")[0] for pack in (page.packs[0], page.packs[-1])] == ["0", "199"]
    assert len(page.packs[0]["blocks"][0]["parts"]) == SHOWN_PARTS
    assert "and 64 more parts" in (tmp_path / "page.html").read_text()
    Dataset.from_dict({"input_ids": [ids], "labels": [ids]}).save_to_disk(tmp_path / "long")
    (part,) = page_of(tmp_path, str(tmp_path / "long"), "--max-length", "4096").packs[0]["blocks"][0]["parts"][1:]
    assert len(part[1]) < SHOWN_CHARACTERS + 10
    assert "[…]" in part[1]


def test_a_pack_of_many_documents_is_shown_in_part(tmp_path):
    Dataset.from_dict({"input_ids": [[7, 8]] * 300}).save_to_disk(tmp_path / "rows")
    (pack,) = page_of(tmp_path, str(tmp_path / "rows"), "--max-length", "800").packs
    *shown, rest = pack["blocks"]
    assert (len(shown), rest["title"]) == (SHOWN_BLOCKS, f"{300 - SHOWN_BLOCKS} more documents")
    assert sum(block["width"] for block in pack["blocks"]) == pytest.approx(75, abs=0.01)


def test_an_id_that_the_tokenizer_does_not_know_is_a_number(tmp_path, tokenizer_folder):
    Dataset.from_dict({"input_ids": [[4, -1, 5, 6, 1 << 40]]}).save_to_disk(tmp_path / "rows")
    (pack,) = page_of(tmp_path, str(tmp_path / "rows"), "--model", tokenizer_folder).packs
    text = "".join(text for _, text in pack["blocks"][0]["parts"])
    assert "[-1]" in text
    assert f"[{1 << 40}]" in text


@pytest.mark.parametrize("scheme", ["metaspace", "byte level"])
def test_spaces_between_the_parts_stay(tmp_path, scheme):
    pieces = {"metaspace": ["\u2581the", "\u2581cat", "\u2581sits"], "byte level": ["the", "\u0120cat", "\u0120sits"]}[
        scheme
    ]
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<eos>", *pieces])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = {"metaspace": decoders.Metaspace(), "byte level": decoders.ByteLevel()}[scheme]
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path / "tokenizer")
    Dataset.from_dict({"input_ids": [[2, 3, 4]], "labels": [[-100, -100, 4]]}).save_to_disk(tmp_path / "rows")
    (pack,) = page_of(tmp_path, str(tmp_path / "rows"), "--model", str(tmp_path / "tokenizer")).packs
    assert pack["blocks"][0]["parts"] == [["span", "the cat"], ["mark", " sits"]]


def test_a_character_that_is_split_between_parts_loses_no_text():
    pieces = {1: b"\xf0\x9f", 2: b"\x98\x80", 3: b" hi"}

    def decode(ids):
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    assert _text([2, 3], [1], decode).endswith(" hi")
    assert len(_text([2, 3], [1], decode)) > 3
    assert _text([3], [1, 2], decode) == " hi"


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("of before")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_whole(tmp_path / "page.html", b"new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("page.html", "of before")]


def test_exact_steps_show_passes(tmp_path):
    Dataset.from_dict({"input_ids": [[5] * n for n in (3, 9, 4, 8)] * 9}).save_to_disk(tmp_path / "rows")
    arguments = ["--strategy", "step", "--max-length", "16", "--tokens-per-pass", "20", "--batch-size", "4"]
    page = page_of(tmp_path, str(tmp_path / "rows"), *arguments)
    assert "passes, of at most 64 steps. A block" in (tmp_path / "page.html").read_text()
    assert all(pack["title"].endswith(" of 20 tokens") for pack in page.packs)
    assert sum(len(pack["blocks"]) for pack in page.packs) == 36


def test_a_picture_is_named_and_not_spelled_out(tmp_path):
    _, processor, asks = vision_model("Idefics3")
    processor.save_pretrained(tmp_path / "processor")
    rows_with_pictures(8, asks).save_to_disk(tmp_path / "rows")
    arguments = [str(tmp_path / "rows"), "--model", str(tmp_path / "processor"), "--max-length", "512"]
    page = page_of(tmp_path, *arguments)
    found = inspect_data(arguments[0], model=arguments[2], max_length=512)
    blocks = [block for pack in page.packs for block in pack["blocks"]]
    examples = [int(block["title"].split(":")[0].split()[1]) for block in blocks]
    for block, example in zip(blocks, examples, strict=True):
        texts = [text for _, text in block["parts"]]
        counted = [int(text.split()[0][1:].replace(",", "")) for text in texts if "tokens of pictures]" in text]
        assert bool(counted) == bool(found.picture_tokens[example])
        ids, _ = found.rows.tokens(example, 0, 512)
        # those of the placeholder, and the marks between the parts of a picture
        assert (ids == found.rows.picture_token).sum() <= sum(counted) <= found.picture_tokens[example]
        assert texts[-1].strip()  # what is said about the picture
        assert not any("<image>" in text for text in texts)


@pytest.mark.parametrize(
    ("name", "message"), [("page.txt", "expected a name that ends in .html"), ("none/page.html", "there is no folder")]
)
def test_a_bad_name_is_refused_before_any_work(name, message, tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "no such file.jsonl"), "--html", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


# ---- several data sets ----


def sets(tmp_path) -> list[str]:
    rng = np.random.default_rng(0)
    for name, longest, count in (("short", 12, 40), ("long", 40, 70)):
        rows = [[int(n)] * int(n) for n in rng.integers(2, longest, count)]
        Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / name)
    return [str(tmp_path / name) for name in ("short", "long")]


def test_several_data_sets_are_those_of_pack(tmp_path, capsys):
    import packsft

    names = sets(tmp_path)
    arguments = ["--max-length", "32", "--batch-size", "4", "--epochs", "1", "--weights", "2", "1"]
    assert main(["inspect", *names, *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {
        name: [{"input_ids": row, "labels": row} for row in Dataset.load_from_disk(name)["input_ids"]] for name in names
    }
    data = packsft.pack(rows, 32, batch_size=4, weights=dict(zip(names, (2, 1), strict=True)))
    assert found["report"] == data.report.as_dict()
    assert [one["name"] for one in found["sets"]] == ["short", "long"]
    assert found["sets"][0]["share"] == data.mixture.sets[0].share == pytest.approx(2 / 3, abs=0.05)
    assert found["report"]["steps_unpacked"] == len(data.loader())
    lost = [sum(max(0, len(row["input_ids"]) - 32) for row in of_set) for of_set in rows.values()]
    assert [one["tokens_lost"] for one in found["sets"]] == lost
    assert main(["inspect", *names, *arguments]) == 0
    assert "documents used" in capsys.readouterr().out


def test_max_lengths_are_compared_on_what_an_epoch_takes(tmp_path):
    Dataset.from_dict({"input_ids": [[5] * 100] * 5_000}).save_to_disk(tmp_path / "short")
    Dataset.from_dict({"input_ids": [[5] * n for n in (1_025, 1_025, 3_000)]}).save_to_disk(tmp_path / "long")
    names = [str(tmp_path / name) for name in ("short", "long")]
    even, tilted = inspect_data(*names), inspect_data(*names, weights=[0.1, 0.9])
    assert even.recommended_max_length == 1024  # 2,000 of 505,050 tokens are cut
    assert tilted.recommended_max_length == 4096
    long, epoch = 1_025 + 1_025 + 3_000, tilted.mixture.sets[0].documents * 100
    for each in tilted.max_lengths:
        lost = sum(max(0, length - each.max_length) for length in (1_025, 1_025, 3_000))
        assert each.tokens_lost == lost
        assert each.share_lost == lost / (long + epoch)


def test_wrong_weights_are_refused_before_any_data_is_read(tmp_path, capsys):
    assert main(["inspect", "a.jsonl", "b.jsonl", "--weights", "1"]) == 2
    assert "weights: 1 given for 2 data sets" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["inspect", "--weights", "1", "2", "a.jsonl", "b.jsonl"])
    assert "a.jsonl: expected a number above 0" in capsys.readouterr().err


def test_blocks_of_several_data_sets_are_named_by_set(tmp_path):
    names = sets(tmp_path)
    page = page_of(tmp_path, *names, "--max-length", "64", "--tokens-per-pass", "64", "--batch-size", "110")
    lengths = [len(row) for name in names for row in Dataset.load_from_disk(name)["input_ids"]]
    blocks = [block["title"] for pack in page.packs for block in pack["blocks"]]
    expected = [
        f"row {row if row < 40 else row - 40} of {('short', 'long')[row >= 40]}: {length} tokens, {length - 1} scored"
        for row, length in enumerate(lengths)
    ]
    assert sorted(blocks) == sorted(expected)


def test_a_text_has_as_many_tokens_as_alone(tmp_path):
    backend = tiny_tokenizer()
    eos = backend.eos_token_id
    backend._tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", eos)])
    backend.save_pretrained(tmp_path / "tokenizer")
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "the capital of france"}\n' * 3)
    files, options = [str(tmp_path / f"{name}.jsonl") for name in "ab"], {"model": str(tmp_path / "tokenizer")}
    alone, both = inspect_data(files[0], strategy="step", **options), inspect_data(*files, **options)
    assert alone.report.account.texts_with_doubles == 3
    assert [one.tokens_in for one in both.mixture.sets] == [alone.report.account.tokens_in] * 2


def test_a_pass_holds_its_longest_document(tmp_path):
    Dataset.from_dict({"input_ids": [[5] * n for n in (3, 30, 4)]}).save_to_disk(tmp_path / "rows")
    arguments = ["--strategy", "step", "--tokens-per-pass", "8", "--batch-size", "3"]
    page = page_of(tmp_path, str(tmp_path / "rows"), *arguments)
    assert sorted(pack["title"].split(": ")[1] for pack in page.packs) == [
        "1 document, 30 of 30 tokens", "2 documents, 7 of 30 tokens"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "1"], "weights: 1 given for 2 data sets"),
        (["--weights-of", "row"], "weights_of='row' is unknown, expected one of ['token', 'document']"),
        (["--stopping-strategy", "never"], "stopping_strategy='never' is unknown, expected one of"),
        (["--strategy", "bfd"], "strategy='bfd' makes packs before it is known what an epoch takes: use 'step'"),
    ],
)
def test_a_bad_mixture_is_named(arguments, message, tmp_path, capsys):
    assert main(["inspect", *sets(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_of_several_data_sets_is_refused_for_one(tmp_path, capsys):
    one, _ = sets(tmp_path)
    assert main(["inspect", one, "--weights", "1"]) == 2
    assert "weights are of several data sets" in capsys.readouterr().err
    assert main(["inspect", one, "--stopping-strategy", "x"]) == 2
    assert "stopping_strategy='x' is unknown, expected one of" in capsys.readouterr().err
    for other in (one, f"{one}/", f"{one}/../short"):
        assert main(["inspect", one, other]) == 2
        assert "a data set is named twice" in capsys.readouterr().err
    with pytest.raises(ValueError, match="weights are of several data sets"):
        inspect_data(one, weights=[1])
