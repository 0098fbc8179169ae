"""A real Slurm of one machine: arrays, preemption, timeouts, jobs that are cancelled or left running."""

import io
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from sparsejax.signals import INTERRUPTED, Interrupted
from sparsejax.sweep import RunsFailed, SweepError, launch, plan_runs
from sparsejax.sweep.executors import Attempt, Local, Slurm, build_job
from sparsejax.sweep.progress import Progress, read_progress
from sparsejax.workdir import Workdir, read_json
from tests.messages import check_message, rejects
from tests.sweep.commands import Command, wait_for
from tests.train import runs

pytest.importorskip("submitit", reason="needs the extra launch")

START = Path(__file__).parents[2] / "scripts" / "start_slurm.sh"
MISSING = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
SETTINGS = {"cpus": "1", "time": "10"}

pytestmark = [
    pytest.mark.external,
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed: no {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a Slurm can be started by root alone"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Slurm that lives as long as these tests."""
    if subprocess.run(["sinfo"], capture_output=True).returncode == 0:
        pytest.skip("another Slurm is running")
    folder = tmp_path_factory.mktemp("slurm")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    subprocess.run([START, folder], check=True)
    yield folder
    subprocess.run(["scancel", "--me"], check=True)
    subprocess.run([START, folder, "--stop"], check=True)
    del os.environ["SLURM_CONF"]
    os.environ |= {} if before is None else {"SLURM_CONF": before}


def id_of(job):
    """Slurm's id of a run's job, once it is submitted."""
    file = job.files.submission
    return read_json(file)["job"] if file.exists() else None


def exit_code_of(run, folder):
    return Local(folder).exit_code(Attempt(run, build_job(run, folder)))


def state_of(job):
    command = ["squeue", "--noheader", "--array", "--format=%T", f"--jobs={id_of(job)}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def signal_until_heard(job, name):
    """Slurm may not take a signal for a job that has only just begun."""
    wait_for(lambda: subprocess.run(["scancel", f"--signal={name}", id_of(job)], capture_output=True).returncode == 0)


def hasten(job):
    """Slurm lets a requeued job wait for two minutes, and revokes what starts within a second; so neither."""
    wait_for(lambda: state_of(job) == "PENDING")
    subprocess.run(["scontrol", "update", f"JobId={id_of(job)}", "StartTime=now+3seconds"], check=True)


def launch_here(commands, folder, jobs=None, **options):
    console = Console(file=io.StringIO(), width=200)
    error = None
    try:
        launch(commands, folder, Slurm(folder, jobs, SETTINGS), Progress(console, folder, jobs), **options)
    except (RunsFailed, Interrupted) as raised:
        error = raised
    return console.file.getvalue(), error


def test_a_preempted_run_saves_and_goes_on(cluster, tmp_path):
    axes, files = "seed=range(2)", runs.write_text(tmp_path / "text")
    settings = {"train.steps": 300, "data.files": str(files), "model.schedule": "full", "eval.every": 100}
    settings |= {"checkpoint.every": 100}
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    folder = tmp_path / "sweep"
    options = [f"--config={runs.RECIPE}", f"--sweep={axes}", f"--workdir={folder}", "--launcher=slurm"]
    launcher = runs.start("sweep", *options, *overrides, *(f"--slurm.{key}={value}" for key, value in SETTINGS.items()))
    jobs = [
        build_job(run, folder) for run in plan_runs(str(runs.RECIPE), [{"train.seed": i} for i in range(2)], settings)
    ]
    wait_for(lambda: read_progress(Workdir(jobs[0].result.parent)).step > 0)
    signal_until_heard(jobs[0], "USR2")
    hasten(jobs[0])
    code, out, err = runs.finish(launcher)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "2 of 2 runs done"
    log = jobs[0].files.log.read_text()
    assert "stopped by SIGTERM at step " in log
    assert f"resuming {jobs[0].result.parent} at step " in log
    assert [read_progress(Workdir(job.result.parent)).step for job in jobs] == [300, 300]
    assert [len(read_json(Workdir(job.result.parent).versions)) for job in jobs] == [2, 1]


def test_the_launcher_leaves_its_jobs_to_slurm(cluster, tmp_path):
    """It finds them again, and submits a job again that was cancelled in the meantime."""
    slow = f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; DONE"
    commands = [Command("slow", slow), Command("failing", "echo why; exit 4"), Command("cancelled", slow)]
    job, failing, cancelled = (build_job(run, tmp_path) for run in commands)

    def stop_launcher(number, frame):
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGALRM, stop_launcher)
    signal.alarm(3)
    _, error = launch_here(commands, tmp_path)
    assert str(error).startswith("stopped by SIGINT: 0 of 3 runs done, ")
    wait_for(lambda: state_of(cancelled) == "RUNNING")
    ids = id_of(job), id_of(failing), id_of(cancelled)
    subprocess.run(["scancel", ids[2]], check=True)
    wait_for(lambda: state_of(cancelled) == "")
    (tmp_path / "go").touch()
    out, error = launch_here(commands, tmp_path)
    check_message(str(error))
    assert "exit code 4; log: " in out
    assert (id_of(job), id_of(failing)) == ids[:2]
    assert id_of(cancelled) != ids[2]


def test_the_time_limit(cluster, tmp_path):
    """Running jobs are asked to save, queued jobs are cancelled."""
    script = "trap 'exit 75' TERM; while :; do sleep 0.05; done"
    commands = [Command(f"run{i}", script) for i in range(2)]
    _, error = launch_here(commands, tmp_path, jobs=1, max_hours=4 / 3600)
    check_message(str(error))
    assert [exit_code_of(run, tmp_path) for run in commands] == [INTERRUPTED, None]


def test_settings(cluster, tmp_path):
    with rejects(SweepError, "slurm.time"):
        Slurm(tmp_path, None, {"time": "1:00:00"})
    settings = {"time": "90", "cpus": "2", "gpus": "1", "mem": "4GB", "reservation": "mine"}
    expected = ["time=90", "cpus-per-task=2", "gpus-per-node=1", "mem=4GB", "reservation=mine", "job-name=sparsejax"]
    cases = ("custom", settings, expected), ("default", {"partition": "nowhere"}, ["time=60"])
    for name, chosen, options in cases:
        folder = tmp_path / name
        with pytest.raises(SweepError, match="slurm"):  # no such reservation, no such partition
            launch(
                [Command("run", "DONE")],
                folder,
                Slurm(folder, 3, chosen),
                Progress(Console(file=io.StringIO()), folder),
            )
        (script,) = (folder / "jobs" / "slurm").glob("*.sh")
        for option in options:
            assert f"#SBATCH --{option}\n" in script.read_text()
