"""Devices, tiny models and a tiny tokenizer for the tests: everything is built here, nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from tiny import tiny_tokenizer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return
    skip = pytest.mark.skip(reason="needs an Ampere or newer CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


if device := os.environ.get("PACKSFT_TEST_DEVICE"):  # the tests of `ops` run on the default device
    torch.set_default_device(device)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()
