"""States by key in a folder, and the checkpoint among them: what a run goes on with after a crash.

Each state is a file of its own, never written twice: a newer one gets a new name. ``commit`` names
the files that belong together in ``checkpoint.json``, which is replaced in one step, and removes
what nothing refers to any more. Whatever happens between two commits, a process that is killed or
a disk that is full, the last one is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkd_fast._files import read_json_object, replacing, sync
from fedkd_fast.trees import Tree, read_tree, write_tree

MANIFEST = "checkpoint.json"
FORMAT = 5
_FILE = re.compile(r"([a-z0-9-]+)\.([0-9]+)\.safetensors")
_PART = re.compile(r"\.checkpoint\.json\.[0-9]+\.part")  # what `replacing` may leave
_CHUNK = 1 << 20


class Store:
    """States in one folder.

    Args:
        folder: made when something is written. What an earlier process committed there is found
            again, what it left beside is removed.

    Raises:
        ValueError: the checkpoint there is damaged, or of a newer version.
        OSError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {}  # of the last commit
        self._files: dict[str, str] = {}  # the newest of each key
        self._digests: dict[str, str] = {}  # of files that were committed
        self._unread: set[str] = set()  # files of an earlier process, not yet held against digests
        self._generation = 0
        if (folder / MANIFEST).exists():
            self._reopen()
        self._clean()

    def _reopen(self) -> None:
        manifest = read_json_object(self.folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder / MANIFEST} has format {manifest.get('format')!r}, this version "
                f"reads {FORMAT}"
            )
        try:
            self.facts = dict(manifest["facts"])
            for key, (name, digest) in manifest["files"].items():
                match = _FILE.fullmatch(name)
                if match is None or match[1] != key or not (self.folder / name).is_file():
                    raise ValueError(f"{name} is missing")
                self._files[key], self._digests[name] = name, str(digest)
                self._generation = max(self._generation, int(match[2]))
            if manifest["sha256"] != _manifest_digest(self.facts, manifest["files"]):
                raise ValueError("it is not what was written")
        except KeyError as error:
            raise ValueError(f"{self.folder / MANIFEST} is damaged: no {error} in it") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self.folder / MANIFEST} is damaged: {error}") from error
        self._unread = set(self._digests)

    def __contains__(self, key: str) -> bool:
        """Tell whether there is a state."""
        return key in self._files

    def write(self, key: str, state: Tree) -> None:
        """Write a state, which becomes part of the checkpoint at the next commit.

        Args:
            key: small letters, digits and hyphens.
            state: see `trees`.

        Raises:
            OSError: no space, for instance. What was committed is untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._generation += 1
        name = f"{key}.{self._generation}.safetensors"
        try:
            write_tree(self.folder / name, state)
        except BaseException:
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
            raise
        old = self._files.get(key)
        self._files[key] = name
        if old is not None and old not in self._digests:
            (self.folder / old).unlink()

    def read(self, key: str) -> Tree:
        """Return the newest state of a key.

        Raises:
            KeyError: there is none.
            ValueError: the file is not what was committed; names it.
            OSError: it cannot be read.
        """
        name = self._files[key]
        path = self.folder / name
        if name in self._unread:
            if _digest(path) != self._digests[name]:
                raise ValueError(f"{path} is damaged: it is not what {MANIFEST} says")
            self._unread.discard(name)
        return read_tree(path)

    def intact(self) -> str:
        """Say which checkpoint there is."""
        if not self.facts:
            return "there is no checkpoint yet"
        return f"the checkpoint after round {self.facts['counts'][0]} is intact in {self.folder}"

    def commit(self, facts: Mapping[str, Any], clock: Mapping[str, Any] | None = None) -> str:
        """Make the newest states the checkpoint; when this returns, they are on the disk.

        Args:
            facts: plain values that belong to them.
            clock: more of these, that differ between runs that are otherwise equal.

        Returns:
            A SHA-256 of the states and facts: equal for equal runs.

        Raises:
            OSError: no space, for instance. The last checkpoint is untouched.
        """
        digests = {}
        for name in self._files.values():
            if name not in self._digests:
                sync(self.folder / name)
                digests[name] = _digest(self.folder / name)
            else:
                digests[name] = self._digests[name]
        files = {key: (name, digests[name]) for key, name in sorted(self._files.items())}
        everything = {**facts, **(clock or {})}
        digest = _manifest_digest(everything, files)
        manifest = {"format": FORMAT, "facts": everything, "files": files, "sha256": digest}
        text = json.dumps(manifest, allow_nan=False)
        # Where this fails, either checkpoint may be the one on the disk: files of both are kept.
        self._digests |= digests
        with replacing(self.folder / MANIFEST, durable=True) as part:
            part.write_text(text, encoding="utf-8")
        gone = self._digests.keys() - digests.keys()
        self._digests, self.facts = digests, everything
        self._unread &= digests.keys()
        for name in gone:
            with contextlib.suppress(OSError):  # the checkpoint stands; `_clean` gets another go
                (self.folder / name).unlink()
        content = [dict(facts), {key: digest for key, (_, digest) in files.items()}]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _clean(self) -> None:
        """Remove what an earlier process did not commit."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            stray = _FILE.fullmatch(path.name) and path.name not in self._digests
            if stray or _PART.fullmatch(path.name):
                path.unlink()


def _manifest_digest(facts: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """Return what tells whether a manifest is what was written: of the files it has digests."""
    return hashlib.sha256(json.dumps([facts, files], sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
