"""Paths as users write them: `~`, `file://` and the addresses of buckets."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sparsejax.errors import InputError

BUCKETS = ("gs", "s3", "az")  # schemes that the extra `buckets` provides
WRITABLE = (*BUCKETS, "memory")  # schemes of fsspec to which a workdir is written
# An address, also as pathlib.Path leaves it, which joins slashes.
_ADDRESS = re.compile(rf"([A-Za-z][\w+.-]*(?=://)|(?i:file|{'|'.join(WRITABLE)})):(/+)(.*)", re.DOTALL)


def local_path(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """Returns a path of this machine, with the home folder for `~`; `file:///x` is `/x`.

    Args:
      path: A path or an address.
      argument: What the path is, for errors.

    Raises:
      InputError: The path is the address of something else, or of the home folder of an unknown user.
    """
    text = os.fspath(path)
    address = _ADDRESS.match(text)
    if address is None:
        try:
            return Path(text).expanduser()
        except RuntimeError as error:
            raise InputError(argument, f"{text}: {error}") from None
    scheme, slashes, rest = address.groups()
    if scheme.lower() != "file":
        raise InputError(argument, f"{text}: {scheme}:// is not a path of this machine")
    if len(slashes) == 2:
        raise InputError(argument, f"{text}: names a host; write file:///{rest}")
    return Path(f"/{rest}")


def bucket_address(path: str | os.PathLike[str], argument: str = "path") -> str | None:
    """Returns the address of a path in a bucket; None for a path of this machine.

    Raises:
      InputError: The path has another scheme.
    """
    address = _ADDRESS.match(os.fspath(path))
    if address is None or address[1].lower() == "file":
        return None
    scheme = address[1].lower()
    if scheme not in WRITABLE:
        schemes = ", ".join(f"{name}://" for name in BUCKETS)
        raise InputError(argument, f"{path}: {scheme}:// is no file system for workdirs; use a folder, or {schemes}")
    return f"{scheme}://{address[3].rstrip('/')}"


def default_cache() -> Path:
    """Returns ~/.cache/sparsejax, or the folder sparsejax in XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsejax"
