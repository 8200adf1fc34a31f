"""Devices, tiny models and a tiny tokenizer for the tests: everything is built here, nothing is downloaded."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Models this small gain nothing from a second thread, and on a machine that is shared its waiting doubles the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from tiny import tiny_tokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    """Most tests compare with numbers of the CPU. They run there on a machine with a GPU too, and so do the processes
    that they start; the GPU is for `pytest -m gpu`."""
    asked = config.getoption("markexpr")
    if ("gpu" not in asked.split() or "not gpu" in asked) and "PACKSFT_TEST_DEVICE" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_report_header(config: pytest.Config) -> str | None:
    return None if config.getoption("--all") else "tests marked slow are left out: --all adds them"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        config.hook.pytest_deselected(items=[item for item in items if "slow" in item.keywords])
        items[:] = [item for item in items if "slow" not in item.keywords]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return
    skip = pytest.mark.skip(reason="needs an Ampere or newer GPU, and `pytest -m gpu`")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is frozen is never freed: libtriton would list it as leaked


if device := os.environ.get("PACKSFT_TEST_DEVICE"):  # the tests of `ops` run on the default device
    torch.set_default_device(device)


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_collect() -> None:
    """`train()` collects garbage twice: a quarter of a second each time, were all imported modules gone through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def rms_norm_keeps_float64(monkeypatch):
    """transformers' RMSNorm rounds to float32 inside, also in float64. Where a last bit of its input differs, as it may
    between a GEMM of three rows and one of thirty, its output differs by 6e-8. Taken out, of the truth as of us."""

    def forward(norm, x):
        return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)

    for norm in (LlamaRMSNorm, Qwen3RMSNorm):
        rounds = norm.forward
        chosen = lambda self, x, rounds=rounds: (forward if x.dtype == torch.float64 else rounds)(self, x)  # noqa: E731
        monkeypatch.setattr(norm, "forward", chosen)
