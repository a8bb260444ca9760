"""Ending what was started, whatever sessions it began for itself."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest

from offsite_fl.comparing.local_flower import stop_group

# As a SuperLink does: a child in a session of its own, which a signal to the parent's group doesn't reach.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
SLEEPS = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({flag!r}, 'w'); time.sleep(600)"


@pytest.mark.parametrize("deaf", [False, True])
def test_a_child_with_a_session_of_its_own_is_ended_too(tmp_path: Path, deaf: bool) -> None:
    flag = tmp_path / "deaf"
    child = DEAF.format(flag=str(flag)) if deaf else SLEEPS
    command = [sys.executable, "-c", PARENT.format(child=child)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stdout is not None
    below = psutil.Process(int(parent.stdout.readline()))
    try:
        while deaf and not flag.exists():
            time.sleep(0.02)
        stop_group(parent, patience=0.5)
        assert parent.poll() is not None
        assert not below.is_running() or below.status() == psutil.STATUS_ZOMBIE
    finally:
        if below.is_running():
            below.kill()


def test_what_has_ended_already_is_no_error() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    done.wait()
    stop_group(done)
    assert done.returncode == 0
