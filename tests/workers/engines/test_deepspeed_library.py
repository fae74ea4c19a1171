"""DeepSpeed leaves no trace in a process: what its import and its engines change is compared from outside, in new processes."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from support.tiny_pipelines import tiny_pipeline

#: What a process is like, as JSON, and what it did meanwhile that others could notice.
SNAPSHOT = """
import json, logging, os, signal, socket, sys, threading, warnings
import torch, torch.distributed

noticed, watching = [], False
LOUD = ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "os.system", "socket.bind", "socket.connect", "os.mkdir")

def watch(event, args):
    if watching and event in LOUD:
        noticed.append(f"{event} {args}"[:200])
    if watching and event == "open":
        mode, flags = args[1], args[2]
        written = any(m in mode for m in "wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if written and "__pycache__" not in str(args[0]) and str(args[0]) != "/dev/null":
            noticed.append(f"open {args}"[:200])

sys.addaudithook(watch)

def loggers():
    named = {n: x for n, x in logging.root.manager.loggerDict.items() if isinstance(x, logging.Logger)}
    shown = {"root": logging.root} | {n: x for n, x in named.items() if not n.lower().startswith("deepspeed")}
    return {n: [x.level, x.propagate, len(x.handlers), x.disabled] for n, x in shown.items()}

def snapshot():
    return {
        "environment": dict(os.environ),
        "loggers": {n: x for n, x in loggers().items() if n == "root" or x != [0, True, 0, False]},
        "signals": [str(signal.getsignal(s)) for s in sorted(signal.valid_signals())],
        "threads": sorted(t.name for t in threading.enumerate()),
        "warnings": [str(f) for f in warnings.filters],
        "sockets": sorted(t for t in (os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{n}")) if "socket" in t),
        "torch": [str(torch.get_default_dtype()), str(torch.get_default_device()), torch.get_num_threads(),
                  torch.is_grad_enabled(), torch.distributed.is_initialized(), torch.are_deterministic_algorithms_enabled(),
                  torch.get_float32_matmul_precision(), hash(bytes(torch.get_rng_state().numpy()))],
        "patched": [str(x) for x in (torch.nn.functional.linear, torch.nn.Module.__init__, torch.nn.Module.apply, torch.load,
                                     sys.excepthook, threading.excepthook, print, sys.stdout, sys.stderr)],
        "path": sys.path,
    }
"""


def run(code, **environment):
    """stdout's last line as JSON, and everything that was printed before it or to stderr."""
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **environment},
    )
    assert said.returncode == 0, said.stderr
    *before, last = said.stdout.splitlines()
    return json.loads(last), "\n".join(before) + said.stderr


def test_loading_and_drawing_changes_nothing_in_the_process_and_prints_nothing():
    difference, printed = run(
        SNAPSHOT
        + """
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.schemas import ImageRequest
request = ImageRequest("p", 0, "a red cat", seed=1)
torch.manual_seed(0)  # building a model draws numbers, in every engine as many
load_generator("default", options=GeneratorOptions(engine="eager")).generate([request])
before, watching = snapshot(), True
torch.manual_seed(0)
generator = load_generator("default")
generator.generate([request])
watching = False
after = snapshot()
changed = {k: [before[k], after[k]] for k in before if before[k] != after[k]}
print(json.dumps({"changed": changed, "noticed": noticed, "loaded": "deepspeed" in sys.modules}))
""",
        MILLIJOULE_KERNEL="reference",
    )
    assert difference == {"changed": {}, "noticed": [], "loaded": True}
    assert printed == ""


def test_what_an_environment_says_already_is_left_as_it_is():
    (variables,), _ = run(
        """
        import json, os
        from millijoule.workers.engines.deepspeed_library import import_deepspeed
        import_deepspeed("cpu")
        names = ("PYTORCH_NVML_BASED_CUDA_CHECK", "DS_ACCELERATOR", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
        print(json.dumps([{name: os.environ.get(name) for name in names}]))
        """,
        PYTORCH_NVML_BASED_CUDA_CHECK="0",
        RANK="7",
    )
    none = dict.fromkeys(("DS_ACCELERATOR", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"))
    assert variables == {"PYTORCH_NVML_BASED_CUDA_CHECK": "0", "RANK": "7", **none}


@pytest.mark.parametrize("model", ["default", pytest.param("sd15", marks=pytest.mark.long)])
def test_who_asks_for_eager_never_imports_deepspeed(model):
    name = model if model == "default" else str(tiny_pipeline(model))
    loaded, _ = run(
        f"""
        import json, sys
        import millijoule.jobs.cli, millijoule.workers.actor, millijoule.jobs.generate
        from millijoule.workers.generators.registry import describe_model, load_generator
        from millijoule.workers.generators.options import GeneratorOptions
        describe_model({name!r})
        torch_too_soon = "torch" in sys.modules
        generator = load_generator({name!r}, options=GeneratorOptions(engine="eager"))
        print(json.dumps([generator.engine.name, torch_too_soon, "deepspeed" in sys.modules, "torch._dynamo" in sys.modules]))
        """
    )
    assert loaded[:3] == ["eager", False, False]
    if model == "default":
        assert not loaded[3]


def test_two_workers_of_a_host_do_not_meet():
    code = """
        import json, sys, hashlib
        from millijoule.workers.generators.registry import load_generator
        from millijoule.workers.schemas import ImageRequest
        images = load_generator("default").generate([ImageRequest("p", 0, "a red cat", seed=1)]).images
        print(json.dumps(hashlib.sha256(images.tobytes()).hexdigest()))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {
        **os.environ,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }
    both = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment | {"MASTER_PORT": "29500"}
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [p.returncode for p in both] == [0, 0]
    assert said[0] == said[1] != ""


def test_without_deepspeed_the_message_names_the_option_and_the_way_out():
    message, _ = run(
        """
        import json, sys
        sys.modules["deepspeed"] = None  # as if it were not installed
        from millijoule.workers.errors import InputError
        from millijoule.workers.generators.registry import load_generator
        try:
            load_generator("default")
        except InputError as error:
            print(json.dumps(str(error)))
        """,
        MILLIJOULE_KERNEL="reference",
    )
    assert message.startswith("--engine deepspeed: DeepSpeed cannot be imported")
    assert "pip install deepspeed" in message
    assert "--engine eager" in message
