"""Shared settings: no network, two threads, quiet libraries."""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
