"""Programs in processes of their own, which need not import torch again.

An interpreter takes seconds to import torch, lightning and transformers. One server does so for all tests of a process,
and every program is forked from it. Its words, folder, variables, streams and status are those of ``python WORDS``. But
the server has read what an interpreter reads as it starts (``PYTHONUTF8``, ``LC_ALL``, ``HOME``) and what packages read
as they are imported (``HF_HOME``): a test that sets these starts an interpreter by ``subprocess``.
"""

import atexit
import json
import os
import random
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

Words = Sequence[str | Path]
_server: Path | None = None


class Program:
    """A running program: what tests use of ``subprocess.Popen``."""

    def __init__(
        self,
        words: Words,
        *,
        cwd: str | Path | None = None,
        env: dict[str, str] | None = None,
        stdin: int | IO[Any] = subprocess.DEVNULL,
        stdout: int | IO[Any] = subprocess.DEVNULL,
        stderr: int | IO[Any] = subprocess.DEVNULL,
        limits: dict[str, int] | None = None,
    ) -> None:
        """Start ``python WORDS``; streams are open files or descriptors, ``limits`` are the kernel's (``NOFILE``)."""
        request = {
            "words": [str(word) for word in words],
            "cwd": str(Path(cwd or ".").resolve()),
            "env": dict(os.environ if env is None else env),
            "limits": limits or {},
        }
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_address())
        with Path(os.devnull).open("r+b") as nothing:
            given = [nothing if stream == subprocess.DEVNULL else stream for stream in (stdin, stdout, stderr)]
            socket.send_fds(self._connection, [b"."], [s if isinstance(s, int) else s.fileno() for s in given])
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._connection.makefile()
        answer = self._answers.readline()
        assert answer, (Path(_address()).parent / "errors.txt").read_text()  # the server could not import something
        self.pid = int(answer)

    def wait(self, timeout: float | None = None) -> int:
        """Its status, or minus the signal that ended it; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(words: Words, *, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` to its end, and give back its status and what it wrote."""
    return run_all([words], [options], timeout)[0]


def launch(processes: int, words: Words, *, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` in so many processes that find each other, with the variables that torchrun gives them.

    The status is the first that is not 0, and the streams are those of all processes, one after the other.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }
    given = options.pop("env", os.environ)
    each = [
        {**options, "env": {**given, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}} for rank in range(processes)
    ]
    done = run_all([words] * processes, each, timeout)
    status = next((one.returncode for one in done if one.returncode), 0)
    texts = ("".join(one.stdout for one in done), "".join(one.stderr for one in done))
    return subprocess.CompletedProcess(words, status, *texts)


def run_all(
    programs: Sequence[Words], options: Sequence[dict[str, Any]], timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    """Run programs at the same time to their ends."""
    started, done = [], []
    try:
        for words, own in zip(programs, options, strict=True):
            streams = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 - they are read below
            started.append((Program(words, stdout=streams[0], stderr=streams[1], **own), streams))
        for (program, streams), words in zip(started, programs, strict=True):
            status = program.wait(timeout)
            for stream in streams:
                stream.seek(0)
            done.append(subprocess.CompletedProcess(words, status, *(stream.read() for stream in streams)))
    finally:
        for program, streams in started:
            program.kill()
            for stream in streams:
                stream.close()
    return done


def _address() -> str:
    """Where the server of this process listens; it is started by the first program, and ends with this process."""
    global _server
    if _server is None:
        folder = tempfile.TemporaryDirectory(prefix="programs_")
        _server = Path(folder.name) / "socket"
        words = [sys.executable, __file__, str(_server)]
        with (Path(folder.name) / "errors.txt").open("w") as errors:  # what packages say as they are imported
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        atexit.register(folder.cleanup)
        atexit.register(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
    return str(_server)


def _serve(address: str) -> dict[str, Any]:
    """Wait for requests, for as long as standard input is open; comes back in the forked process, with its request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    _import()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers below
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            sys.exit()
        connection = listener.accept()[0]
        if os.fork() == 0:  # a keeper, which waits for one program
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
            request: dict[str, Any] = json.loads(connection.makefile().readline())
            program = os.fork()
            if program == 0:
                connection.close()
                for place, stream in enumerate(streams):
                    os.dup2(stream, place)
                    os.close(stream)
                return request
            connection.sendall(f"{program}\n".encode())
            for stream in (0, 1, *streams):  # a reader of the program's output must see its end
                os.close(stream)
            status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
            with suppress(BrokenPipeError):  # the test may have gone on
                connection.sendall(f"{status}\n".encode())
            os._exit(0)
        connection.close()


def _import() -> None:
    """What most programs of the tests import, at once or late."""
    import datasets  # noqa: F401
    import torchmetrics  # noqa: F401
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lit_sparse.cli.main  # noqa: F401


def _execute(words: list[str], cwd: str, env: dict[str, str], limits: dict[str, int]) -> None:
    """Do what an interpreter does with its words."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    sys.path[1:1] = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder not in sys.path]
    sys.argv = words
    if words[0] == "-m":
        sys.path[0], sys.argv = cwd, words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path[0], sys.argv = "", ["-c", *words[2:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)  # noqa: S102
    else:
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    _execute(**_serve(sys.argv[1]))
