"""Another tool's server, on a free port of this machine for as long as a block lasts."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import psutil


@contextmanager
def running(
    command: list[str | Path], *, log: Path, environment: Mapping[str, str], seconds: int = 900
) -> Iterator[tuple[str, psutil.Process]]:
    """Run `command --port PORT` until the block ends; give the server's address and its process once it is healthy.

    What it prints goes to `log`; not healthy within `seconds`, it ends this program with the end of that.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with log.open("w", encoding="utf-8") as out:
        server = psutil.Popen(
            [*command, "--port", port], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=dict(environment)
        )
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + seconds
    try:
        while True:
            try:
                urlopen(f"{address}/health", timeout=30).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"the server did not start:\n{log.read_text(encoding='utf-8')[-3000:]}")
                time.sleep(0.5)
        yield address, server
    finally:
        family = [server, *server.children(recursive=True)] if server.poll() is None else []
        if family:
            server.terminate()
        for process in psutil.wait_procs(family, timeout=30)[1]:
            process.kill()
