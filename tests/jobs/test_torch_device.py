"""`--device` of train, evaluate and verify."""

import pytest
import torch

from millijoule.jobs.torch_device import torch_device
from millijoule.workers.errors import InputError


@pytest.mark.parametrize(
    ("asked", "gpus", "device"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda"),
        ("cpu", 2, "cpu"),
        ("gpu", 1, "cuda"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_words_become_pytorchs(monkeypatch, asked, gpus, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert torch_device(asked) == device


@pytest.mark.parametrize(
    ("asked", "gpus"), [("gpu", 0), ("cuda", 0), ("cuda:1", 1), ("tpu", 1), ("cuda:x", 1)]
)
def test_what_is_not_there_is_refused(monkeypatch, asked, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=f"--device {asked}"):
        torch_device(asked)
