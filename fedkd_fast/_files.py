"""Files that appear whole or not at all, and files of others read with care."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(target: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` and rename it to ``target`` on success.

    A reader never sees a half-written file: the rename is atomic because both names lie in the
    same folder. When the body raises (Ctrl-C included) the temporary file is removed and a
    ``target`` that existed before is untouched.

    Args:
        target: the file to write; its folder must exist. A link itself is replaced: in folders that
            come from others it may point to anything.
        durable: return only when the file and its name are on the disk, whatever happens to the
            machine after that.

    Yields:
        The path the body has to write.

    Raises:
        OSError: the folder is missing or not writable; names ``target``.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        if durable:
            sync(part)
        os.replace(part, target)
        if durable:
            sync(target.parent)
    except OSError as error:
        # The reader of the message knows the target, not the temporary name.
        if error.filename == str(part):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Raises:
        OSError: the disk is full or broken; names the path.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def absolute_path(name: str, value: object) -> Path:
    """Return a path that does not depend on where a process is started.

    Raises:
        ValueError: it is not absolute.
    """
    path = Path(str(value))
    with contextlib.suppress(RuntimeError):  # ~ of nobody
        path = path.expanduser()
    if not path.is_absolute():
        raise ValueError(f"{name} must be an absolute path, got {str(value)!r}")
    return path


def read_text(path: Path) -> str:
    """Read a file of UTF-8 text.

    Raises:
        ValueError: it is something else; names file and byte.
        OSError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error


def parse_json(
    text: str, place: str, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Parse JSON from outside.

    Args:
        text: one JSON value.
        place: where it stands, for the message.
        pairs: makes an object of its names and values, and may refuse them with a ValueError.

    Raises:
        ValueError: it is no JSON, or refused; names the place.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise ValueError(f"{place}: not JSON: nested too deeply") from error
    except ValueError as error:
        # Python refuses integers of thousands of digits.
        raise ValueError(f"{place}: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: it holds something else; names the file.
        OSError: it cannot be read.
    """
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def names_folder(value: str) -> bool:
    """Tell whether a value that may be a folder or a name on a hub must be meant as a folder.

    A name on a hub has at most one slash and no folder of this machine before it.
    """
    first, slash, rest = value.partition("/")
    return (
        value.startswith((".", "/", "~"))
        or "/" in rest
        or (bool(slash) and (not rest or Path(first).exists()))
    )


def absolute(path: str) -> str:
    """Return a path, or several joined by commas, as absolute ones; names of others stay."""
    if os.path.exists(path):
        return os.path.abspath(path)
    first, comma, rest = path.partition(",")
    return absolute(first.strip()) + comma + absolute(rest.strip()) if comma else path
