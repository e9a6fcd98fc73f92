"""Machines made of Linux namespaces: each with a host name, a network and a hosts file of its own, joined by a cable.

    python -m trtc.tests.runtime.nodes N COMMAND...    # mpirun -n N COMMAND, half of the ranks on each of two nodes

Nothing outlives the processes that hold the namespaces. Needs the rights to make namespaces (root, or CAP_SYS_ADMIN).
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

NAMES = ("trtc-a", "trtc-b")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
PASSED = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS")
"""Environment variables that all ranks get."""
TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname")


class NotPermitted(Exception):
    """This machine does not let us make nodes; the message says what was refused."""


@dataclass(frozen=True)
class Nodes:
    """Two nodes that run. `agent`, `hostfile`: what mpirun needs to start processes on both."""

    holders: tuple[int, ...]
    hostfile: Path
    agent: Path

    def inside(self, index: int, command: Sequence[str]) -> list[str]:
        """`command`, run on one of the nodes."""
        return ["nsenter", "-t", str(self.holders[index]), "-n", "-u", "-m", f"-w{os.getcwd()}", *command]

    def cut(self) -> None:
        """Takes the network from both: what is sent is lost, and nobody is told."""
        _do(*self.inside(0, _words("ip link set eth0 down")))

    def end_all(self) -> None:
        """Kills whatever runs on the nodes: Open MPI waits long for its other half, on a node that it cannot reach."""
        for holder in self.holders:
            for pid in _company(holder):
                os.kill(pid, signal.SIGKILL)

    def mpirun(self, count: int, *command: str) -> list[str]:
        """`count` ranks of `command`, the first of them on the first node."""
        program = str(Path(sys.executable).with_name("mpirun"))
        options = ["--hostfile", str(self.hostfile), "--map-by", "slot", "-n", str(count)]
        remote = ["--prtemca", "plm_ssh_agent", str(self.agent), "--prtemca", "prte_if_include", "eth0"]
        passed = [word for name in PASSED if name in os.environ for word in ("-x", name)]
        return self.inside(0, [program, *remote, *options, *passed, *command])


@contextmanager
def two_nodes(slots: int = 1) -> Iterator[Nodes]:
    """Starts the nodes, for at most `slots` ranks each; they end with the block. Raises NotPermitted."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise NotPermitted(f"not installed: {', '.join(missing)}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trtc-nodes-")))
        holders = [stack.enter_context(_holder(folder / name)) for name in NAMES]
        hosts = folder / "hosts"
        lines = [f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True)]
        hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{name} slots={slots}\n" for name in NAMES))
        nodes = Nodes(tuple(holders), hostfile, _agent(folder, holders))
        first, second = map(str, holders)
        _do("nsenter", "-t", first, "-n", *_words("ip link add eth0 type veth peer name eth0 netns"), second)
        for index, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            for command in (
                f"hostname {name}",
                f"mount --bind {hosts} /etc/hosts",
                f"ip address add {address}/24 dev eth0",
                "ip link set eth0 up",
                "ip link set lo up",
            ):
                _do(*nodes.inside(index, _words(command)))
        yield nodes


@contextmanager
def _holder(ready: Path) -> Iterator[int]:
    """A process that has namespaces of its own and keeps them; its id."""
    script = f"touch {ready}; exec cat"  # until its stdin is closed
    process = subprocess.Popen(
        ["unshare", "--net", "--uts", "--mount", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not ready.exists():
            if process.poll() is not None:
                assert process.stderr is not None
                raise NotPermitted(process.stderr.read().strip())
            time.sleep(0.01)
        yield process.pid
    finally:
        process.communicate()


def _company(holder: int) -> list[int]:
    """The other processes in the network of `holder`."""
    network, found = os.readlink(f"/proc/{holder}/ns/net"), []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and os.readlink(folder / "ns/net") == network:
                found.append(int(folder.name))
        except OSError:  # gone, or not ours to see
            continue
    return [pid for pid in found if pid != holder]


def _agent(folder: Path, holders: Sequence[int]) -> Path:
    """What mpirun calls in the place of ssh: `agent HOST COMMAND...`."""
    cases = "".join(f"{name}) holder={holder};;\n" for name, holder in zip(NAMES, holders, strict=True))
    path = folder / "agent"
    path.write_text(
        f'#!/bin/sh\ncase "$1" in\n{cases}esac\nshift\nexec nsenter -t $holder -n -u -m -- sh -c "$*"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _words(command: str) -> list[str]:
    return command.split()


def _do(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise NotPermitted(f"{' '.join(command)}: {result.stderr.strip()}")


def main(count: int, *command: str) -> int:
    with two_nodes(slots=-(-count // 2)) as nodes:
        return subprocess.run(nodes.mpirun(count, *command)).returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
