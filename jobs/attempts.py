"""Attempts: runs a job's command again after a wait, while it fails for a reason that may pass.

Jobs resume when their command is given again, so nothing is done twice. An exit code says what may
pass: 2 is wrong usage, which does not; a code that is accepted is no failure at all, such as 3 of
ingest, that slides were quarantined. Who stops this process stops the command; it is not run again.

    python -m jobs.attempts --waits 30,120 --accept 3 -- python -m jobs.ingest SRC --archive URI
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

USAGE = 2
"""Exit code of a command that was given wrongly: it would fail in the same way again."""


class Stopped(BaseException):
    """A signal asks for the end; carries its number."""


def attempts(
    command: Sequence[str],
    *,
    waits: Sequence[float] = (),
    accept: Sequence[int] = (),
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Run a command until it succeeds, may not be run again, or has been run often enough.

    Args:
        command: Program and its arguments.
        waits: Seconds before each further attempt; as many as there are attempts after the first.
        accept: Exit codes that count as success, besides 0.
        sleep: Waits so many seconds.

    Returns:
        Exit code: 0, or that of the last attempt (128 and the number of a signal that ended it).
    """
    left = list(waits)
    while True:
        try:
            with subprocess.Popen(command) as process:
                try:
                    code = process.wait()
                except (Stopped, KeyboardInterrupt):
                    process.terminate()
                    raise
        except FileNotFoundError:
            print(f"There is no program {command[0]}.", file=sys.stderr)
            return USAGE
        if code in (0, *accept):
            return 0
        code = 128 - code if code < 0 else code
        if code == USAGE or not left:
            return code
        wait = left.pop(0)
        print(
            f"The command ended with {code}; it is run again in {wait:g} s ({len(left)} more after "
            "that).",
            file=sys.stderr,
            flush=True,
        )
        sleep(wait)


def main(words: Sequence[str]) -> int:
    """Read the arguments and run the command; return the exit code."""
    parser = argparse.ArgumentParser("jobs.attempts")
    parser.add_argument(
        "--waits", default="", help="Seconds before each further attempt, with commas."
    )
    parser.add_argument("--accept", default="", help="Exit codes that are no failure, with commas.")
    parser.add_argument("command", nargs="+", help="After --: the program and its arguments.")
    given = parser.parse_args(words)
    try:
        waits = [float(wait) for wait in given.waits.split(",") if wait]
        accept = [int(code) for code in given.accept.split(",") if code]
    except ValueError as error:
        parser.error(f"--waits and --accept are numbers with commas: {error}")

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    signal.signal(signal.SIGTERM, stop)
    try:
        return attempts(given.command, waits=waits, accept=accept)
    except Stopped as stopped:
        return 128 + int(stopped.args[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
