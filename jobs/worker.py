"""One actor of a job on this machine: takes rows from the driver, gives tables back.

It runs as a process of its own (``python -m jobs.worker FD``) or, where an actor only waits for its
readers, as a thread of the driver. Messages go over a socket that nobody else sees; jobs/local.py
has the driver's side.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa

from pathflip.errors import PathFLIPError

GONE = (EOFError, OSError)
"""Errors of a connection whose other side has gone."""


def to_ipc(table: pa.Table) -> bytes:
    """Return a table as bytes, which a row can carry."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def from_ipc(data: bytes) -> pa.Table:
    """Return the table of :func:`to_ipc`."""
    return pa.ipc.open_stream(data).read_all()


def serve(connection: Connection) -> None:
    """Make the actor that the driver names, then answer until the driver hangs up.

    The driver sends (class, arguments, whether it shares an object), then rows, one table after
    the other. Each is answered by ``("table", table)`` as often as the actor makes one, then
    ``("done", None)``; or by ``("error", PathFLIPError.to_dict())`` or ``("failed", traceback)``,
    the last word. The actor may call the
    object that the driver shares: ``("call", (method, arguments))``, which a value answers.
    """

    def call(method: str, *arguments: Any) -> Any:
        connection.send(("call", (method, arguments)))
        return connection.recv()

    actor: Any = None
    try:
        kind, arguments, shares = connection.recv()
        actor = kind(*arguments, call) if shares else kind(*arguments)
        while True:
            made = actor(from_ipc(connection.recv()))
            for table in (made,) if isinstance(made, pa.Table) else made:
                connection.send(("table", to_ipc(table)))
            connection.send(("done", None))
    except PathFLIPError as error:
        with suppress(*GONE):
            connection.send(("error", error.to_dict()))
    except Exception:
        with suppress(*GONE):  # which is how it ends, too
            connection.send(("failed", traceback.format_exc()))
    finally:
        connection.close()
        if hasattr(actor, "close"):
            actor.close()


def main(arguments: list[str]) -> None:
    """Run the process: a socket to the driver is the argument, and stdin closes when it dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to answer
    threading.Thread(target=_end_with_driver, daemon=True).start()
    serve(Connection(int(arguments[0])))


def _end_with_driver() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
