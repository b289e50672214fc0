"""A TCP proxy for a server's Unix socket that can stall: it then passes nothing on and closes nothing."""

from __future__ import annotations

import socket
from contextlib import suppress
from threading import Event, Lock, Thread


class StallingProxy:
    """Passes connections to `127.0.0.1:port` on to a Unix socket until `stall` is called."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = Lock()
        self._sockets: list[socket.socket] = []
        self._silence = Event()
        self._passing = Event()
        self._passing.set()
        self._closed = False
        Thread(target=self._accept, daemon=True).start()

    def stall(self) -> None:
        """Stops passing data. Open connections stay silent for good, new ones until `let_through`."""
        with self._lock:
            self._passing.clear()
            self._silence.set()
            self._silence = Event()

    def let_through(self) -> None:
        """Passes new connections on again; those that stalled stay silent."""
        self._passing.set()

    def close(self) -> None:
        """Closes the port and every connection."""
        with self._lock:
            self._closed = True
            self._passing.set()
            for one in [self._listener, *self._sockets]:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._passing.wait()
            with self._lock:
                if self._closed:
                    client.close()
                    return
                server = socket.socket(socket.AF_UNIX)
                self._sockets += [client, server]
                silence = self._silence
            with suppress(OSError):
                server.connect(self._target)
                for source, sink in ((client, server), (server, client)):
                    Thread(target=_pump, args=[source, sink, silence], daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, silence: Event) -> None:
    """Copies data until the source is closed, then closes the sink; during a stall discards the data, and the close."""
    with suppress(OSError):
        while data := source.recv(65_536):
            if not silence.is_set():
                sink.sendall(data)
        if not silence.is_set():
            sink.shutdown(socket.SHUT_WR)
