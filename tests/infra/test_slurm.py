"""The batch script, with Slurm's commands stood in for: it really starts Ray, runs a job, stops, and queues itself again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from support.cluster import free_port
from support.manifests import batch
from support.manifests.documents import ROOT

SCRIPT = ROOT / "infra/slurm/millijoule.sbatch"
STAND_INS = ROOT / "tests/infra/slurm_stand_in"


@pytest.fixture
def start(tmp_path):
    """Starts the script over two nodes of one CPU each, both on this host; what is left of it is killed."""
    started = []
    # sockets have short names
    sessions = tempfile.mkdtemp(prefix="mj-", dir="/tmp")

    def run(*arguments: object) -> subprocess.Popen[str]:
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))},
            "PATH": f"{STAND_INS}:{os.environ['PATH']}",
            "MILLIJOULE_HOME": str(Path(sys.executable).parents[1]),
            "RAY_SCRATCH": sessions,
            "RAY_PORT": str(free_port()),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node1,node2",
            "SLURM_CPUS_ON_NODE": "1",
            "STAND_IN_CPUS": "1",
            "STAND_IN_LOG": str(tmp_path / "log"),
        }
        command = ["bash", SCRIPT, *map(str, arguments)]
        with (tmp_path / "output").open("w") as output:
            process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
        started.append(process)
        return process

    run.sessions = sessions
    yield run
    for process in started:
        for left in psutil.process_iter():
            try:
                if os.getsid(left.pid) == process.pid:
                    left.kill()
            except (ProcessLookupError, psutil.Error):
                pass
    shutil.rmtree(sessions, ignore_errors=True)


def test_the_script_is_right_for_bash_and_wants_a_command(start):
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    assert start().wait(30) == 2


@pytest.mark.parametrize(
    ("setting", "value"), [("RAY_PORT", "any"), ("NODES_WAIT_S", "3m"), ("NODES_WAIT_S", "-1")]
)
def test_a_setting_that_is_no_number_is_named_before_ray_starts(tmp_path, setting, value):
    env = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", setting: value}
    done = subprocess.run(
        ["bash", SCRIPT, "generate"], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    words = f"millijoule.sbatch: environment variable {setting} is '{value}': a whole number\n"
    assert (done.returncode, done.stderr) == (2, words)


@pytest.mark.parametrize("unset", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_CPUS_ON_NODE"])
def test_outside_a_job_of_slurm_the_script_says_so(tmp_path, unset):
    allocation = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_ON_NODE": "1"}
    del allocation[unset]
    command, env = ["bash", SCRIPT, "generate"], {"PATH": os.environ["PATH"], **allocation}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"millijoule.sbatch: {unset} is not set, so this is no job of Slurm's")


def test_an_environment_that_is_not_there_is_named_before_ray_starts(tmp_path):
    allocation = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_ON_NODE": "1"}
    env = {"PATH": os.environ["PATH"], **allocation, "MILLIJOULE_HOME": str(tmp_path / "none")}
    command = ["bash", SCRIPT, "generate"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"no virtual environment with Millijoule in {tmp_path}/none; set MILLIJOULE_HOME" in done.stderr


def test_slurm_takes_every_option_of_the_script_and_no_misspelt_one():
    script = SCRIPT.read_text()
    assert batch.faults(script) == []
    directives = re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE)
    assert len(directives) == 9
    missed = [name for name in directives if not batch.faults(script.replace(f"--{name}", f"--{name}x", 1))]
    steps = set(re.findall(r"--[\w-]+", re.search(r"step=\((.*)\)", script)[1])) | {"--ntasks", "--nodelist"}
    head, body = script[: script.index("set -euo")], script[script.index("set -euo") :]
    missed += [name for name in steps if not batch.faults(head + re.sub(rf"{name}\b(?!-)", f"{name}x", body))]
    assert missed == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("#SBATCH --nodes=2", "#SBATCH --nodes=two"),
        ("#SBATCH --nodes=2", "# SBATCH --nodes=2"),
        ("#SBATCH --nodes=2", "#SBTACH --nodes=2"),
        ("#SBATCH --nodes=2", "#SBATCH --nodes"),
        ("#SBATCH --nodes=2", "#SBATCH --nodes=2\n#SBATCH --nodes=3"),
        ("--time=04:00:00", "--time=4h"),
        ("--signal=B:USR1@180", "--signal=USR1:180"),
        ("--open-mode=append", "--open-mode=add"),
        ("--gpus-per-node=1", "--gpus-per-node="),
        ("--cpu-bind=none", "--cpu-bind=no"),
        ("set -euo pipefail\n", "set -euo pipefail\n#SBATCH --mem=0\n"),
    ],
)
def test_an_option_that_slurm_would_refuse_or_not_see_is_noticed(right, wrong):
    script = SCRIPT.read_text()
    assert right in script
    assert batch.faults(script.replace(right, wrong, 1)) != []


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_job_runs_over_all_nodes_and_nothing_is_left(start, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    process = start(
        "generate", "--prompts", prompts, "--output", tmp_path / "out", "--format", "files", "--quiet"
    )
    assert process.wait(150) == 0, (tmp_path / "output").read_text()
    assert pq.read_table(tmp_path / "out/manifest.parquet").column("status").to_pylist() == ["ok", "ok"]
    assert "2 of 2 nodes, 2 CPUs" in (tmp_path / "output").read_text()
    log = (tmp_path / "log").read_text()
    assert "ray start --head" in log
    assert "srun node2" in log
    assert "requeue" not in log
    lines = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert [line for line in lines if start.sessions in line] == []


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_near_its_time_limit_a_job_is_stopped_and_queued_again(start, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n" * 200_000)
    process = start("generate", "--prompts", prompts, "--output", tmp_path / "out", "--quiet")
    while not (tmp_path / "out/_job").exists():
        assert process.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(100) != 0
    assert "scontrol requeue 7" in (tmp_path / "log").read_text()
    assert not (tmp_path / "out/_SUCCESS").exists()
