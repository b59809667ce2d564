"""What the commands say and how they fail: logs on standard error, results on standard output, exit codes 0, 1, 2."""

import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

DONE, FAILURE, WRONG_USE = 0, 1, 2


class UsageError(Exception):
    """The command was used wrongly: an unknown method, options that do not go together. Exit code 2."""


@dataclass(frozen=True)
class OutputConfig:
    """What every command prints."""

    json: bool = False
    """Print the result as one JSON object, the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def say(text: str) -> None:
    """One log line on standard error."""
    print(text, file=sys.stderr, flush=True)


def result(values: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """The result of a command on standard output: JSON, or text for people."""
    if as_json:
        print(json.dumps({name: _plain(value) for name, value in values.items()}), flush=True)
    else:
        print(text, flush=True)


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    # JSON has no nan; null is what every reader understands.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def guarded(command: Callable[[], None], *, debug: bool) -> int:
    """Run a command and turn what it raises into a message and an exit code."""
    try:
        command()
    except UsageError as error:
        say(f"dpo-jax: {error}")
        return WRONG_USE
    except KeyboardInterrupt:
        say("dpo-jax: interrupted")
        return FAILURE
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else DONE if stop.code is None else WRONG_USE
    except BrokenPipeError:
        return FAILURE
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            say(f"dpo-jax: error: {error or type(error).__name__}")
            if not isinstance(error, ValueError | OSError):
                say(f"({type(error).__name__}; --debug shows where)")
        return FAILURE
    return DONE
