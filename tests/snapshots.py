"""What a killed process leaves behind: copies of a folder before and after all that changes it.

A process that is killed between two calls of the system leaves the files as these calls left them.
So a copy of the folder at such a moment is what the next process finds, without a kill.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")


class Snapshots:
    """Copies of one folder in another.

    Args:
        folder: what is copied.
        into: a folder for the copies.
        note: asked at each moment for something to keep with the copy.
    """

    def __init__(self, folder: Path, into: Path, note: Callable[[], Any] = lambda: None) -> None:
        self._folder, self._into, self._note = folder, into, note
        self.taken: list[tuple[Path, str, Any]] = []  # the copy, the moment, the note
        self._busy = False

    def take(self, moment: str) -> None:
        """Copy the folder as it is now."""
        if not self._busy:
            self._busy = True
            copy = self._into / str(len(self.taken))
            shutil.copytree(self._folder, copy, symlinks=True)
            self.taken.append((copy, moment, self._note()))
            self._busy = False

    @contextlib.contextmanager
    def taking(self) -> Iterator[None]:
        """Copy before and after each call of the system that changes names or waits for the disk.

        Opening and writing files is not among them: see `half`.
        """
        with contextlib.ExitStack() as patches:
            for name in CALLS:
                patches.enter_context(mock.patch.object(os, name, self._around(name)))
            yield

    def _around(self, name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.take(f"before {name} {arguments[0]}")
            result = real(*arguments, **keywords)
            self.take(f"after {name} {arguments[0]}")
            return result

        return call

    def half(self, write: Callable[..., Any], path: Callable[..., Path]) -> Callable[..., Any]:
        """Copy the folder also when a file is there in part: empty, and with half of its bytes.

        Args:
            write: what writes a file.
            path: which one, given the same arguments.
        """

        def call(*arguments: Any) -> Any:
            result = write(*arguments)
            place, content = path(*arguments), path(*arguments).read_bytes()
            for count in (0, len(content) // 2):
                place.write_bytes(content[:count])
                self.take(f"{count} bytes of {place.name}")
            place.write_bytes(content)
            return result

        return call
