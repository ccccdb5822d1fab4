"""Programs started from a process that has imported everything already: a fork instead of seconds of imports.

``run`` is ``subprocess.run`` of ``python ARGUMENTS``, or of several such processes that form one group, as torchrun
starts them. What is tested about a start itself (the launcher, its signals, a random hash seed) is started for real.

    pytest -- server: imports, then forks a keeper for each request
                keeper: forks the processes, tells how they ended, kills them when nobody listens any more
"""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
GRACE_S = 20  # so long may the others of a group go on after one of them failed
_server: tuple[subprocess.Popen, str] | None = None


def run(arguments: list[str], *, env: dict, cwd: Path | None = None, processes: int = 0, timeout: float = 280):
    """``python ARGUMENTS`` to its end, or ``processes`` of them as ranks of one group.

    Args:
        arguments: a script or ``-m MODULE``, and what follows it.
        env: the whole environment. What is read from it while a package is imported is the server's.
        processes: 0 sets none of a group's variables.
        timeout: in seconds; then everything is killed.
    Returns:
        a CompletedProcess with ``stdout`` and ``stderr`` as text; the exit code is the first that is not 0.
    Raises:
        subprocess.TimeoutExpired: it lasts longer.
    """
    request = {"arguments": [str(a) for a in arguments], "cwd": str(cwd or os.getcwd()), "processes": processes}
    request["env"] = {k: str(v) for k, v in env.items()}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, socket.socket(socket.AF_UNIX) as talk:
        talk.connect(address())
        talk.settimeout(timeout)
        _ask(talk, request, out.fileno(), err.fileno())
        try:
            code = int(talk.recv(64) or b"-9")
        except TimeoutError:
            raise subprocess.TimeoutExpired(arguments, timeout) from None
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(arguments, code, *texts)


def address() -> str:
    """The socket of this test process's own server, which ends with it."""
    global _server
    if _server is None or _server[0].poll() is not None:
        folder = tempfile.mkdtemp(prefix="warm-")
        env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "WANDB_SERVICE"))}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": f"{folder}/hf", "TMPDIR": folder}
        process = subprocess.Popen(
            [sys.executable, __file__, "serve", f"{folder}/s"], env=env, cwd=folder, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert process.stdout.readline() == b"ready\n"
        _server = process, f"{folder}/s"
        atexit.register(_close, process)
    return _server[1]


def python() -> list[str]:
    """What stands for ``python`` in a command of another program: it hands everything on to the server."""
    return [sys.executable, "-S", "-E", __file__, "as", address()]


def settle() -> None:
    """Wait until nothing runs: whoever kills what stands for ``python`` sees the program itself die a bit later."""
    import psutil  # not needed by what stands for python, which has to be quick

    def alive() -> bool:
        children = psutil.Process(_server[0].pid).children() if _server is not None else []
        return any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in children)

    until = time.monotonic() + GRACE_S
    while alive():
        assert time.monotonic() < until, "a program started warm does not end"
        time.sleep(0.01)


def _as(path: str, arguments: list[str]) -> int:
    request = {"arguments": arguments, "cwd": os.getcwd(), "processes": 0, "env": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as talk:
        talk.connect(path)
        _ask(talk, request, 1, 2)
        code = int(talk.recv(64) or b"-9")
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


def _ask(talk: socket.socket, request: dict, out: int, err: int) -> None:
    raw = json.dumps(request).encode()
    socket.send_fds(talk, [len(raw).to_bytes(8, "big")], [out, err])
    talk.sendall(raw)


def _close(server: subprocess.Popen) -> None:
    server.stdin.close()
    server.wait()


# --- the server


def _serve(path: str):
    """Returns in the process of a request only, with what it is to do."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    os.write(1, b"ready\n")
    keepers: list[int] = []
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:  # the test process is gone, or was killed
            shutil.rmtree(Path(path).parent, ignore_errors=True)
            os._exit(0)
        talk, _ = listener.accept()
        keeper = os.fork()
        if keeper == 0:
            listener.close()
            return _keep(talk)
        keepers.append(keeper)
        keepers = [pid for pid in keepers if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        talk.close()


def _keep(talk: socket.socket):
    size, fds, _, _ = socket.recv_fds(talk, 8, 2)
    raw = b""
    while len(raw) < int.from_bytes(size, "big"):
        raw += talk.recv(1 << 20)
    request = json.loads(raw)
    group = _group(request["processes"])
    children = {}
    for more in group:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            talk.close()
            return request, fds, more
        children[os.pidfd_open(pid)] = pid
    failed, until = 0, None
    while children:
        wait = None if until is None else max(0.0, until - time.monotonic())
        ready, _, _ = select.select([talk, *children], [], [], wait)
        if talk in ready or not ready:
            for pid in children.values():
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            if talk in ready:
                os._exit(0)
            until = None
        for fd in [fd for fd in ready if fd in children]:
            code = os.waitstatus_to_exitcode(os.waitpid(children.pop(fd), 0)[1])
            if code and not failed:
                failed, until = code, time.monotonic() + GRACE_S
    talk.sendall(str(failed).encode())
    os._exit(0)


def _group(processes: int) -> list[dict]:
    if processes == 0:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _become(request: dict, fds: list[int], more: dict):
    """This process as a fresh one of that environment; returns what runs the program."""
    import runpy

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, fd in zip((1, 2), fds, strict=True):
        os.dup2(fd, target)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"] | more)
    os.chdir(request["cwd"])
    tempfile.tempdir = None
    if made := sys.modules.get("wandb.sdk.data_types._private"):
        made.MEDIA_TMP.__init__("wandb-media")  # the folder that the import made would go with the first program
    first, *rest = request["arguments"]
    if first == "-m":
        sys.argv = rest
        sys.path[0] = request["cwd"]
        return lambda: runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    sys.argv = [first, *rest]
    sys.path[0] = str(Path(first).parent)
    return lambda: runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "as":
        sys.exit(_as(sys.argv[2], sys.argv[3:]))
    import accelerate  # noqa: F401
    import PIL.Image  # noqa: F401
    import pycocotools.cocoeval  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    import detr_accel.infer
    import detr_accel.train.loop  # noqa: F401

    torch.set_num_threads(1)
    program = _become(*_serve(sys.argv[2]))
    # a fork's pool of threads is made anew by who asks for it first: of two threads at the same time (this one and the
    # first of a backward) the second would get none, and torch ends the process
    torch.set_num_threads(1)
    program()
