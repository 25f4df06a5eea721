"""Another rank, as rank 0 sees it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from fiddler_run.ranks.connection import Connection
from fiddler_run.ranks.processes import ending


@dataclass
class Peer:
    """Another rank. `process` is its process if it was started here."""

    rank: int
    connection: Connection
    process: subprocess.Popen | None = None

    def __post_init__(self):
        self.name = f"rank {self.rank} ({self.connection.address})"

    def ending(self) -> str:
        """In words, how it has ended."""
        return "is gone" if self.process is None else ending(self.process)

    def end(self) -> None:
        """Ends it at once, as far as this process can."""
        self.connection.close()
        if self.process is not None:
            self.process.kill()
