"""A real milvus-lite server in a process of its own, on this machine alone."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


class MilvusServer:
    """Serves what is in `folder`; may be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", "from milvus_lite.cmdline import main; main()", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--data-dir", str(self.folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait(self) -> "MilvusServer":
        """Until it answers; a test that failed may have left it dead."""
        if self._process.poll() is not None:
            self.start()
        while True:
            assert self._process.poll() is None
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return self

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def url(self, collection: str) -> str:
        return f"milvus://127.0.0.1:{self.port}/{collection}"
