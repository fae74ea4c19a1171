"""What Slurm 25 would not take of a batch script, or take in silence for a comment: options as sbatch(1) and srun(1) list them."""

from __future__ import annotations

import re
from collections.abc import Iterator

_OF_SBATCH = """
    account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment consolidate-segments constraint
    container container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency
    distribution error exclude exclusive export export-file extra extra-node-info get-user-env gid gpu-bind gpu-freq gpus
    gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep licenses
    mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist
    nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket oom-kill-step open-mode output overcommit
    oversubscribe parsable partition prefer priority profile propagate qos quiet reboot requeue reservation resv-ports segment signal
    sockets-per-node spread-job stepmgr switches test-only thread-spec threads-per-core time time-min tmp tres-bind tres-per-job
    tres-per-task uid use-min-nodes verbose wait wait-all-nodes wckey wrap
"""
_OF_SRUN = """
    account bcast chdir constraint container cpu-bind cpus-per-gpu cpus-per-task distribution environment epilog error exact
    exclude exclusive export gpu-bind gpus gpus-per-node gpus-per-task gres input interactive job-name jobid kill-on-bad-exit label
    mem mem-bind mem-per-cpu mpi multi-prog network no-allocate nodelist nodes ntasks ntasks-per-node open-mode output overcommit
    overlap partition preserve-env prolog pty quiet relative signal threads-per-core time unbuffered verbose wait
"""
_SBATCH, _SRUN = set(_OF_SBATCH.split()), set(_OF_SRUN.split())
_COUNT = r"\d+"
#: What the values look like of options that have a form of their own.
_FORMS = {
    "nodes": r"\d+(-\d+)?",
    "ntasks": _COUNT,
    "ntasks-per-node": _COUNT,
    "cpus-per-task": _COUNT,
    "gpus-per-node": r"([\w-]+:)?\d+",
    "time": r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}",
    "open-mode": "append|truncate",
    # [R][B][:]signal[@seconds]
    "signal": r"([RB]{1,2}:)?(USR1|USR2|TERM|INT|HUP|CONT|\d+)(@\d+)?",
    "kill-on-bad-exit": "0|1",
    "cpu-bind": "none|cores|sockets|threads|verbose|quiet",
}
#: Options that have no value, or may go without one.
_SWITCHES = {
    "contiguous",
    "exclusive",
    "hold",
    "overlap",
    "quiet",
    "requeue",
    "no-requeue",
    "verbose",
    "wait",
}


def faults(script: str) -> list[str]:
    """What is wrong with the options of a batch script and of the steps it starts."""
    return list(_directives(script)) + list(_steps(script))


def _directives(script: str) -> Iterator[str]:
    command_seen, seen = False, set()
    for line in script.splitlines()[1:]:
        looks = re.match(r"\s*#+\s*[A-Z]*\s*--[a-z]", line) or "#SBATCH" in line
        if looks and not line.startswith("#SBATCH --"):
            yield f"{line}: a comment for sbatch"
        elif looks and command_seen:
            yield f"{line}: sbatch stops reading at the first command"
        elif looks:
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            yield from _option(line, name, value, "=" in line, _SBATCH)
            if name in seen:
                yield f"{line}: said twice"
            seen.add(name)
        elif line.strip() and not line.startswith("#"):
            command_seen = True


def _steps(script: str) -> Iterator[str]:
    lines = [line.split("#")[0] for line in script.replace("\\\n", " ").splitlines()]
    for line in lines:
        if re.search(r"\bsrun\b|step\[@\]|^\s*start_ray ", line):
            # what a step runs, and what is for Ray, stands in quotes or behind the program's name
            own = re.split(r"\bhostname\b|\bbash\b", re.sub(r'start_ray "[^"]*"', "", line))[0]
            for option, has, value in re.findall(r"--([\w-]+)(=?)(\S*)", own):
                yield from _option(line.strip(), option, value.strip('")'), bool(has), _SRUN)


def _option(line: str, name: str, value: str, has_value: bool, known: set[str]) -> Iterator[str]:
    if name not in known:
        yield f"{line}: no option --{name}"
    elif not has_value and name not in _SWITCHES:
        yield f"{line}: --{name} wants a value"
    elif has_value and not value:
        yield f"{line}: --{name}= without a value"
    elif has_value and "$" not in value and not re.fullmatch(_FORMS.get(name, r"\S+"), value):
        yield f"{line}: --{name} is not {value}"
