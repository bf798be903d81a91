"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` and rename it to ``target`` on success.

    A reader never sees a half-written file: the rename is atomic because both names lie in the
    same folder. When the body raises (Ctrl-C included) the temporary file is removed and a
    ``target`` that existed before is untouched.

    Args:
        target: the file to write; its folder must exist.

    Yields:
        The path the body has to write.

    Raises:
        OSError: the folder is missing or not writable; names ``target``.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, target)
    except OSError as error:
        # The reader of the message knows the target, not the temporary name.
        if error.filename == str(part):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
