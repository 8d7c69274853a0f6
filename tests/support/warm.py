"""Run launch.py, torchrun or a script in processes forked after importing torch, which saves most of a start's time.

Everything else is as in a new process: arguments, environment, folder, session, signal handlers and output. Tests of
imports, and of signals during them, start a real process.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

from isobatch.trainers.launch.children import exit_code

LAUNCH = Path(__file__).parents[2] / "launch.py"
ROOM = 4096  # bytes of the server's command line, to be overwritten by that of a command
POLL_S = 0.005


class Warm:
    """A process that runs a program, with the methods of ``subprocess.Popen`` that tests use.

    Args:
        output: a file for stdout and stderr; ``communicate`` then returns no output of its own.
        program: a script, or "torchrun", whose workers are new processes.
    """

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        env: dict[str, str],
        output: IO[Any] | None = None,
        program: str = str(LAUNCH),
    ) -> None:
        self._output = [output or tempfile.TemporaryFile() for _ in ("stdout", "stderr")]  # noqa: SIM115
        reader, writer = os.pipe()
        request = json.dumps({"words": [program, *arguments], "folder": str(folder), "env": env}).encode()
        server = _server()
        socket.send_fds(server, [request], [*(file.fileno() for file in self._output), writer])
        os.close(writer)
        self.pid = int(server.recv(64))
        self._end = reader
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        if self.returncode is None and select.select([self._end], [], [], 0)[0]:
            self.returncode = int(os.read(self._end, 16))
            os.close(self._end)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or 1e9)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("launch.py", timeout or 0.0)
            time.sleep(POLL_S)
        return code

    def communicate(self, input: None = None, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end of the process, and return its stdout and stderr."""
        self.wait(timeout)
        for file in self._output:
            file.seek(0)
        out, err = (file.read().decode(errors="replace") for file in self._output)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_SERVERS: list[socket.socket] = []  # at most one; the server ends with this process, which holds the other end


def _server() -> socket.socket:
    """Return the socket of the forking process, which is started on first use."""
    if not _SERVERS:
        client, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.support.warm", str(server.fileno()), "-" * ROOM]
        subprocess.Popen(command, cwd=LAUNCH.parent, pass_fds=[server.fileno()])
        server.close()
        _SERVERS.append(client)
    return _SERVERS[0]


def serve(requests: socket.socket) -> None:
    """Fork a process for each request, and write its exit code to the request's pipe. End when the client closes."""
    running: dict[int, int] = {}  # pid -> pipe for its exit code
    while True:
        if select.select([requests], [], [], POLL_S)[0]:
            message, fds, *_ = socket.recv_fds(requests, 1 << 20, 3)
            if not message:
                return
            if (pid := os.fork()) == 0:
                _become(json.loads(message), fds)
            running[pid] = fds[2]
            for fd in fds[:2]:
                os.close(fd)
            requests.send(str(pid).encode())
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                os.write(running[ended[0]], str(os.waitstatus_to_exitcode(ended[1])).encode())
                os.close(running.pop(ended[0]))


def _become(request: dict[str, Any], fds: list[int]) -> None:
    """Run a program in this process as if started by a shell; never return."""
    try:
        os.setsid()
        for fd, own in zip((os.open(os.devnull, os.O_RDONLY), *fds[:2]), range(3), strict=True):
            os.dup2(fd, own)
        os.closerange(3, 1 << 16)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = request["words"]
        _show([sys.executable, *sys.argv])
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        program = sys.argv[0]
        sys.path[0] = str(LAUNCH.parent if program == "torchrun" else Path(program).parent)
        sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        _run(torchrun if program == "torchrun" else partial(runpy.run_path, program, run_name="__main__"))
    finally:
        os._exit(99)


def _run(program: Callable[[], object]) -> NoReturn:
    """Run a program and exit as Python would after it."""
    code = 0
    try:
        program()
    except SystemExit as end:
        code = exit_code(end)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _show(words: list[str]) -> None:
    """Overwrite the server's command line, by which tests find the processes of a run."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    line = b"\0".join(os.fsencode(word) for word in words)[: end - start - 1]
    ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    from torch.distributed.run import main as torchrun

    from isobatch.conf.compose import compose
    from isobatch.trainers.launch.worker import import_torch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import_torch(compose([]))
    import isobatch.trainers.run  # noqa: F401

    serve(socket.socket(fileno=int(sys.argv[1])))
