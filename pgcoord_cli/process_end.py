"""How the process ends: with an exit code, or by the signal that ended its work.

A shell ends a loop at Ctrl-C only if the command has died of SIGINT, and a service manager takes a death of SIGTERM for
success, but the exit code 143 for a failure. A command that a signal has ended therefore cleans up, restores the
default action of the signal, and sends it to itself. A shell shows both as 128 plus the number of the signal.

Codes are those of `subprocess`: a negative one is the number of a signal.
"""

import os
import signal
import sys
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """Exits with `code`, or dies of the signal whose number is `-code`; in that case open streams are not flushed."""
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(os.getpid(), -code)
        # Still alive: the first process of a container does not die of a signal without a handler.
        code = 128 - code
    sys.exit(code)
