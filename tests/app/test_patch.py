"""`patch_trl`: scripts and the `trl` command train with packsft without being edited."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import trl
from datasets import Dataset, DatasetDict
from tiny import tiny_model, tiny_tokenizer
from trl import SFTTrainer

from packsft import PackedSFTConfig, PackedSFTTrainer, compat, patch_trl
from packsft.app.cli import main

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys\nfrom trl import SFTTrainer\nfrom pathlib import Path\n"
SCRIPT += "Path(sys.argv[1]).write_text(f'{SFTTrainer.__name__} {__name__} {sys.argv[2:]}')\n"


def packsft(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(
        [sys.executable, "-m", "packsft", *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def test_inside_of_the_block_trl_hands_out_our_trainer_and_after_it_its_own():
    with patch_trl():
        assert trl.SFTTrainer is trl.trainer.SFTTrainer is trl.trainer.sft_trainer.SFTTrainer is PackedSFTTrainer
    assert trl.SFTTrainer is trl.trainer.SFTTrainer is trl.trainer.sft_trainer.SFTTrainer is SFTTrainer


def test_without_a_block_it_stays():
    stack = patch_trl()
    try:
        assert trl.SFTTrainer is PackedSFTTrainer
    finally:
        stack.close()
    assert trl.SFTTrainer is SFTTrainer


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`packsft run` on a text, in this process, whose own state comes back at the end."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])

    def run(text: str, *arguments: str) -> int:
        (tmp_path / "script.py").write_text(text)
        return main(["run", str(tmp_path / "script.py"), *arguments])

    return run


def test_a_script_runs_as_it_would_by_itself(tmp_path, run):
    said = tmp_path / "said"
    assert run(SCRIPT, str(said), "--packing", "true") == 0
    assert said.read_text() == "PackedSFTTrainer __main__ ['--packing', 'true']"


def test_a_script_finds_its_arguments_its_folder_and_its_main_as_under_python(tmp_path, run, capsys, monkeypatch):
    (tmp_path / "script.py").touch()
    monkeypatch.chdir(tmp_path)  # Python makes `__file__` absolute, but not `sys.argv[0]`
    rest = sys.path[1:]
    text = "import sys\nprint(sys.argv, sys.path[0], __file__, sys.modules[__name__].__dict__ is globals())"
    Path("script.py").write_text(text)
    assert main(["run", "script.py", "--", "--help", "run"]) == 0
    said = ["script.py", "--", "--help", "run"]
    assert capsys.readouterr().out == f"{said} {tmp_path} {tmp_path}/script.py True\n"
    assert sys.path[1:] == rest  # our own folder is not searched


@pytest.mark.parametrize(
    "text", ["raise ValueError('no')", "open('/nowhere/file')", "import no_such_module", "1 / 0", "x = = 3"]
)
def test_an_error_of_a_script_is_its_own_traceback_and_code_1(text, run, capsys):
    assert run("# a script\n" + text) == 1
    printed = capsys.readouterr().err
    assert 'script.py", line 2' in printed
    assert printed.count("File ") == 1  # none of ours
    assert "packsft: error" not in printed


@pytest.mark.parametrize("code", [3, "text", None])
def test_a_script_exits_with_its_own_code(code, run):
    with pytest.raises(SystemExit) as exit_:
        run(f"import sys\nsys.exit({code!r})")
    assert exit_.value.code == code


def test_an_interrupt_of_a_script_passes(run):
    with pytest.raises(KeyboardInterrupt):
        run("raise KeyboardInterrupt")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["raise OSError('no')", "import sys; sys.exit('text')", "x = = 3"])
def test_python_m_packsft_run_shows_what_python_shows(text, tmp_path):
    (tmp_path / "script.py").write_text(text)
    plain = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True)
    ours = packsft("run", str(tmp_path / "script.py"))
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


@pytest.mark.parametrize(("code", "shown"), [(3, 3), (-9, 137)])
def test_trl_exits_with_the_code_of_the_script_that_it_launched(code, shown, monkeypatch):
    def launch(arguments, through):
        raise subprocess.CalledProcessError(code, arguments)

    monkeypatch.setattr(compat, "trl_command", launch)
    assert main(["trl", "sft"]) == shown


def test_the_help_is_that_of_trl_with_our_fields(capsys):
    for arguments, texts in (
        ([], ["usage: trl", "sft"]),
        (["sft"], ["usage: trl sft", *(f"--{field.name}" for field in dataclasses.fields(PackedSFTConfig))]),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(["trl", *arguments, "--help"])
        said = capsys.readouterr().out
        assert all(text in said for text in texts)


def test_bad_options_of_trl_are_one_line_and_code_2(capsys):
    assert main(["trl", "sft", "--output_dir", "out", "--use_cpu", "true", "--max_lost_fraction", "2"]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("packsft: error: max_lost_fraction=2.0: must be a number")
    )


@pytest.mark.slow
def test_a_test_file_of_somebody_elses_runs_against_it(tmp_path):
    tests = tmp_path / "test_theirs.py"
    tests.write_text(
        "from trl import SFTTrainer\ndef test_it():\n    assert SFTTrainer.__name__ == 'PackedSFTTrainer'\n"
    )
    done = packsft("run", str(Path(pytest.__file__).with_name("__main__.py")), "-q", "-c", os.devnull, str(tests))
    assert "1 passed" in done.stdout, done.stderr


def test_a_script_that_is_not_there_is_one_line(capsys):
    assert main(["run", "nowhere.py"]) == 2
    assert capsys.readouterr().err == "packsft: error: nowhere.py: there is no such file\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, and a data set as a file beside them."""
    folder = tmp_path_factory.mktemp("trl_sft")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    rows = [{"prompt": "what is the capital of france", "completion": " paris ."}] * 12
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


# ---- the script of `packsft trl sft`, in this process ----

CHAT = [{"role": "user", "content": "what is"}, {"role": "assistant", "content": "paris ."}]
SHARED = {"user": "human", "assistant": "gpt"}
FROM_VALUE = [{"from": SHARED[each["role"]], "value": each["content"]} for each in CHAT]
SFT = [
    "--max_length", "32", "--max_steps", "1", "--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--dtype",
    "float32", "--save_strategy", "no", "--disable_tqdm", "true",
]  # fmt: skip


@pytest.fixture
def sft(folder, tmp_path, monkeypatch, capsys, run):
    """`packsft run` on TRL's script, as `packsft trl sft` launches it: (exit code, what it says)."""

    def sft(rows, *arguments: str, model: str = str(folder / "model"), name: str = "rows.jsonl") -> tuple[int, str]:
        if rows is not None:
            (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) if isinstance(rows, list) else rows)
        script = str(resources.files("trl.scripts").joinpath("sft.py"))
        given = ["--model_name_or_path", model, "--dataset_name", str(tmp_path / name)]
        code = main(["run", script, *given, "--output_dir", str(tmp_path / "out"), *SFT, *arguments])
        return code, "".join(capsys.readouterr())

    return sft


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize(
    "row", [{"text": "what is"}, {"messages": CHAT}, {"conversations": FROM_VALUE}, {"messages": FROM_VALUE}], ids=str
)
def test_trl_sft_takes_a_file(row, streaming, sft, tmp_path):
    code, said = sft([row] * 4, "--dataset_streaming", streaming)
    assert code == 0, said
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_trl_sft_takes_other_files_and_folders(sft, tmp_path):
    rows = DatasetDict({name: Dataset.from_list([{"text": "what is"}] * 4) for name in ("train", "test")})
    rows["train"].to_parquet(tmp_path / "rows.parquet")
    rows["train"].save_to_disk(tmp_path / "saved")
    rows.save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    rows["train"].to_json(tmp_path / "folder" / "rows.jsonl")
    for name, *options in (["rows.parquet"], ["saved"], ["splits", "--eval_strategy", "steps"], ["folder"]):
        code, said = sft(None, *options, name=name)
        assert code == 0, said


BAD_RUNS = {
    "other columns": ([{"question": "a", "answer": "b"}], [], "has only the columns question, answer: expected in"),
    "a prompt alone": ([{"prompt": "a"}], [], "the train data set has only the columns prompt: expected input_ids"),
    "other keys": ([{"messages": [{"who": "a"}]}], [], "row 0 of the train data set: messages is [{'who': 'a'}], exp"),
    "a number": ([{"prompt": "a", "completion": 3}], [], "row 0 of the train data set: completion is 3, expected"),
    "null": ([{"prompt": "a", "completion": each} for each in ("b", None)], [], "row 1 of the train data set: compl"),
    "all null": ([{"prompt": "a", "completion": None}], [], "completion is None, expected a text"),
    "a broken line": ('{"text": "a"}\n{"text"', [], "rows.jsonl, line 2: not JSON"),
    "an empty file": ("", [], "rows.jsonl is empty"),
    "no file": (None, [], "no such file or folder"),
    "no evaluation rows": ([{"text": "a"}], ["--eval_strategy", "steps"], "has no split 'test', only train"),
    "another split": ([{"text": "a"}], ["--dataset_train_split", "all"], "has no split 'all', only train"),
    "a configuration": ([{"text": "a"}], ["--dataset_config", "en"], "dataset_config='en' has no meaning for the file"),
    "no batch": ([{"text": "a"}], ["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0: expected"),
    "no accumulation": ([{"text": "a"}], ["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0: exp"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_input_of_trl_sft_is_one_line_and_code_2(case, sft):
    rows, options, message = BAD_RUNS[case]
    code, said = sft(rows, *options)
    assert code == 2
    assert "Traceback" not in said
    assert message in next(line for line in said.splitlines() if line.startswith("packsft: error: "))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "no/such/model"])
def test_a_folder_of_a_model_that_is_not_there_is_named(name, sft, capsys):
    message = f"packsft: error: model '{name}': there is no such folder"
    code, said = sft([{"text": "a"}], model=name)
    assert (code, message in said) == (2, True)
    for arguments in (["check", "--model", name], ["check", "--batch-invariance", "--model", name]):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_an_error_of_training_keeps_its_traceback(sft, monkeypatch):
    def fail(*_, **__):
        raise ValueError("in a step")

    monkeypatch.setattr(PackedSFTTrainer, "compute_loss", fail)
    code, said = sft([{"text": "what is"}] * 4)
    assert code == 1
    assert "compute_loss" in said
    assert "packsft: error" not in said


@pytest.mark.slow
def test_trl_sft_trains_with_packsft(folder):
    done = packsft(
        "trl", "sft", "--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "data"),
        "--output_dir", str(folder / "out"), "--packing_strategy", "bfd", "--max_length", "32", "--max_steps", "2",
        "--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--dtype", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "packs of 32 (bfd)" in done.stdout + done.stderr  # our announcement
    assert (folder / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_trl_sft_takes_our_fields_and_our_defaults(folder):
    (folder / "config.yaml").write_text("packing_strategy: step\ntokens_per_pass: 64\n")
    for arguments in (["--config", str(folder / "config.yaml")], ["--tokens_per_pass", "auto"], []):
        done = packsft(
            "trl", "sft", "--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "data"),
            "--output_dir", str(folder / "exact"), "--max_length", "32", "--max_steps", "2", "--use_cpu", "true",
            "--bf16", "false", "--report_to", "none", "--dtype", "float32", *arguments,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "passes of an epoch (step)" in done.stdout + done.stderr
