"""Files that appear whole or not at all, and what is said when one cannot be written."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cellmill.errors import CellmillError

_USER_CAN_MEND = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it is synced and takes the place of `path` when the block ends.

    Raises
    ------
    CellmillError
        The disk is full or the folder cannot be written to; nothing is left of the temporary file.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def unwritable(path: Path, error: OSError) -> Exception:
    """The one sentence for an error that a user can mend (a full disk, no permission); else the error itself."""
    if error.errno not in _USER_CAN_MEND:
        return error
    return CellmillError(
        f"{path} could not be written ({os.strerror(error.errno)}); free space or mend its permissions and run the "
        "same command again: what is finished is kept"
    )


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
