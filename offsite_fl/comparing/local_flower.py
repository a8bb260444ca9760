"""Flower on this machine for as long as a ``with`` block lasts: a SuperLink of one's own, and runs of apps on it.

Plain ``flwr run`` leaves a detached SuperLink behind for the next run. Scripts and tests use their own instead: own
``FLWR_HOME``, own port, stopped with all its children when the block ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]

from offsite_fl.errors import OffsiteError

BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    # The apps' dependencies are installed already; by default each run would resolve them anew.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Server and clients share the cores: threads that wait in a busy loop take them from those who have work.
    "OMP_WAIT_POLICY": "PASSIVE",
}
# Flower's programs start each other by bare name, so their folder must be on the path.
PATHS = f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class LocalFlower:
    """A running SuperLink: its environment, the name of the connection to it, and its address as host:port."""

    environment: Mapping[str, str]
    connection: str
    address: str

    def run(
        self, app: Path, overrides: Mapping[str, object], stdout: int | None = None, timeout: float | None = None
    ) -> int:
        """``flwr run`` of the app folder, streamed to the terminal; returns the exit code."""
        command = self.command(app, overrides)
        done = subprocess.run(command, env=dict(self.environment), stdout=stdout, check=False, timeout=timeout)
        return done.returncode

    def command(self, app: Path, overrides: Mapping[str, object]) -> list[str]:
        """The ``flwr run`` that :meth:`run` waits for."""
        command = [str(BIN / "flwr"), "run", str(app), self.connection, "--stream"]
        return command + (["--run-config", config_text(overrides)] if overrides else [])


def config_text(values: Mapping[str, object]) -> str:
    """Key-value pairs as ``--run-config`` and ``--node-config`` want them: ``name="north" tune.max-steps=2``."""
    return " ".join(f"{key}={_toml(value)}" for key, value in values.items())


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, (str, Path)) else str(value)


@contextmanager
def local_flower(
    home: Path,
    supernodes: int,
    *,
    cpus_per_client: int = 1,
    gpus_per_client: float = 0.0,
    cpus: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[LocalFlower]:
    """Start a SuperLink with ``supernodes`` simulated nodes; logs go to ``home``/superlink.log.

    ``cpus`` is how many cores all clients together may take (None: every one). ``environment``: see :func:`superlink`.
    """
    options = (
        f"options.num-supernodes = {supernodes}\n"
        f"options.backend.client-resources.num-cpus = {cpus_per_client}\n"
        f"options.backend.client-resources.num-gpus = {gpus_per_client}\n"
    )
    if cpus is not None:
        options += f"options.backend.init-args.num-cpus = {cpus}\n"
    with superlink(home, ["--simulation"], options, environment) as flower:
        yield flower


@contextmanager
def superlink(
    home: Path, arguments: Sequence[str] = (), options: str = "", environment: Mapping[str, str] | None = None
) -> Iterator[LocalFlower]:
    """Start a SuperLink on loopback, without TLS, for SuperNodes of this machine; logs go to ``home``/superlink.log.

    ``arguments`` are more of the program's own, ``options`` more lines for the connection in ``home``/config.toml,
    ``environment`` more variables for it and all that it starts.
    """
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    address, log = f"127.0.0.1:{port}", home / "superlink.log"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n{options}'
    )
    given = dict(environment or {})
    variables = {**os.environ, **QUIET, "PATH": PATHS, "FLWR_HOME": str(home.absolute()), **given}
    command = [str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port), *arguments]
    with background(command, variables, log) as process:
        _wait(f"http://{address}/health", process, log)
        yield LocalFlower(variables, "here", address)


@contextmanager
def background(
    command: Sequence[str], environment: Mapping[str, str], log: Path, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the block lasts, then ended with everything that it started; output goes to ``log``."""
    with log.open("ab") as out:
        # A session of its own, so that one signal reaches the workers that it starts.
        process = subprocess.Popen(command, env=environment, cwd=cwd, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        stop_group(process)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise OffsiteError(f"flower-superlink ended with code {process.returncode}; see {log}")
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise OffsiteError(f"flower-superlink didn't answer within {seconds:.0f} s; see {log}")


def module_path(folder: Path) -> dict[str, str]:
    """The variable by which apps find modules in ``folder``: they are copied elsewhere before they run."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))}


def stop_group(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """End a process that leads its own session, everything in it by group id, and whatever else it had started.

    A SuperLink gives each run a session of its own, so its group alone would leave the run of an interrupted command
    behind, with all that Ray has started for it.
    """
    below = _descendants(process.pid)
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait(patience)
    for left in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.terminate()
    deaf = psutil.wait_procs(below, timeout=patience)[1]
    for left in deaf:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(deaf, timeout=patience)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found
