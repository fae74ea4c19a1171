"""Model files: any header that safetensors knows is read, and a file is written whole or not at all."""

import json

import pytest
import torch

from millijoule.workers.errors import InputError
from millijoule.workers.generators.model_files import read_header, write_model_file


@pytest.mark.parametrize(
    "length", [0x280, 0x480, 0x580, 0x4B50]
)  # their bytes are those a pickle or a zip begins with
def test_a_header_of_any_length_is_read(tmp_path, length):
    path = tmp_path / "m.safetensors"
    entry = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}
    text = json.dumps({"weight": entry, "__metadata__": {"name": "mine"}}).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    header = read_header(path)
    assert (header.metadata, header.shapes, header.dtypes) == ({"name": "mine"}, {"weight": (2, 3)}, {"F16"})


def test_what_is_written_is_read_and_others_may_read_it_too(tmp_path):
    path, other = tmp_path / "m.safetensors", tmp_path / "other"
    other.touch()
    write_model_file({"a": torch.zeros(3)}, path, {"name": "mine"})
    assert read_header(path).shapes == {"a": (3,)}
    assert path.stat().st_mode == other.stat().st_mode


def test_a_file_that_its_check_refuses_leaves_the_old_one(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_text("old")

    def refuse(file):
        assert read_header(file).shapes == {"a": (3,)}  # it is complete by then
        raise InputError("draws nothing")

    with pytest.raises(InputError, match="draws nothing"):
        write_model_file({"a": torch.zeros(3)}, path, {}, refuse)
    assert [f.name for f in tmp_path.iterdir()] == ["m.safetensors"]
    assert path.read_text() == "old"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/no/m: cannot be written"):
        write_model_file({"a": torch.zeros(3)}, tmp_path / "no" / "m", {})
