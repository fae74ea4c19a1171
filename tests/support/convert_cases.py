"""Converts files and draws with what comes out, one file after another, and says of each how it went.

    python -m support.convert_cases FOLDER SECONDS

Every file of FOLDER is a case. For each a line of JSON is printed: its name, and `verdict`, which is "drawn", "refused", or what
went wrong. Code that a file gets to run, or a class or function it gets looked up, is noticed by Python's own audit events. The
processor time of all cases together is limited, so a case that never ends leaves itself and those after it without a line.
"""

import contextlib
import io
import json
import resource
import sys
from pathlib import Path

from millijoule.jobs import convert
from millijoule.jobs.entry import COMPLETE, ERROR
from millijoule.workers.errors import InputError
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.schemas import ImageRequest

MEMORY = 8 * 2**30

RUNS_CODE = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "os.fork"}

seen: list[str] = []


def verdict(case: Path) -> str:
    target = case.with_suffix(".out")
    words = io.StringIO()
    try:
        if case.suffix == ".pt":
            with contextlib.redirect_stderr(words), contextlib.redirect_stdout(io.StringIO()):
                code = convert.main([str(case), str(target)])
        else:
            target, code = case, COMPLETE
        if code == ERROR:
            message = words.getvalue().strip().splitlines()
            if target.exists():
                return "refused, and yet there is an output"
            if len(message) != 1 or str(case) not in message[0] or len(message[0]) > 3000:
                return f"refused with strange words: {message}"
            return "refused"
        if code != COMPLETE:
            return f"exit code {code}"
        try:
            generator = load_generator(str(target))
        except InputError as error:
            return "refused" if case == target else f"converted, then not loaded: {error}"
        images = generator.generate(
            [ImageRequest("p", 0, "", i, num_inference_steps=3) for i in range(4)]
        ).images
        return "drawn" if images.std(axis=(1, 2)).max() > 0 else "draws nothing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        if target != case:
            target.unlink(missing_ok=True)


def main() -> None:
    folder, seconds = Path(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + seconds))
    sys.addaudithook(lambda event, _: seen.append(event) if event in RUNS_CODE else None)
    for case in sorted(folder.iterdir()):
        how = verdict(case)
        if seen:
            how = f"ran {seen}"
            seen.clear()
        print(json.dumps({"case": case.name, "verdict": how}), flush=True)


if __name__ == "__main__":
    main()
