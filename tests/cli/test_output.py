import subprocess
import sys

PROGRAM = """
import sys
from sparsejax import cli
cli._run = lambda *arguments: print("a line\\n" * 100_000, flush=True)
sys.exit(cli.main(["data", "list"]))
"""


def test_a_reader_that_ends_gets_no_message():
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
