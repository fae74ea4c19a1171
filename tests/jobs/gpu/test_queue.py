"""`make gpu`: steps are bounded, independent and continued; no command line is tried for the first time on a GPU.

The runner is tested as a program of its own, with steps written here: real processes that sleep, fail, fork, or die.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path

import pytest
import tyro

from millijoule.jobs.gpu import queue as gpu_queue
from millijoule.jobs.gpu import results as gpu_results
from millijoule.jobs.gpu import set_up as gpu_set_up
from millijoule.jobs.gpu.one_step import DONE, FAILED, NO_TIME, UNFINISHED, prepare_process
from millijoule.jobs.gpu.queue import RUNNING, SKIPPED, Device, take_up
from millijoule.jobs.gpu.results import WORK, QueueError, load_state, write_archive
from millijoule.jobs.gpu.steps import STEPS, Step, end_signal, fill
from millijoule.jobs.recipe import load_recipe

ROOT = Path(__file__).parents[3]

#: What the commands of steps are: module -> its options' class.
OPTIONS = {
    "millijoule.jobs.check": "CheckOptions",
    "millijoule.jobs.evaluate": "EvaluateOptions",
    "millijoule.jobs.generate": "GenerateOptions",
    "millijoule.jobs.report": "ReportOptions",
    "millijoule.jobs.train": "TrainOptions",
    "millijoule.jobs.verify": "VerifyOptions",
}

#: One of each kind: tests, a measurement that draws, measurements of counters. What the commands of the others do is tested with
#: their flags in tests/jobs/bench/test_kernels.py and tests/jobs/test_verify.py; whole steps are rehearsed by the slow test.
QUICK_NAMES = ("joules-per-image", "meter", "counter", "un0-tests")
QUICK = tuple(s for s in STEPS if s.name in QUICK_NAMES)


def step(name, *codes, shortest_s=1.0, longest_s=60.0, grace_s=0.5, **more):
    """A step of Python programs, the same in rehearsal as on a GPU."""
    commands = tuple(("-c", code) for code in codes)
    return Step(name, name, (shortest_s, longest_s), commands, commands, grace_s=grace_s, **more)


@pytest.fixture(autouse=True)
def _no_packages_needed(monkeypatch):
    """Steps of these tests need Python alone; what is looked for in a real queue has a test of its own."""
    monkeypatch.setattr(gpu_queue, "BASE", ())


def run(folder, steps, *more, budget=60):
    """The exit code, and the state as it lies in the folder."""
    argv = ["--rehearse", "--budget", str(budget), "--out", str(folder), *more]
    code = gpu_queue.main(argv, steps)
    return code, load_state(folder)


def statuses(state):
    return {name: row.status for name, row in state.steps.items()}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_step_that_fails_does_not_stop_the_rest(tmp_path, capsys):
    steps = (step("a", "raise SystemExit(3)"), step("b", "import os; os.abort()"), step("c", "print('fine')"))
    code, state = run(tmp_path, steps)
    assert code == 1
    assert statuses(state) == {"a": FAILED, "b": FAILED, "c": DONE}
    assert "exit code 3" in state.steps["a"].reason
    assert "SIGABRT" in state.steps["b"].reason
    assert "fine" in (tmp_path / "c.log").read_text()
    assert "1 done" in capsys.readouterr().out
    assert "failed" in (tmp_path / "summary.txt").read_text()


@pytest.mark.long
def test_a_step_that_overruns_is_killed_with_all_it_started(tmp_path, no_rehearsal):
    """It ignores SIGTERM, and its child has left for a session of its own, as Ray's daemons do."""
    hangs = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)
open('PIDS', 'w').write(f'{os.getpid()} {child.pid}')
time.sleep(600)
""".replace("PIDS", str(tmp_path / "pids"))
    code, state = no_rehearsal(tmp_path / "out", (step("hangs", hangs, longest_s=5), step("next", "pass")))
    assert code == 1
    assert statuses(state) == {"hangs": FAILED, "next": DONE}
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


@pytest.mark.long
def test_a_step_is_told_before_it_is_killed(tmp_path, no_rehearsal):
    """A training that gets SIGTERM writes its weights."""
    told = """
import signal, time
def end(*_):
    open('OUT', 'w').write('saved'); raise SystemExit(0)
signal.signal(signal.SIGTERM, end)
time.sleep(600)
""".replace("OUT", str(tmp_path / "weights"))
    _, state = no_rehearsal(tmp_path / "out", (step("training", told, longest_s=8, grace_s=4, goes_on=True),))
    assert (tmp_path / "weights").read_text() == "saved"
    assert statuses(state) == {"training": UNFINISHED}


@pytest.mark.long
@pytest.mark.parametrize(
    "started", [signal.default_int_handler, signal.SIG_IGN], ids=["in front", "in the background"]
)
def test_tests_that_overrun_leave_what_they_found(tmp_path, started):
    """The first test's result is in the XML though the second one never ends; what ends them is what the queue sends, also where
    the queue itself was started to ignore interrupts."""
    (tmp_path / "test_it.py").write_text(
        "import time\n\ndef test_a(): pass\n\ndef test_b():\n    print('begun', flush=True)\n    time.sleep(600)\n"
    )
    (words,) = next(s for s in STEPS if s.name == "un0-tests").commands
    words = [w for w in fill(words, {"folder": str(tmp_path)}) if not w.startswith("tests/")]
    program = [sys.executable, *words, "-s", str(tmp_path / "test_it.py")]
    before = signal.signal(signal.SIGINT, started)
    try:
        process = subprocess.Popen(
            program,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            preexec_fn=prepare_process,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    log = ""
    while "begun" not in log:
        log += process.stdout.readline()
    assert "test_a PASSED" in log
    told = []
    for _ in range(2):  # as the queue does
        process.send_signal(end_signal(tuple(words)))
        try:
            rest, _ = process.communicate(timeout=60)
            told.append((process.returncode, rest[-2000:]))
            break
        except subprocess.TimeoutExpired:
            told.append("asked, and not ended after 60 s")
    process.kill()
    process.wait()
    found = tmp_path / "junit.xml"
    assert found.exists(), told
    assert 'name="test_a"' in found.read_text()


@pytest.mark.long
def test_the_budget_holds(tmp_path, no_rehearsal):
    """No step gets more than is left, what does not fit is not begun, and being cut off is no failure."""
    sleeps = "import time; time.sleep(600)"
    steps = (step("a", sleeps, longest_s=500), step("b", sleeps, longest_s=500))
    began = time.monotonic()
    code, state = no_rehearsal(tmp_path, steps, budget=12)
    took = time.monotonic() - began
    assert code == 0
    assert statuses(state) == {"a": NO_TIME, "b": NO_TIME}
    assert state.steps["a"].granted_s <= 12 - gpu_queue.CLOSING_S
    assert state.steps["b"].runs == 0
    assert took < 500  # neither sleep was waited for


def test_a_step_is_not_begun_with_less_than_its_shortest_time(tmp_path, monkeypatch, no_rehearsal):
    steps = (step("long", "pass", shortest_s=1000, longest_s=2000), step("short", "pass"))
    code, state = no_rehearsal(tmp_path, steps, budget=30)
    assert code == 0
    assert statuses(state) == {"long": NO_TIME, "short": DONE}
    assert "needs 1000 s" in state.steps["long"].reason


@pytest.fixture
def no_rehearsal(monkeypatch):
    """Run steps as on a board that is stood in for."""

    def run_there(folder, steps, *more, budget=60, name="NVIDIA Test", uuid="GPU-1"):
        monkeypatch.setattr(gpu_queue, "find_device", lambda: Device(name, uuid))
        code = gpu_queue.main(["--budget", str(budget), "--out", str(folder), *more], steps)
        return code, load_state(folder)

    return run_there


def test_what_is_done_stays_done_when_there_is_no_time_to_repeat_it(tmp_path, no_rehearsal, capsys):
    steps = (step("a", "pass", shortest_s=20, longest_s=40),)
    assert statuses(no_rehearsal(tmp_path, steps)[1]) == {"a": DONE}
    _, state = no_rehearsal(tmp_path, steps, "--steps", "a", budget=10)
    assert statuses(state) == {"a": DONE}
    assert "no time left" in capsys.readouterr().out


def count(path):
    return f"open({str(path)!r}, 'a').write('x')"


@pytest.mark.long
def test_a_second_call_goes_on(tmp_path):
    """Done steps are not repeated unless asked for; failed ones are, after those that never ran."""
    marks = {name: tmp_path / name for name in "abc"}
    broken = f"{count(marks['b'])}; raise SystemExit(int(not __import__('os').path.exists({str(tmp_path / 'mended')!r})))"
    steps = (step("a", count(marks["a"])), step("b", broken))
    out = tmp_path / "out"
    assert run(out, steps)[0] == 1
    (tmp_path / "mended").touch()
    more = (*steps, step("c", count(marks["c"])))
    code, state = run(out, more)
    assert code == 0
    assert statuses(state) == {"a": DONE, "b": DONE, "c": DONE}
    assert {name: path.read_text() for name, path in marks.items()} == {"a": "x", "b": "xx", "c": "x"}
    assert list(state.steps) == ["a", "b", "c"]
    run(out, more, "--steps", "a")
    assert marks["a"].read_text() == "xx"
    assert marks["c"].read_text() == "x"


@pytest.mark.long
def test_results_survive_a_kill_in_the_middle(tmp_path):
    """SIGKILL for the program while its second step works: the first is kept, the second's processes end, the next call goes on."""
    out, marks, pid_file = tmp_path / "out", tmp_path / "a", tmp_path / "pids"
    waits = f"""
import os, subprocess, sys, time
if not os.path.exists({str(tmp_path / "second-call")!r}):
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)
    time.sleep(0.2)
    open({str(pid_file)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')
    time.sleep(600)
"""
    looks = f"""
import os, sys
left = [p for p in open({str(pid_file)!r}).read().split() if os.path.exists('/proc/' + p + '/exe')]
sys.exit(f'still there: {{left}}' if left else 0)
"""
    program = f"""
import sys
from millijoule.jobs.gpu import queue as gpu_queue
sys.path.insert(0, {str(Path(__file__).parent)!r})
gpu_queue.BASE = ()
from millijoule.jobs.gpu.steps import Step
def step(name, code):
    return Step(name, name, (1.0, 60.0), (), (('-c', code),), grace_s=0.5)
steps = (step('a', {count(marks)!r}), step('b', {waits!r}), step('c', {looks!r}))
sys.exit(gpu_queue.main(['--rehearse', '--budget', '100', '--out', {str(out)!r}, *sys.argv[1:]], steps))
"""
    first = subprocess.Popen([sys.executable, "-c", program])
    while not (pid_file.exists() and len(pid_file.read_text().split()) == 2):
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    state = load_state(out)
    assert statuses(state) == {"a": DONE, "b": RUNNING}
    assert subprocess.run([sys.executable, "-c", program, "--steps", "c"], check=False).returncode == 0
    assert statuses(load_state(out)) == {"a": DONE, "b": UNFINISHED, "c": DONE}
    (tmp_path / "second-call").touch()
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert statuses(load_state(out)) == {"a": DONE, "b": DONE, "c": DONE}
    assert marks.read_text() == "x"
    assert not any(alive(int(pid)) for pid in pid_file.read_text().split())


def test_two_runs_do_not_work_on_one_folder(tmp_path, capsys):
    out = tmp_path / "out"
    inner = f"import sys; from millijoule.jobs.gpu import queue as gpu_queue; sys.exit(gpu_queue.main(['--rehearse', '--out', {str(out)!r}], ()))"
    code, _state = run(out, (step("a", inner),))
    assert code == 1
    assert "another run is at work" in (out / "a.log").read_text()


@pytest.mark.long
def test_results_of_other_code_or_another_kind_of_board_are_not_continued(
    tmp_path, monkeypatch, capsys, no_rehearsal
):
    steps = (step("a", "pass"),)
    assert no_rehearsal(tmp_path, steps)[0] == 0
    assert no_rehearsal(tmp_path, steps, name="NVIDIA Other")[0] == 2
    assert "results of NVIDIA Test" in capsys.readouterr().err
    assert no_rehearsal(tmp_path, steps, uuid="GPU-2")[0] == 0
    assert "another board of the kind: GPU-2 after GPU-1" in capsys.readouterr().out
    monkeypatch.setattr(gpu_queue, "hash_code", lambda: "other")
    assert no_rehearsal(tmp_path, steps)[0] == 2
    assert "other code" in capsys.readouterr().err
    (tmp_path / "state.json").write_text('{"format_version": 1, "steps"')
    with pytest.raises(QueueError, match="cannot be read"):
        take_up(tmp_path, Device("NVIDIA Test", "GPU-1"))


def test_what_is_hashed_is_the_code(tmp_path):
    for folder in gpu_queue.CODE:
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "jobs" / "a.py").write_text("1")
    before = gpu_queue.hash_code(tmp_path)
    (tmp_path / "jobs" / "__pycache__").mkdir()
    (tmp_path / "jobs" / "__pycache__" / "a.pyc").write_text("1")
    (tmp_path / "README.md").write_text("1")
    assert gpu_queue.hash_code(tmp_path) == before
    (tmp_path / "jobs" / "a.py").write_text("2")
    assert gpu_queue.hash_code(tmp_path) != before


@pytest.mark.long
def test_a_training_that_is_not_at_its_end_is_not_done(tmp_path, no_rehearsal):
    logs = "import sys, json; print(sys.argv); open(sys.argv[1] + '/log.jsonl', 'w').write(json.dumps({'step': 7}) + '\\n')"
    makes = "import os, sys; os.makedirs(sys.argv[1])"
    commands = tuple(("-c", code, "{folder}/run") for code in (makes, logs))
    training = {
        n: Step(n, n, (1, 60), commands, (), training_steps=s) for n, s in (("whole", 7), ("part", 8))
    }
    _, state = no_rehearsal(tmp_path, tuple(training.values()))
    assert statuses(state) == {"whole": DONE, "part": UNFINISHED}
    assert "7 of 8" in state.steps["part"].reason


def test_a_step_that_breaks_the_program_s_expectations_is_its_own_fault_alone(tmp_path, no_rehearsal):
    """A training that says it is done and has no log."""
    _, state = no_rehearsal(tmp_path, (step("a", "pass", training_steps=5), step("b", "pass")))
    assert statuses(state) == {"a": FAILED, "b": DONE}
    assert "log.jsonl" in state.steps["a"].reason


def test_a_step_that_lacks_a_package_or_a_file_is_skipped_with_the_way_out(tmp_path, capsys):
    steps = (
        step("a", "pass", needs=("no-such-package-here",)),
        step("b", "pass", after="a/model"),
        step("c", "pass"),
    )
    code, state = run(tmp_path, steps)
    assert code == 0
    assert statuses(state) == {"a": SKIPPED, "b": SKIPPED, "c": DONE}
    (fetch,) = (x for x in capsys.readouterr().out.splitlines() if "pip download" in x)
    assert "no-such-package-here" in fetch
    assert "no-such-package-here" in state.steps["a"].reason
    assert "a/model" in state.steps["b"].reason


def test_a_step_that_does_not_exist_is_refused_by_name(tmp_path, capsys):
    assert run(tmp_path, (step("a", "pass"),), "--steps", "z")[0] == 2
    assert "no step is called z; there are a" in capsys.readouterr().err


def test_without_a_board_the_way_out_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    assert gpu_queue.main(["--out", str(tmp_path)]) == 2
    assert "--rehearse" in capsys.readouterr().err


def test_the_boards_are_those_the_driver_s_command_lists(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\nprintf 'NVIDIA X, 80 GB, GPU-1, 580.1\\nNVIDIA Y, GPU-2, 580.1\\n'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_queue.find_device() == Device("NVIDIA X, 80 GB, NVIDIA Y", "GPU-1, GPU-2 (driver 580.1)")


def test_the_archive_has_all_results_in_parts(tmp_path, monkeypatch):
    out = tmp_path / "gpu"
    (out / WORK).mkdir(parents=True)
    (out / WORK / "site").write_text("wheels")
    (out / "run").mkdir()
    (out / "run" / "checkpoint.pt").write_text("large")
    (out / "run" / "weights").write_bytes(os.urandom(5000))
    (out / "state.json").write_text("{}")
    monkeypatch.setattr(gpu_results, "ARCHIVE_PART_BYTES", 1000)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "gpu.tgz.77").write_text("of an earlier call")
    write_archive(out, tmp_path / "back" / "gpu.tgz")
    parts = sorted((tmp_path / "back").iterdir())
    assert len(parts) > 4
    assert all(part.stat().st_size <= 1000 for part in parts)
    (tmp_path / "whole").write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(tmp_path / "whole") as archive:
        names = {name for name in archive.getnames() if archive.getmember(name).isfile()}
        assert archive.extractfile("gpu/run/weights").read() == (out / "run" / "weights").read_bytes()
    assert names == {"gpu/run/weights", "gpu/state.json"}


# -- packages -------------------------------------------------------------------------------------------------------


def write_wheel(folder, name, version, body="", requires=()):
    """The least a wheel may be."""
    import zipfile

    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", body)
        needs = "".join(f"Requires-Dist: {r}\n" for r in requires)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.long
def test_carried_wheels_are_installed_and_what_is_still_missing_is_named(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "mjcarried", "1.0", requires=("torch>=99",))  # what the wheel asks for is not fetched
    write_wheel(wheels, "mjincomplete", "1.0", body="import mjnowhere")
    write_wheel(wheels, "numpy", "0.1")  # the machine has a better one
    site = tmp_path / "site"
    lacks = gpu_set_up.prepare(site, wheels, ["mjcarried", "mjincomplete", "mjabsent", "numpy"])
    assert set(lacks) == {"mjincomplete", "mjabsent"}
    assert lacks["mjincomplete"].package == "mjnowhere"
    assert "mjnowhere is missing" in lacks["mjincomplete"].reason
    assert not (site / "numpy.py").exists()
    command = gpu_set_up.how_to_fetch(["mjnowhere", "tyro"])
    assert f"--python-version {sys.version_info.major}.{sys.version_info.minor}" in command
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"'{next(b for b in bounds if b.startswith('tyro'))}'" in command
    # and the program is found with them, from the tree, under its name and version
    env = {**os.environ, "PYTHONPATH": gpu_set_up.python_path(site, None)}
    code = "import mjcarried, millijoule.jobs.cli as c, importlib.metadata as m; print(c.__file__, m.version('millijoule'))"
    found = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert (ROOT / "jobs" / "cli.py").samefile(found.stdout.split()[0])


def test_a_package_that_is_too_old_is_named_with_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_set_up, "minimum_versions", lambda: {"numpy": "999.1"})
    lacks = gpu_set_up.prepare(tmp_path / "site", None, ["numpy"])
    assert "999.1 or newer" in lacks["numpy"].reason


def test_what_is_slow_to_import_is_not_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_set_up, "IMPORT_TIMEOUT_S", 0.001)
    assert gpu_set_up.prepare(tmp_path / "site", None, ["numpy"]) == {}
    assert "not checked any further" in capsys.readouterr().out


@pytest.mark.long
def test_wheels_that_do_not_install_are_reported_not_raised(tmp_path):
    (tmp_path / "mjbroken-1.0-py3-none-any.whl").write_text("no zip")
    lacks = gpu_set_up.prepare(tmp_path / "site", tmp_path, ["mjbroken"])
    assert "pip could not install" in lacks["mjbroken"].reason


# -- the steps themselves -------------------------------------------------------------------------------------------


def lines(kind):
    return [
        pytest.param(s, words, kind, id=f"{s.name}-{kind}-{number}")
        for s in STEPS
        for number, words in enumerate(getattr(s, kind))
    ]


@pytest.mark.parametrize(("of", "words", "kind"), lines("commands") + lines("toy"))
def test_every_command_line_is_one_its_program_takes(tmp_path, of, words, kind):
    """Parsed by the program's own options; recipes, files and tests that are named are there."""
    values = {"folder": str(tmp_path), "results": str(tmp_path), "minutes": "2.05", "seconds": "123"}
    words = fill(words, values)
    assert not any("{" in word or "}" in word for word in words)
    assert words[0] == "-m"
    if words[1] == "pytest":
        assert all((ROOT / w).is_file() for w in words if w.startswith("tests/"))
        return
    module, arguments = words[1], words[2:]
    if module == "millijoule.jobs.bench":
        module, arguments = f"{module}.{arguments[0]}", arguments[1:]
    options_class = getattr(importlib.import_module(module), OPTIONS.get(module, "BenchOptions"))
    options = tyro.cli(options_class, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    if module.endswith(".train"):
        recipe = load_recipe(options.recipe, {} if options.steps is None else {"steps": options.steps})
        assert (recipe.training.steps == of.training_steps) is (kind == "commands")
    if module.endswith(".generate"):
        assert all((ROOT / p).exists() for p in options.prompts)


def test_every_step_can_be_run_in_its_time():
    assert len({s.name for s in STEPS}) == len(STEPS)
    for s in STEPS:
        assert s.reserve_s + s.grace_s < s.seconds[0] <= s.seconds[1], s.name
        assert s.commands, s.name
        assert s.toy, s.name
    left = {f"{s.name}/run/model" for s in STEPS}
    assert {s.after for s in STEPS} <= {"", *left}


def test_the_queue_s_page_names_every_step():
    page = (ROOT / "benchmarks" / "gpu-queue.md").read_text()
    missing = [s.name for s in STEPS if f"`{s.name}`" not in page]
    assert not missing


def rehearse(folder, steps):
    names = [s.name for s in steps]
    command = [sys.executable, "-m", "millijoule.jobs.gpu.queue", "--rehearse", "--budget", "900"]
    done = subprocess.run(
        [*command, "--out", str(folder), "--steps", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    state = load_state(folder)
    assert done.returncode == 0, done.stdout
    return statuses(state)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_quick_steps_are_rehearsed(tmp_path):
    found = rehearse(tmp_path, QUICK)
    assert found == dict.fromkeys((s.name for s in QUICK), DONE)
    for path in ("joules-per-image/gpu.json", "meter/meter.json", "counter/counter.json"):
        assert json.loads((tmp_path / path).read_text())["stand_in"] is True
    assert "<testcase" in (tmp_path / "un0-tests/junit.xml").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_all_steps_are_rehearsed(tmp_path):
    found = rehearse(tmp_path, STEPS)
    assert found == dict.fromkeys((s.name for s in STEPS), DONE)
    for path in ("integer-kernels/kernels.json", "fused-kernels/kernels.json"):
        assert json.loads((tmp_path / path).read_text())["stand_in"] is True
    assert (tmp_path / "verify/comparison/bundle").is_dir()
