"""Shared settings: no network, one thread, quiet libraries."""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: waking a second thread costs more than it computes
logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
