"""One process and two real ones see the same global batches."""

import os
import socket
import subprocess
import sys

from tests.train import runs


def test_two_processes_see_the_batches_of_one(tmp_path):
    files = runs.write_text(tmp_path / "text")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(index, count):
        command = [sys.executable, "-m", "tests.train.share", str(port), str(index), str(count), str(files)]
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def finish(process):
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        *_, line = out.splitlines()
        rows, _, digest = line.rpartition(" ")
        return rows, digest

    one = finish(start(0, 1))
    pair = [start(index, 2) for index in range(2)]
    found = [finish(process) for process in pair]
    assert one[0] == "(0, 1)"
    assert [rows for rows, _ in found] == ["(0, 2)", "(1, 2)"]
    assert {digest for _, digest in found} == {one[1]}
