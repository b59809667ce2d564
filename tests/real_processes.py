"""Commands in processes of their own, one or two that are one run, for tests that kill them or let them fail."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax

LIMIT = 400  # seconds that any of them may take
RUN = "import sys; from dpo_jax.cli import main; sys.exit(main(sys.argv[1:]))"

Start = Callable[..., subprocess.Popen]


@contextmanager
def starting() -> Iterator[Start]:
    """`start(devices, words, environment, script=RUN)` begins a process; whatever still runs is killed at the end."""
    running: list[subprocess.Popen] = []

    def start(
        devices: int, words: Sequence[object], environment: dict[str, str] | None = None, script: str = RUN
    ) -> subprocess.Popen:
        flags = re.sub(r"(?<=device_count=)\d+", str(devices), os.environ["XLA_FLAGS"])
        # The proxies of a machine have nothing to say on its loopback.
        own = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        everything = {**own, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **(environment or {})}
        command = [sys.executable, "-c", script, *map(str, words)]
        process = subprocess.Popen(command, env=everything, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(process)
        return process

    try:
        yield start
    finally:
        for process in running:
            process.kill()
            process.communicate()


def start_two(
    start: Start, words: Sequence[object], *, devices: int = 2, environment: dict[str, str] | None = None, **given: str
) -> list[subprocess.Popen]:
    """Two processes of one run, each with some devices."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    fixed = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", **(environment or {})}
    words = [*words, "--distributed"]
    return [start(devices, words, {**fixed, "JAX_PROCESS_ID": str(index)}, **given) for index in range(2)]


def shared_programs() -> dict[str, str]:
    """Environment of a process that shares the compiled programs of `tests/cli`."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),  # type: ignore[reportAttributeAccessIssue]
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def ended(processes: Sequence[subprocess.Popen]) -> list[tuple[str, str]]:
    """What they printed on standard output and standard error, in at most the time they may take."""
    limit = time.monotonic() + LIMIT
    return [process.communicate(timeout=max(limit - time.monotonic(), 1)) for process in processes]


def finish(processes: Sequence[subprocess.Popen]) -> list[tuple[str, str]]:
    """`ended`, of processes that all succeed."""
    answers = ended(processes)
    for process, (_, err) in zip(processes, answers):
        assert process.returncode == 0, err
    return answers


def kill_at(processes: Sequence[subprocess.Popen], out: Path, step: int) -> None:
    """kill -9 to all of them as soon as a checkpoint of the step or of a later one is there."""
    limit = time.monotonic() + LIMIT
    while not any(path.name.isdigit() and int(path.name) >= step for path in (out / "checkpoints").glob("*")):
        over = [process.communicate()[1] for process in processes if process.poll() is not None]
        assert not over and time.monotonic() < limit, over
        time.sleep(0.01)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()


def result_of(answer: tuple[str, str]) -> dict:
    """The last line of standard output; the transport between CPU processes prints lines of its own before it."""
    return json.loads(answer[0].splitlines()[-1])
