"""The frame of all measurements: options without paths, whole result files, processes of their own."""

import json
import operator
import os
from dataclasses import dataclass

import pytest

from millijoule.jobs import bench
from millijoule.jobs.measuring.measurement import (
    ResultOptions,
    answer_of,
    describe,
    run_alone,
    start_alone,
    write_result,
)


@dataclass(frozen=True)
class Options(ResultOptions):
    runs: int = 3
    folder: str | None = None


def test_a_function_runs_in_a_process_of_its_own():
    assert run_alone(operator.add, [1], [2]) == [1, 2]
    assert run_alone(os.getpid) != os.getpid()


def test_what_fails_there_is_not_taken_for_an_answer():
    with pytest.raises(RuntimeError, match="exit code 1"):
        answer_of(start_alone(operator.truediv, 1, 0))


def test_a_result_names_options_and_commit_and_no_path(tmp_path, capsys):
    path = tmp_path / "result.json"
    options = Options(result=str(path), runs=7, folder="/somewhere")
    write_result(describe("nothing", options), options.result)
    result = json.loads(path.read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert result["options"] == {"runs": 7}
    assert result["what"] == "nothing"
    assert len(result["environment"]["commit"]) >= 7
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_measurement_is_found_by_its_name(capsys):
    assert bench.main(["--help"]) == 0
    assert "counters" in capsys.readouterr().out
    assert bench.main(["nothing"]) == 2
    said = capsys.readouterr().err
    assert "no command named 'nothing'" in said
    assert all(f"  {name} " in said for name in bench.BENCHES)
    assert bench.main(["finish", "--no-such-option"]) == 2
