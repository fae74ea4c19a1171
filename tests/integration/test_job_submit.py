"""`ray job submit` to a cluster started with `ray start --head`, the code shipped as a wheel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cluster import RayCluster
from support.jobs import assert_exactly_once, write_prompts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    # Ray installs a wheel with all it depends on, whatever the nodes have: gigabytes of torch for CUDA
    with RayCluster(head_cpus=2, dashboard=True, env={"PIP_NO_DEPS": "1"}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The distribution as a user would build it, from a copy, so that no build folder stays behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    subprocess.run(
        build, cwd=source, check=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    )
    return next(folder.glob("millijoule-*.whl"))


def submit(cluster: RayCluster, runtime_env: dict, *entrypoint: object) -> subprocess.CompletedProcess[str]:
    command = [
        *(str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", cluster.dashboard),
        *("--runtime-env-json", json.dumps(runtime_env), "--", *map(str, entrypoint)),
    ]
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
    return subprocess.run(
        command,
        env=env | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_command_installed_on_the_nodes(tmp_path, cluster):
    prompts = write_prompts(tmp_path / "prompts.txt", 20)
    runtime_env = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30"}}
    model = ("--model", "python:support.models:plain")
    done = submit(
        cluster,
        runtime_env,
        "millijoule",
        "generate",
        "--prompts",
        prompts,
        "--output",
        tmp_path / "out",
        *model,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert_exactly_once(tmp_path / "out", 20)


@pytest.mark.slow
def test_a_wheel_in_py_modules(tmp_path, cluster, wheel):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red heart\na blue star on a yellow background\n")
    runtime_env = {"py_modules": [str(wheel)]}
    code = "import millijoule.jobs as j; print('code at', j.__file__)"
    where = submit(cluster, runtime_env, "python", "-c", code).stdout.split("code at ")[-1].splitlines()[0]
    assert not Path(where).is_relative_to(ROOT), "the job must use the wheel, not this checkout"
    assert where.endswith("millijoule/jobs/__init__.py")
    done = submit(
        cluster,
        runtime_env,
        *("python", "-m", "millijoule.jobs.generate", "--prompts", prompts, "--output", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_exactly_once(tmp_path / "out", 2)
