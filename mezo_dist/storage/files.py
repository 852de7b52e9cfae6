"""Files that survive a crash: written whole or not at all, and logs whose last line may be torn.

A run folder may come from anybody. So what is read or written here is a regular file in its place: symbolic links are
not followed, and a named pipe or a device is refused before a byte is read.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
import stat
from pathlib import Path
from typing import TextIO

log = logging.getLogger(__name__)
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
"""Errors of the disk itself, as opposed to errors about the file at a path."""
_BLOCK = 1 << 16


def open_regular(path: Path) -> io.FileIO:
    """Open a file for reading, unbuffered; a pipe or a device, which may never end, is refused. Links are followed:
    this is for files that belong to the user, of a model for example (see `open_in_place`).

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return io.FileIO(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Write ``path`` so that at any moment it has its old content or the new one. On disk when this returns.

    A symbolic link at ``path`` is replaced; the file that it points to stays as it is.

    Raises:
        OSError: the file cannot be written; the old one is still there then.
    """
    part = path.with_name(f".{path.name}.part")
    if os.path.lexists(part):  # left by a process that was killed, or planted
        move_aside(part) if part.is_dir() and not part.is_symlink() else part.unlink()
    handle = open_in_place(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk: a new file is lost with its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_in_place(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file without following a symbolic link or waiting for the other end of a pipe.

    Args:
        path: its last part must not be a symbolic link. Links in the folders above it are followed.
        flags: those of `os.open`.

    Returns:
        The file descriptor.

    Raises:
        OSError: anything else than a regular file lies there, or the file cannot be opened.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a symbolic link, which is not followed", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return handle


def read_in_place(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: it cannot be read, is not a regular file (see `open_in_place`), or is larger.
    """
    with os.fdopen(open_in_place(path), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than the {limit:,} bytes that are read", str(path))
    return content


def open_log(path: Path, *, anew: bool = False) -> TextIO:
    """Open a log of lines beside the trajectory to append to it. The run does not depend on what is there.

    A torn last line is cut. What is not a regular file, or may not be written to, is moved aside.

    Args:
        path: where the log is, or will be.
        anew: start with an empty file.

    Raises:
        OSError: the disk is full or broken, or the folder cannot be written to.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    try:
        if not anew and os.path.lexists(path):
            cut_torn_line(path)
        handle = open_in_place(path, flags | (os.O_TRUNC if anew else 0))
    except OSError as error:
        if error.errno in DISK_FAULTS or not os.path.lexists(path):
            raise
        log.warning("%s cannot be appended to (%s)", path, error.strerror)
        move_aside(path)
        handle = open_in_place(path, flags | os.O_EXCL)
    return os.fdopen(handle, "a", encoding="utf-8")


def move_aside(path: Path) -> Path:
    """Rename what lies at ``path`` (a link itself, not what it points to) to a name that is free, and return that.

    Raises:
        OSError: it cannot be renamed.
    """
    number, aside = 1, path.with_name(f"{path.name}.aside")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.aside-{number}")
    path.rename(aside)
    log.warning("what was at %s is at %s now", path, aside)
    return aside


def cut_torn_line(path: Path) -> None:
    """Remove a last line without its end, so that the file can be appended to.

    Raises:
        OSError: it is not a regular file (see `open_in_place`), or cannot be written to.
    """
    handle = open_in_place(path, os.O_RDWR)
    try:
        size = os.fstat(handle).st_size
        whole = _end_of_last_line(handle, size)
        if whole < size:
            log.warning("%s: cut a torn last line of %d bytes", path, size - whole)
            os.ftruncate(handle, whole)
    finally:
        os.close(handle)


def _end_of_last_line(handle: int, size: int) -> int:
    """Offset after the last newline, 0 without one. Reads from the end, since logs are long and torn lines short."""
    end = size
    while end > 0:
        start = max(0, end - _BLOCK)
        newline = os.pread(handle, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def is_plain_file(path: Path) -> bool:
    """Whether nothing but a regular file has that name: no link, folder, pipe or device. True if nothing has it."""
    return not os.path.lexists(path) or stat.S_ISREG(path.lstat().st_mode)


def is_plain_folder(path: Path) -> bool:
    """Whether nothing but a folder has that name, not even a link to one. True if nothing has it."""
    return not os.path.lexists(path) or stat.S_ISDIR(path.lstat().st_mode)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if there is one; links are not followed."""
    if not os.path.lexists(path):
        return
    if stat.S_ISDIR(path.lstat().st_mode):
        shutil.rmtree(path)
    else:
        path.unlink()
