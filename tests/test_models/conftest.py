"""One thread: these models are too small to gain from more, and several test runs on one machine lose much."""

import pytest
import torch


@pytest.fixture(scope='module', autouse=True)
def single_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
