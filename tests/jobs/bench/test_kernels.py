"""`millijoule bench kernels` without a GPU: small sizes, a made-up counter, and forms that must agree before they are timed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from millijoule.jobs import bench
from millijoule.jobs.bench.kernels import CALLS, BenchOptions, compare
from millijoule.jobs.measuring import integer_kernels
from millijoule.jobs.measuring.kernel_cases import make_cases
from millijoule.jobs.measuring.one_gpu import open_one_gpu
from millijoule.workers.engines.eager import EagerEngine
from millijoule.workers.generators.registry import PACKAGED
from millijoule.workers.oscillators.model_file import load_model

KERNELS = Path(__file__).parents[3] / "kernels"


def test_every_fused_kernel_has_a_case_and_a_result_has_all_cases(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    words = [
        "kernels",
        str(path),
        "--stand-in",
        "--seconds",
        "0",
        "--forms",
        "eager",
        "fused",
        "--parts",
        "fused",
    ]
    assert bench.main(words) == 0
    result = json.loads(path.read_text())
    assert result["stand_in"] is True
    fused = {file.stem for file in KERNELS.glob("*.py") if "runs_on(" in file.read_text()} - {"triton_launch"}
    assert fused
    assert fused <= {case["kernel"] for case in result["cases"]}
    for case in result["cases"]:
        assert [block["form"] for block in case["blocks"]] == ["eager", "fused", "fused", "eager"]
        assert set(case["over_fused"]) == {"eager"}
        for form, told in case["forms"].items():
            own = [block for block in case["blocks"] if block["form"] == form]
            calls = sum(block["calls"] for block in own)
            assert calls == CALLS * len(own)  # blocks of no seconds are one round
            assert told["seconds"] == pytest.approx(sum(block["seconds"] for block in own) / calls)


def test_integer_kernels_are_told_by_peaks_of_the_same_run(tmp_path):
    path = tmp_path / "kernels.json"
    assert bench.main(["kernels", str(path), "--stand-in", "--seconds", "0", "--parts", "integers"]) == 0
    result = json.loads(path.read_text())
    assert result["cases"] == []
    told = result["integers"]
    assert all(told["peaks"][name] > 0 for name in ("int8", "bfloat16", "copy"))
    assert [case["kernel"] for case in told["cases"]] == [
        *("image", "image", "dense_coupling", "upsampling_decoder")
    ]
    for case in told["cases"]:
        names = list(case["forms"])
        assert [block["form"] for block in case["blocks"]] == [*names, *reversed(names)]
        floor = max(
            case["operations"] / told["peaks"]["int8"], 2 * case["bytes_written"] / told["peaks"]["copy"]
        )
        for form, figures in case["forms"].items():
            own = [block for block in case["blocks"] if block["form"] == form]
            seconds = sum(block["seconds"] for block in own) / sum(block["calls"] for block in own)
            assert figures["share_of_floor"] == pytest.approx(floor / seconds)
        assert case["times_as_fast"][names[0]] == 1
    image, coupled, dense, decoder = told["cases"]
    assert image["bytes_written"] == coupled["bytes_written"] == 2 * 64 * 64 * 3
    assert coupled["case"] == "coupled, 2 images"
    assert dense["operations"] == 2 * 64 * 64 * 2 * 2 * 2
    taps = 4 * 6 * 32 + 9 * 32 * 32 + 9 * 32 * 3  # of a pixel of 8 by 8; four int8 products each
    assert decoder["operations"] == 2 * 8 * 8 * taps * 4 * 2


def test_other_pixels_are_not_timed(monkeypatch):
    gpu = open_one_gpu("bench kernels", 0, stand_in=True)
    drawn = integer_kernels.Drawing.draw

    class OffByOne:
        def draw(self, tokens, seeds):
            return drawn(plain, tokens, seeds) ^ 1

    plain = integer_kernels.Drawing(load_model(PACKAGED["default"])[0], engine=EagerEngine())
    monkeypatch.setattr(integer_kernels.ImageKernel, "of", lambda weights: OffByOne())
    with pytest.raises(RuntimeError, match="other pixels"):
        integer_kernels.image_case(gpu, 1)


@pytest.mark.parametrize("wrong", [lambda x: 1.2 * x, lambda x: x * float("nan"), lambda x: x.roll(1, 0)])
def test_a_form_that_computes_something_else_is_not_timed(wrong):
    gpu = open_one_gpu("bench kernels", 0, stand_in=True)
    case = next(make_cases("cpu"))
    broken = dataclasses.replace(case, fused=lambda *given: wrong(case.fused(*given)))
    options = BenchOptions(seconds=0, forms=("eager", "fused"))
    compare(case, gpu, options)
    with pytest.raises(RuntimeError, match=r"fused is .* off"):
        compare(broken, gpu, options)


def test_without_a_gpu_it_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench.main(["kernels"]) == 1
    assert "PyTorch finds no GPU here" in capsys.readouterr().err
