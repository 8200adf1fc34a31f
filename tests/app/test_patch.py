"""`patch_trl`: scripts and the `trl` command train with packsft without being edited."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from tiny import tiny_model, tiny_tokenizer
from trl import SFTTrainer

from packsft import PackedSFTTrainer, patch_trl
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


def test_a_script_runs_as_it_would_by_itself(tmp_path, monkeypatch):
    script, said = tmp_path / "script.py", tmp_path / "said"
    script.write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["run", str(script), str(said), "--packing", "true"]) == 0
    assert said.read_text() == "PackedSFTTrainer __main__ ['--packing', 'true']"


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


@pytest.mark.slow
def test_trl_sft_trains_with_packsft(folder):
    done = packsft(
        "trl", "sft", "--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "data"),
        "--output_dir", str(folder / "out"), "--packing", "true", "--max_length", "32", "--max_steps", "2",
        "--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--dtype", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "packs of 32 (bfd)" in done.stdout + done.stderr  # our announcement
    assert (folder / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_help_is_that_of_trl(folder):
    done = packsft("trl", "sft", "--help")
    assert done.returncode == 0, done.stderr
    assert "--packing_strategy" in done.stdout
