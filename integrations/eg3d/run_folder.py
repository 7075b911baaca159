"""An output folder of one long run: its settings, a lock, and what it has finished."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from convlora.errors import ConvloraError
from convlora.files import replacing


class RunFolder:
    """Open `path` for a run with these settings, new or to be resumed; a context manager that holds its lock.

    Raises `ConvloraError` if the folder holds something else, a run with other settings (naming them), or if
    another process is working in it.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.settings = json.loads(json.dumps(dict(settings)))
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        record = self.path / "run.json"
        if self.path.exists() and not self.path.is_dir():
            raise ConvloraError(f"{self.path} is a file; choose another output folder")
        if self.path.is_dir() and not record.is_file() and any(self.path.iterdir()):
            raise ConvloraError(f"{self.path} holds other files; choose a new output folder, nothing is overwritten")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        try:
            if record.is_file():
                self._check(record)
            else:
                write_text(record, json.dumps(self.settings, indent=2))
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._lock is not None
        self._lock.close()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to the stage's, which survives interruptions."""
        start = time.monotonic()
        try:
            yield
        finally:
            spent = self.seconds()
            spent[stage] = spent.get(stage, 0.0) + time.monotonic() - start
            write_text(self / "seconds.json", json.dumps(spent))

    def seconds(self) -> dict[str, float]:
        file = self / "seconds.json"
        return dict(json.loads(file.read_text())) if file.is_file() else {}

    def _check(self, record: Path) -> None:
        differing = changes(json.loads(record.read_text()), self.settings)
        if differing:
            raise ConvloraError(
                f"{self.path} holds a run with other settings ({differing}); choose another output folder, "
                "or give the same settings to resume it"
            )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which settings differ, with both values, for people to read; empty if none does."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in keys)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _lock(folder: Path) -> IO[str]:
    # The lock belongs to the open file: it ends with the process, however that ends.
    handle = open(folder / ".lock", "w", encoding="utf-8")
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no flock; two runs in one folder are then the user's to avoid
        pass
    except OSError:
        handle.close()
        raise ConvloraError(f"{folder} is in use by another running process; wait for it or choose another") from None
    return handle
