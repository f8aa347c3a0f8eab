"""A PostgreSQL server to throw away: started in a folder of its own, on a free port of loopback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from urllib.parse import quote
from uuid import uuid4

import psycopg

PASSWORD = "not/a secret"
"""What the server's only user, `bitplan`, logs in with: with characters that a URL must quote."""


class PostgresServer:
    """A server that can be stopped and started again; its data stay."""

    def __init__(self, folder: Path, *options: str) -> None:
        """Sets up a server, which is not started yet.

        Args:
            folder: Where its data go: an empty folder.
            options: Settings such as `fsync=off`.
        """
        self.folder, self.options = folder, options
        self.port = _free_port()
        secret = folder / "secret"
        secret.write_text(PASSWORD)
        if os.geteuid() == 0:
            for path in (folder, secret):
                shutil.chown(path, "postgres", "postgres")
        self._do(
            "initdb", "-D", str(folder / "data"), "-U", "bitplan", "-A", "scram-sha-256", "-N", f"--pwfile={secret}"
        )

    def url(self, database: str = "postgres") -> str:
        """Where a database is, without naming a driver."""
        return f"postgresql://bitplan:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/{database}"

    def make_database(self) -> str:
        """Makes an empty database; returns its URL."""
        name = f"database_{uuid4().hex}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def start(self) -> None:
        """Starts the server, and waits until it answers."""
        settings = ("listen_addresses=127.0.0.1", f"unix_socket_directories={self.folder}", *self.options)
        options = " ".join([f"-p {self.port}", *(f"-c {setting}" for setting in settings)])
        log = str(self.folder / "log")
        self._do("pg_ctl", "-D", str(self.folder / "data"), "-w", "-t", "60", "-l", log, "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        """Stops the server: `fast` cuts its connections, `immediate` is a crash."""
        self._do("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", mode, "stop")

    def _do(self, program: str, *arguments: str) -> None:
        command = [str(_binaries() / program), *arguments]
        if os.geteuid() == 0:  # the server refuses to run as root
            command = ["runuser", "-u", "postgres", "--", *command]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=self.folder)
        log = self.folder / "log"
        assert done.returncode == 0, f"{done.stderr}{log.read_text() if log.exists() else ''}"


@contextmanager
def running_postgres(*options: str) -> Iterator[PostgresServer]:
    """A server with these options, in a folder that is gone afterwards."""
    folder = Path(mkdtemp(prefix="postgres-", dir="/tmp"))  # a short path, where any user may go: sockets need both
    try:
        server = PostgresServer(folder, *options)
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _binaries() -> Path:
    """The folder of the newest PostgreSQL installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    assert on_path, "no PostgreSQL here: install it (Debian: apt-get install postgresql)"
    return Path(on_path).parent


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
