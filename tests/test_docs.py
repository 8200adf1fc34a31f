"""Every code block of the README, CONTRIBUTING and `docs/` is run, or says why not: here, or in the test that
`RUN_ELSEWHERE` names, which reads the page.

`<!-- not run: why -->` stands in the line before a block that is not run. What a block needs and does not make (a
model, rows, tensors) is made here, small.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
import trl
import yaml
from tiny import tiny_model, tiny_tokenizer, token_rows
from transformers import AutoModelForCausalLM

import packsft
from packsft.app.cli import main

ROOT = Path(packsft.__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>[a-z]+)\n(?P<text>.*?)^```$", re.M | re.S)
RUN_ELSEWHERE = {
    ("docs/how-it-works.md", "pycon"): "tests/test_tour.py",
    ("docs/own-loops.md", "python"): "tests/loops/test_own_loops.py",
    ("docs/several-devices.md", "yaml"): "tests/distributed/test_configurations.py",
}
SLOW = "--batch-invariance"


@dataclass
class OnCPU(trl.SFTConfig):
    """The README's configurations are for a GPU."""

    use_cpu: bool = True


def blocks() -> list[tuple[str, int, str | None, str, str]]:
    """Of each block its page, its line, why it is not run, its language and its text."""
    found = []
    for page in PAGES:
        whole = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(whole):
            line = whole[: match.start("text")].count("\n")
            found.append((str(page.relative_to(ROOT)), line, *match.group("why", "language", "text")))
    return found


def run_here() -> list:
    return [
        pytest.param(page, language, text, id=f"{page}:{line}", marks=[pytest.mark.slow] * (SLOW in text))
        for page, line, why, language, text in blocks()
        if why is None
    ]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def names_of(folder: str) -> dict:
    """What the Python blocks take for given."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = token_rows(12)
    hidden, weight = torch.randn(5, 8), torch.randn(7, 8)
    heads = torch.randn(5, 2, 8)
    return {
        "SFTConfig": OnCPU,
        "PackedSFTConfig": packsft.PackedSFTConfig,
        "PackedSFTTrainer": packsft.PackedSFTTrainer,
        "model": model,
        "dataset": datasets.DatasetDict(train=rows, test=rows),
        "lengths": [5, 2, 3],
        "hidden_TM": hidden, "weight_VM": weight, "targets_N": torch.tensor([1, 2]), "rows_N": torch.tensor([0, 3]),
        "q_THK": heads, "k_TGK": heads, "v_TGK": heads, "max_seqlen": 3,
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
    }  # fmt: skip


def run_commands(text: str, folder: str) -> None:
    """Shell commands: `packsft` and `python -c`. A tiny model is in the place of the one that is named."""
    for line in text.splitlines():
        command, *arguments = shlex.split(line, comments=True)
        arguments = [folder if argument in ("smollm2", "MODEL") else argument for argument in arguments]
        if command == "packsft":
            assert main(arguments) == 0, line
        else:
            assert (command, arguments[0]) == ("python", "-c"), f"{line}: this command is not known here"
            exec(arguments[1], {})


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The blocks of a page share a folder, with some rows."""
    folders = {}

    def folder(page: str) -> Path:
        if page not in folders:
            folders[page] = tmp_path_factory.mktemp("page")
            packsft.stdlib_docstrings().select(range(60)).to_json(folders[page] / "rows.jsonl")
        return folders[page]

    return folder


@pytest.mark.parametrize(("page", "language", "text"), run_here())
def test_a_block_of_code_runs(page, language, text, model_folder, folder_of, monkeypatch):
    monkeypatch.chdir(folder_of(page))
    if (page, language) in RUN_ELSEWHERE:
        assert Path(page).name in (ROOT / RUN_ELSEWHERE[page, language]).read_text()
    elif language == "python":
        names = names_of(model_folder)  # imports packsft, which is to know TRL's own configuration
        monkeypatch.setattr(trl, "SFTConfig", OnCPU)
        monkeypatch.syspath_prepend(folder_of(page))
        Path("a_script_that_imports_SFTTrainer.py").write_text(
            "from trl import SFTTrainer\nassert SFTTrainer.__name__ == 'PackedSFTTrainer'\n"
        )
        if "dataset=dataset)" in text:
            names["dataset"] = names["dataset"]["train"]
        exec(text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", model_folder), names)
    elif language == "bash":
        run_commands(text, model_folder)
    else:
        raise AssertionError(f"{page}: no test runs a block of {language}")


def test_what_is_not_run_is_counted():
    reasons = [why for _, _, why, _, _ in blocks()]
    assert len(reasons) > 35
    assert sum(why is not None for why in reasons) == 7


def test_yaml_is_yaml():
    texts = [text for _, _, _, language, text in blocks() if language == "yaml"]
    assert all(isinstance(yaml.safe_load(text), dict) for text in texts)
    assert len(texts) == 5
