"""Whatever a checkpoint says, converting it ends soon, runs nothing, and either refuses it or makes a model that draws.

Pickles are written here instruction by instruction. The files are converted in a process of its own whose processor time is
limited: that, not the code under test, decides what hangs.
"""

import json
import os
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from support.un0_checkpoints import CIFAR, publish, random_model

from millijoule.jobs import convert
from millijoule.jobs.entry import COMPLETE

TESTS = Path(__file__).parents[2]

#: Processor seconds for all cases of a test together; what hangs would take hours at least.
ENOUGH = 300

PLACEHOLDER = b"X\x0b\x00\x00\x00placeholder"


def outcomes(folder: Path, seconds: int = ENOUGH) -> dict[str, str]:
    """The verdict on each file of `folder` (see `support.convert_cases`)."""
    run = subprocess.run(
        [sys.executable, "-m", "support.convert_cases", str(folder), str(seconds)],
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    found = {line["case"]: line["verdict"] for line in lines}
    missing = sorted(p.name for p in folder.iterdir() if p.name not in found)
    assert not missing, f"{missing[0]} did not end (exit code {run.returncode}): {run.stderr[-500:]}"
    return found


def entries(path):
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def write_entries(path, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Entries of a good checkpoint with "placeholder" as a setting."""
    path = publish(
        tmp_path_factory.mktemp("good") / "p.pt",
        model=random_model({**CIFAR, "n_oscillators": 16}, 10, 3),
        config={**CIFAR, "n_oscillators": 16, "note": "placeholder"},
    )
    content = entries(path)
    (name,) = [n for n in content if n.endswith("data.pkl")]
    assert content[name].count(PLACEHOLDER) == 1
    return content, name


# Pickles by hand


def put(n):
    return b"r" + struct.pack("<I", 10**6 + n)


def get(n):
    return b"j" + struct.pack("<I", 10**6 + n)


def word(text):
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def whole(n):
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def doubled(kind, depth=200):
    """A value of 2**depth parts: each contains the one within it twice."""
    before, between, after = {
        "tuple": (b"", b"", b"\x86"),
        "list": (b"](", b"", b"e"),
        "dict": (b"}(" + word("a"), word("b"), b"u"),
    }[kind]
    return before * depth + b")" + b"".join(put(i) + between + get(i) + after for i in range(depth))


DEEP = 200_000
BILLION = b"J" + struct.pack("<i", 2**31 - 1)
NAMED = b"c__builtin__\n"
LONG_WORD = "x" * 2**21

#: What a setting's value is replaced by, as pickle instructions that leave one value.
VALUES = {
    "doubled lists": doubled("list"),
    "doubled tuples": doubled("tuple"),
    "doubled dictionaries": doubled("dict"),
    "doubled tuples as a key": b"}" + doubled("tuple") + b"Ns",
    "doubled tuples that are called": doubled("tuple") + b")R",
    "doubled tuples of a class": doubled("tuple") + b")\x81",
    "doubled tuples as a tensor": b"ctorch._utils\n_rebuild_tensor_v2\n" + doubled("tuple") + b"R",
    "doubled tuples as a storage": doubled("tuple") + b"Q",
    "doubled tuples as a set": NAMED + b"set\n" + doubled("tuple") + b"\x85R",
    "deep lists": b"]" * DEEP + b"a" * (DEEP - 1),
    "deep tuples": b")" + b"\x85" * DEEP,
    "deep tuples as a key": b"}" + b")" + b"\x85" * DEEP + b"Ns",
    "deep marks": b"(" * DEEP + b"t" * DEEP,
    "a list in itself": b"]" + put(0) + get(0) + b"a",
    "a dictionary in itself": b"}" + put(0) + b"K\x01" + get(0) + b"s",
    "a long word many times": word(LONG_WORD)
    + put(0)
    + b"\x85"
    + b"".join(b"(" + get(0) * 50_000 + b"t\x86" for _ in range(1)),
    "equal long keys": b"}"
    + b"("
    + word(LONG_WORD)
    + b"N"
    + word(LONG_WORD)
    + put(0)
    + b"N"
    + (get(0) + b"N") * 200_000
    + b"u",
    "keys of one hash": b"}(" + b"".join(whole((2**61 - 1) * i) + b"N" for i in range(1, 40_000)) + b"u",
    "an integer of 600 digits": whole(10**600),
    "a huge bytearray": NAMED + b"bytearray\n" + whole(2**40) + b"\x85R",
    "many large bytearrays": b"(" + (NAMED + b"bytearray\n" + BILLION + b"\x85R") * 50 + b"t",
    "sets of a list, again and again": b"]("
    + b"N" * 10_000
    + b"e"
    + put(0)
    + b"\x85"
    + b"("
    + (NAMED + b"set\n" + get(0) + b"\x85R") * 50_000
    + b"t\x86",
    "a call with many arguments, again and again": b"("
    + b"N" * 100_000
    + b"t"
    + put(0)
    + b"("
    + (b"ctorch\nSize\n" + get(0) + b"R") * 30_000
    + b"t\x86",
    "a huge tensor": b"ctorch\nFloatTensor\n" + whole(2**40) + b"\x85R",
    "a meta tensor": b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n"
    + whole(2**50)
    + b"\x85K\x01\x85\x89tR",
    "a missing memo": get(77),
    "nothing on the stack": b"t",
    "a mark left open": b"((((N",
    "text for a terminal": word("\x1b[2J\x07") + b"c" + b"\x1b[2J\nx\n",
    "system": b"cposix\nsystem\n" + word("touch it-ran") + b"\x85R",
    "eval": NAMED + b"eval\n" + word("1") + b"\x85R",
    "attributes of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}" + word("__code__") + b"Nsb",
    "the old instruction for a class": b"(" + word("touch it-ran") + b"iposix\nsystem\n",
    "a global by stack": word("posix") + word("system") + b"\x93" + word("touch it-ran") + b"\x85R",
    "an extension": b"\x82\x01",
    "a persistent module": b"(" + word("module") + NAMED + b"eval\n" + b"NNtQ",
}


@pytest.mark.long
def test_no_setting_makes_convert_hang_crash_or_run_code(tmp_path, published):
    content, name = published
    for number, (title, value) in enumerate(VALUES.items()):
        changed = content[name].replace(PLACEHOLDER, value)
        write_entries(tmp_path / f"{number:02} {title}.pt", {**content, name: changed})
    write_entries(tmp_path / "as it was.pt", content)
    found = outcomes(tmp_path)
    assert found.pop("as it was.pt") == "drawn"
    ended = {title.partition(" ")[2]: how for title, how in found.items()}
    assert ended.pop("an integer of 600 digits.pt") == "drawn"  # odd, but plain
    assert set(ended.values()) == {"refused"}, {k: v for k, v in ended.items() if v != "refused"}


def mutated(data: bytes, source: random.Random) -> bytes:
    """`data` with a few bytes changed, lost, doubled or swapped with others of its own."""
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 5))):
        at, length = source.randrange(len(changed)), source.choice((1, 1, 4, 30))
        other = source.randrange(len(changed))
        match source.randrange(5):
            case 0:
                changed[at] = source.randrange(256)
            case 1:
                changed[at] ^= 1 << source.randrange(8)
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = changed[other : other + length]
            case _:
                changed[at : at + length] = changed[other : other + length]
    return bytes(changed) if changed else data


#: Instructions that leave what they make on the stack, or change what is there; some need what may not be there.
INSTRUCTIONS = [
    *(
        b")",
        b"]",
        b"}",
        b"N",
        b"\x88",
        b"(",
        b"K\x05",
        b"t",
        b"l"[:0],
        b"\x85",
        b"\x86",
        b"\x87",
        b"a",
        b"e",
        b"s",
        b"u",
    ),
    *(
        b"R",
        b"\x81",
        b"b",
        b"Q",
        b"\x94",
        b"\x93",
        word("storage"),
        word("0"),
        word("cpu"),
        whole(-(2**40)),
        BILLION,
    ),
    *(put(0), put(1), get(0), get(1), b"q\x00", b"h\x00", b"h\x05", b"h\x10"),
    *(
        b"ctorch\nFloatStorage\n",
        b"ctorch\nSize\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
    ),
    *(b"ctorch._utils\n_rebuild_parameter\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"cos\nsystem\n"),
]


def written_cases(folder, published, legacy, count, seed):
    """`count` files each of mutated pickles, archives, old files, and random instructions in place of a setting."""
    content, name = published
    for number in range(count):
        source = random.Random(seed + number)
        write_entries(folder / f"pickle {number}.pt", {**content, name: mutated(content[name], source)})
        value = b"".join(source.choice(INSTRUCTIONS) for _ in range(source.randrange(1, 40)))
        changed = content[name].replace(PLACEHOLDER, value)
        write_entries(folder / f"instructions {number}.pt", {**content, name: changed})
        write_entries(folder / "whole", content)
        (folder / f"archive {number}.pt").write_bytes(mutated((folder / "whole").read_bytes(), source))
        (folder / "whole").unlink()
        (folder / f"old {number}.pt").write_bytes(mutated(legacy[:6000], source) + legacy[6000:])


@pytest.mark.long
def test_mutated_checkpoints_are_refused_or_draw(tmp_path, published):
    content, _ = published
    cases = tmp_path / "cases"
    cases.mkdir()
    write_entries(tmp_path / "good.pt", content)
    config = {**CIFAR, "n_oscillators": 16}
    saved = {"model": random_model(config, 10, 3), "config": config}
    torch.save(saved, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    written_cases(cases, published, (tmp_path / "old.pt").read_bytes(), 25, seed=1)
    assert convert.main([str(tmp_path / "good.pt"), str(tmp_path / "m.safetensors")]) == COMPLETE
    good = (tmp_path / "m.safetensors").read_bytes()
    for number in range(25):
        header = mutated(good[:4000], random.Random(number))
        (cases / f"converted {number}.safetensors").write_bytes(header + good[4000:])
    found = outcomes(cases)
    assert set(found.values()) == {"refused", "drawn"}, {
        k: v for k, v in found.items() if v not in ("refused", "drawn")
    }
