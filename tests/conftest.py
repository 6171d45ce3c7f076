"""Fixtures: stand-in data for every step, and real data where DATA_DIR has it."""

import os
from pathlib import Path

import pytest
import standins as standins_script
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def standins(tmp_path_factory):
    """A data folder with small stand-ins in the real formats."""
    folder = tmp_path_factory.mktemp("standins")
    standins_script.main([str(folder)])
    return folder


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data; the test is skipped where there is none."""
    folder = os.environ.get("DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DATA_DIR names no folder of real data")
    return Path(folder)


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails at once."""

    def urlopen(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
