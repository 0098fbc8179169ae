"""Groups, baseline, noise, verdicts, and runs that are left out of the means."""

import shutil

import pytest

from sparsejax.cli import USAGE_ERROR, main
from sparsejax.report import read, write
from sparsejax.report.comparison import compare
from sparsejax.report.summary import count_runs, describe_notes, summarize, write_bytes, write_flops, write_table
from tests.messages import check_message
from tests.report.workdirs import settings_of, write_sweep, write_workdir

pytestmark = pytest.mark.quick

FULL, LOCAL, SSM = "2x(full)", "2x(local)", "2x(ssm)"
# Differences from full by seed: local 0.1, 0.1, 0.4; ssm 0.1, -0.1 and nothing.
VALUES = {
    **{("full", FULL, seed): value for seed, value in enumerate([2.0, 2.1, 2.3])},
    **{("local | b", LOCAL, seed): value for seed, value in enumerate([2.1, 2.2, 2.7])},
    **{("ssm", SSM, seed): value for seed, value in enumerate([2.1, 2.0, None])},
    ("late", "full 2x(local)", 0): 1.9,
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep") / "sweep", VALUES)


@pytest.fixture(scope="module")
def results(sweep):
    return read([sweep])


@pytest.fixture(scope="module")
def recorded(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "out"
    write(results, folder)
    return folder


def fail(capsys, *arguments):
    """Returns the single line on stderr."""
    assert main(["report", *map(str, arguments)]) == USAGE_ERROR
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err.strip()


def complain(capsys, *arguments):
    """Compares the single line on stderr with the golden file."""
    check_message(fail(capsys, *arguments))


def test_groups_are_compared_seed_by_seed(results):
    comparison = compare(results)
    assert (comparison.metric, comparison.lower, comparison.baseline.label, comparison.best.label) == (
        "eval/bits_per_byte",
        True,
        "full",
        "late",
    )
    assert [group.label for group in comparison.groups] == ["full", "local | b", "ssm", "late"]
    _, local, ssm, late = comparison.groups
    assert local.difference.mean == pytest.approx(0.2)
    assert local.difference.error == pytest.approx(0.1)
    assert ssm.values == {0: 2.1, 1: 2.0}  # the run that was stopped is in no mean
    assert ssm.difference.mean == pytest.approx(0.0)
    assert ssm.difference.pairs == 2
    assert late.difference.p is None
    assert [comparison.verdict(group.difference) for group in comparison.groups] == [
        "baseline",
        "below noise",
        "below noise",
        "too few seeds",
    ]
    # Squares of the deviations: full 0.14 / 3, local 0.62 / 3, ssm 0.005, with 2 + 2 + 1 degrees of freedom.
    assert comparison.noise == pytest.approx(((0.14 / 3 + 0.62 / 3 + 0.005) / 5) ** 0.5)


def test_another_baseline_and_direction(results):
    comparison = compare(results, metric="eval/bits_per_byte:max", baseline="local | b")
    assert comparison.baseline.label == comparison.best.label == "local | b"
    assert comparison.groups[0].difference.mean == pytest.approx(-0.2)


def test_better_and_worse_follow_the_direction(tmp_path):
    values = {(label, schedule, seed): value + seed / 10 + seed % 2 / 100 * (label == "b")
              for label, schedule, value in (("a", FULL, 0.5), ("b", LOCAL, 0.7)) for seed in range(3)}  # fmt: skip
    results = read([write_sweep(tmp_path / "sweep", values, metric="eval/accuracy")])
    up, down = compare(results), compare(results, metric="eval/accuracy:min")
    assert (up.metric, up.lower) == ("eval/accuracy", False)
    assert up.verdict(up.groups[1].difference) == "better"
    assert down.verdict(down.groups[1].difference) == "worse"


def test_runs_are_grouped_by_keys(results):
    comparison = compare(results, by=["schedule"])
    assert [group.label for group in comparison.groups][:2] == ["schedule=2x(full)", "schedule=2x(local)"]
    assert comparison.baseline.label == "schedule=2x(full)"


def test_means_over_more_than_seeds_are_reported(tmp_path):
    for width, value in ((16, 2.0), (32, 3.0)):
        for schedule in (FULL, LOCAL):
            overrides = {"model.width": width, "model.schedule": schedule}
            write_workdir(tmp_path / f"{width}{schedule}", settings_of(overrides), value)
    comparison = compare(read([tmp_path]), by=["schedule"])
    assert [group.values for group in comparison.groups] == [{0: 2.5}, {0: 2.5}]
    assert sum("differ in model.width" in note for note in describe_notes(comparison)) == 2


def test_the_table_in_markdown(results):
    lines = [line.strip("| ").split(" | ") for line in write_table(compare(results)).splitlines()]
    assert lines[0][:7] == [
        "group",
        "seeds",
        "eval/bits_per_byte (lower is better)",
        "difference from full",
        "seed noise",
        "p",
        "verdict",
    ]
    # scipy.stats.ttest_rel of local and full: t = 2 with two degrees of freedom.
    assert lines[3][:7] == ["local \\| b", "3", "2.333 ± 0.186", "+0.200 ± 0.100", "0.227", "0.184", "below noise"]
    assert lines[4][:7] == ["ssm", "2", "2.050 ± 0.050", "+0.000 ± 0.100", "0.227", "1.000", "below noise"]
    assert lines[5][:7] == ["**late**", "1", "1.900", "-0.100", "0.227", "-", "too few seeds"]


def test_the_summary(results):
    text = summarize(compare(results))
    assert "Best: late, 1.900." in text
    assert "p = 0.30 with 2 seeds" in text
    for line in text.splitlines():
        if line and not line.startswith("| "):
            check_message(line)


def test_runs_without_a_value_are_reported(tmp_path):
    write_workdir(tmp_path / "good", settings_of(), 2.0)
    write_workdir(tmp_path / "bad", settings_of({"train.seed": 1}), 2.0)
    (tmp_path / "bad" / "result.json").write_text('{"step": 20, "parameters": 1, "eval/bits_per_byte": null}')
    comparison = compare(read([tmp_path]))
    assert comparison.without_value["name"].tolist() == ["bad"]
    check_message(count_runs(comparison))
    check_message(describe_notes(comparison)[0])


def test_sizes_in_words():
    assert [write_bytes(n).text for n in (0, 1023, 1024, 5 * 2**30)] == ["0 B", "1.02e+03 B", "1 KiB", "5 GiB"]
    assert [write_flops(n).text for n in (0, 999, 1.5e15)] == ["0", "999", "1.5 P"]
    assert write_bytes(float("nan")).text == "-"


def test_the_verb_prints_the_summary_or_the_table_alone(sweep, capsys):
    assert main(["report", str(sweep)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# eval/bits_per_byte, lower is better\n")
    assert main(["report", str(sweep), "--table"]) == 0
    table = capsys.readouterr().out
    assert table in text
    assert all(line.startswith("| ") for line in table.splitlines())


def test_several_metrics_are_one_table(sweep, tmp_path, capsys):
    assert main(["report", str(sweep), "--metric=eval/bits_per_byte, eval/loss"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["group", "eval/bits_per_byte", "eval/loss"]
    assert lines[3] == ["local \\| b", "2.333 ± 0.186", "1.5000 ± 0.0000"]
    assert lines[5] == ["late", "**1.900**", "1.5000"]
    complain(capsys, sweep, "--metric=eval/loss,eval/loss", f"--out={tmp_path / 'out'}")


def test_invalid_arguments(sweep, tmp_path, capsys):
    complain(capsys, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    complain(capsys, tmp_path / "empty")
    complain(capsys, sweep, "--metric=eval/bits_per_bite")
    complain(capsys, sweep, "--metric=eval/loss:least")
    complain(capsys, sweep, "--metric=train/los")
    complain(capsys, sweep, "--baseline=locl")
    complain(capsys, sweep, "--by=width")
    complain(capsys)
    complain(capsys, sweep, "--config.model.width=8")


def test_a_metric_of_unknown_direction_needs_one(tmp_path, capsys):
    workdir = write_workdir(tmp_path / "mine", settings_of(), 2.0, metric="eval/coverage")
    complain(capsys, workdir, "--metric=eval/coverage")
    assert main(["report", str(workdir), "--metric=eval/coverage:max"]) == 0
    assert "eval/coverage, higher is better" in capsys.readouterr().out


def test_no_finished_run_is_one_line(tmp_path, capsys):
    complain(capsys, write_workdir(tmp_path / "mine", settings_of()))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"ste\n{"step": 3}\n'),
        ("timing.jsonl", "[1]\n"),
        ("result.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"model": {}}'),
        ("versions.json", "]"),
    ],
    ids=["metrics", "timing", "result", "list", "empty_model", "versions"],
)
def test_damaged_workdirs_are_named(tmp_path, capsys, name, content):
    workdir = write_workdir(tmp_path / "mine", settings_of(), 2.0)
    (workdir / name).write_text(content)
    assert str(workdir / name) in fail(capsys, workdir)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.csv", "label,seed\na,1\n"),
        ("results.csv", ""),
        ("results.parquet", "no parquet"),
        ("configs.json", "{"),
        ("configs.json", '{"common": {}, "runs": {}}'),
        ("curves.csv", "run,step,metric,value\na,1,b,much\n"),
        ("curves.csv", "step\n1\n"),
    ],
    ids=["column", "empty_csv", "parquet", "configs", "no_run", "number", "curves"],
)
def test_damaged_records_are_named(recorded, tmp_path, capsys, name, content):
    shutil.copytree(recorded, tmp_path / "out")
    (tmp_path / "out" / name).write_text(content)
    assert name in fail(capsys, tmp_path / "out" / (name if name.startswith("results") else "results.csv"))


def test_a_damaged_sweep_is_named(tmp_path, capsys):
    for content in ("{", "[]", '{"config": "a"}', '{"config": "a", "runs": {"b": {}}}'):
        (tmp_path / "sweep.json").write_text(content)
        assert "sweep.json" in fail(capsys, tmp_path)
