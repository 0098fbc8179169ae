"""A run that is killed or told to stop ends as if nothing had happened: bit for bit."""

import signal

import pytest

from tests.train import runs

STEPS = ("--config.train.steps=60", "--config.checkpoint.every=25", "--config.eval.every=5")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("resume") / "text")


def command(text, workdir):
    return ("train", f"--config={runs.RECIPE}", f"--workdir={workdir}", f"--config.data.files={text}", *STEPS)


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, _, err = runs.finish(runs.start(*command(text, workdir)))
    assert code == 0, err
    return workdir


def test_killed_run_ends_bit_identical(text, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = runs.start(*command(text, workdir))
    runs.wait_for_row(process, workdir, 30)
    process.send_signal(signal.SIGKILL)
    runs.finish(process)
    assert 60 not in runs.saved_steps(workdir)
    code, out, err = runs.finish(runs.start(*command(text, workdir)))
    assert code == 0, err
    assert "resuming" in out or not runs.saved_steps(workdir)
    runs.assert_same_bits(runs.saved_state(workdir, 60), runs.saved_state(uninterrupted, 60))
    for name in ("metrics.jsonl", "metrics.csv"):
        assert (workdir / name).read_bytes() == (uninterrupted / name).read_bytes()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stopped_run_saves_and_says_so(text, uninterrupted, tmp_path, stop):
    workdir = tmp_path / "run"
    process = runs.start(*command(text, workdir))
    runs.wait_for_row(process, workdir, 10)
    process.send_signal(stop)
    code, _, err = runs.finish(process)
    assert code == 75
    assert stop.name in err
    assert err.count("\n") == 1
    [*_, saved] = runs.saved_steps(workdir)
    assert f"at step {saved};" in err
    code, out, err = runs.finish(runs.start(*command(text, workdir)))
    assert code == 0, err
    assert f"at step {saved}" in out
    runs.assert_same_bits(runs.saved_state(workdir, 60), runs.saved_state(uninterrupted, 60))
    assert (workdir / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
