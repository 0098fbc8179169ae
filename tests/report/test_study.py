"""What is said of a metric: settings, baseline, noise, verdicts, and what is left out of the means."""

import pytest

from sparsejax.cli import USAGE_ERROR, main
from sparsejax.report import read
from sparsejax.report.study import study
from sparsejax.report.summary import describe_notes, summarize, write_bytes, write_flops, write_table
from tests.report.workdirs import settings_of, write_sweep, write_workdir

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


def complain(capsys, *given):
    """The one line on stderr."""
    assert main(["report", *map(str, given)]) == USAGE_ERROR
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def test_settings_are_compared_seed_by_seed(results):
    found = study(results)
    assert (found.metric, found.lower, found.baseline.label, found.best.label) == (
        "eval/bits_per_byte",
        True,
        "full",
        "late",
    )
    assert [one.label for one in found.settings] == ["full", "local | b", "ssm", "late"]
    _, local, ssm, late = found.settings
    assert local.comparison.difference == pytest.approx(0.2)
    assert local.comparison.error == pytest.approx(0.1)
    assert ssm.values == {0: 2.1, 1: 2.0}  # the run that was stopped is in no mean
    assert ssm.comparison.difference == pytest.approx(0.0)
    assert ssm.comparison.pairs == 2
    assert late.comparison.p is None
    assert [found.judge(one.comparison) for one in found.settings] == [
        "baseline",
        "below noise",
        "below noise",
        "too few seeds",
    ]
    # Squares of the deviations: full 0.14 / 3, local 0.62 / 3, ssm 0.005, with 2 + 2 + 1 degrees of freedom.
    assert found.noise == pytest.approx(((0.14 / 3 + 0.62 / 3 + 0.005) / 5) ** 0.5)


def test_another_baseline_and_direction(results):
    found = study(results, metric="eval/bits_per_byte:max", baseline="local | b")
    assert found.baseline.label == found.best.label == "local | b"
    assert found.settings[0].comparison.difference == pytest.approx(-0.2)


def test_better_and_worse_follow_the_direction(tmp_path):
    values = {(label, schedule, seed): value + seed / 10 + seed % 2 / 100 * (label == "b")
              for label, schedule, value in (("a", FULL, 0.5), ("b", LOCAL, 0.7)) for seed in range(3)}  # fmt: skip
    results = read([write_sweep(tmp_path / "sweep", values, metric="eval/accuracy")])
    up, down = study(results), study(results, metric="eval/accuracy:min")
    assert (up.metric, up.lower) == ("eval/accuracy", False)
    assert up.judge(up.settings[1].comparison) == "better"
    assert down.judge(down.settings[1].comparison) == "worse"


def test_keys_put_runs_together(results):
    found = study(results, by=["schedule"])
    assert [one.label for one in found.settings][:2] == ["schedule=2x(full)", "schedule=2x(local)"]
    assert found.baseline.label == "schedule=2x(full)"


def test_means_over_more_than_seeds_are_told(tmp_path):
    for width, value in ((16, 2.0), (32, 3.0)):
        for schedule in (FULL, LOCAL):
            given = [f"model.width={width}", f"model.schedule={schedule}"]
            write_workdir(tmp_path / f"{width}{schedule}", settings_of(*given), value)
    found = study(read([tmp_path]), by=["schedule"])
    assert [one.values for one in found.settings] == [{0: 2.5}, {0: 2.5}]
    assert sum("differ in model.width" in note for note in describe_notes(found)) == 2


def test_the_table_in_markdown(results):
    lines = [line.strip("| ").split(" | ") for line in write_table(study(results)).splitlines()]
    assert lines[0][:7] == [
        "setting",
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


def test_the_summary_says_what_is_left_out_and_how_sure_it_is(results):
    text = summarize(study(results))
    assert "9 finished runs of 4 settings; 1 not finished, left out." in text
    assert "Best: late, 1.900." in text
    assert "nothing can be said of its difference from full, local | b, ssm" in text
    assert "p = 0.30 with 2 seeds; p is not corrected for 2 comparisons" in text
    assert "- ssm, seed 2 (" in text
    assert "unfinished, at step 10" in text
    assert "settings have from 1 to 3 seeds" in text


def test_runs_without_a_value_are_told(tmp_path):
    write_workdir(tmp_path / "good", settings_of(), 2.0)
    write_workdir(tmp_path / "bad", settings_of("train.seed=1"), 2.0)
    (tmp_path / "bad" / "result.json").write_text('{"step": 20, "parameters": 1, "eval/bits_per_byte": null}')
    text = summarize(study(read([tmp_path])))
    assert "1 finished without a value, left out" in text
    assert "seed 1 (bad): finished without a value of eval/bits_per_byte" in text


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
    assert lines[0] == ["setting", "eval/bits_per_byte", "eval/loss"]
    assert lines[3] == ["local \\| b", "2.333 ± 0.186", "1.5000 ± 0.0000"]
    assert lines[5] == ["late", "**1.900**", "1.5000"]
    assert "--out: goes with one --metric" in complain(
        capsys, sweep, "--metric=eval/loss,eval/loss", f"--out={tmp_path / 'out'}"
    )


def test_bad_arguments_are_one_line(sweep, tmp_path, capsys):
    assert "absent: no such folder" in complain(capsys, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds no sweep.json" in complain(capsys, tmp_path / "empty")
    assert "nearest are eval/bits_per_byte" in complain(capsys, sweep, "--metric=eval/bits_per_bite")
    assert "eval/loss:min or eval/loss:max" in complain(capsys, sweep, "--metric=eval/loss:least")
    assert "write train/loss_mean" not in complain(capsys, sweep, "--metric=train/los")
    assert "'local | b'" in complain(capsys, sweep, "--baseline=locl")
    assert "do not differ in a key 'width'; the nearest are model.schedule" in complain(capsys, sweep, "--by=width")
    assert "PLACE" in complain(capsys)
    assert "--config.model.width" in complain(capsys, sweep, "--config.model.width=8")


def test_a_metric_of_unknown_direction_needs_one(tmp_path, capsys):
    workdir = write_workdir(tmp_path / "mine", settings_of(), 2.0, metric="eval/coverage")
    assert "write eval/coverage:max or eval/coverage:min" in complain(capsys, workdir, "--metric=eval/coverage")
    assert main(["report", str(workdir), "--metric=eval/coverage:max"]) == 0
    assert "eval/coverage, higher is better" in capsys.readouterr().out


def test_no_finished_run_is_one_line(tmp_path, capsys):
    assert "no finished run" in complain(capsys, write_workdir(tmp_path / "mine", settings_of()))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"ste\n{"step": 3}\n', "line 2 of 3 is damaged"),
        ("timing.jsonl", "[1]\n", "line 1 of 1 is damaged"),
        ("result.json", "{", "is damaged"),
        ("config.json", "[]", "config.json"),
        ("config.json", '{"model": {}}', "config.json"),
        ("versions.json", "]", "is damaged"),
    ],
)
def test_damaged_workdirs_are_named(tmp_path, capsys, name, content, said):
    workdir = write_workdir(tmp_path / "mine", settings_of(), 2.0)
    (workdir / name).write_text(content)
    line = complain(capsys, workdir)
    assert str(workdir / name) in line
    assert said in line


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
)
def test_damaged_records_are_named(sweep, tmp_path, capsys, name, content):
    assert main(["report", str(sweep), f"--out={tmp_path / 'out'}", "--table"]) == 0
    capsys.readouterr()
    (tmp_path / "out" / name).write_text(content)
    assert name in complain(capsys, tmp_path / "out" / (name if name.startswith("results") else "results.csv"))


def test_a_damaged_sweep_is_named(tmp_path, capsys):
    for content in ("{", "[]", '{"config": "a"}', '{"config": "a", "runs": {"b": {}}}'):
        (tmp_path / "sweep.json").write_text(content)
        assert "sweep.json" in complain(capsys, tmp_path)
