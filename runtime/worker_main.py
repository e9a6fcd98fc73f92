"""What a `Worker` runs: begins to load the engine, and imports the rest meanwhile.

python -m trtc.runtime.worker_main FD        FD: the inherited end of the connection
"""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection

from ..core.errors import TrtcError
from .early_start import begin_loading


def main(connection: Connection) -> None:
    """Serves until it is told to stop or the other process is gone. First message: the engine directory, and the options."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes; the other one says what to do
    engine_dir, options = connection.recv()
    try:
        begun = begin_loading(engine_dir, verify=options.get("verify", True))
    except TrtcError as error:
        connection.send(error)
        return
    from .engine_worker import run

    run(connection, begun, options)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
