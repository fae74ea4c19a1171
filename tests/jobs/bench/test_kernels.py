"""`millijoule bench kernels` without a GPU: small sizes, a made-up counter, and forms that must agree before they are timed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from millijoule.jobs import bench
from millijoule.jobs.bench.kernels import CALLS, BenchOptions, compare
from millijoule.jobs.measuring.kernel_cases import make_cases
from millijoule.jobs.measuring.one_gpu import open_one_gpu

KERNELS = Path(__file__).parents[3] / "kernels"


def test_every_fused_kernel_has_a_case_and_a_result_has_all_cases(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    words = ["kernels", str(path), "--stand-in", "--seconds", "0", "--forms", "eager", "fused"]
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
