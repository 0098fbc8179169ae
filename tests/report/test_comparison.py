"""Groups, baseline, noise, verdicts, and runs that are left out of the means."""

import json
import shutil

import pandas as pd
import pytest
from scipy import stats

from sparsejax.cli import USAGE_ERROR, main
from sparsejax.report import read, report, write
from sparsejax.report.comparison import compare
from sparsejax.report.summary import (
    count_runs,
    describe_findings,
    describe_notes,
    summarize,
    write_bytes,
    write_flops,
    write_table,
)
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
    # Between two groups with the same seeds the fit is the mean of the differences by seed.
    assert local.difference.mean == pytest.approx(0.2)
    # Nine values less four groups and two further seeds.
    assert comparison.noise.degrees == 3
    assert local.difference.error == pytest.approx(comparison.noise.deviation * (2 / 3) ** 0.5)
    assert local.difference.p == pytest.approx(2 * stats.t.sf(0.2 / local.difference.error, 3))
    assert ssm.values == {0: 2.1, 1: 2.0}  # the run that was stopped is in no mean
    assert ssm.difference.mean == pytest.approx(0.0)
    assert (ssm.difference.seeds, ssm.difference.p, late.difference.p) == (2, None, None)
    assert [comparison.verdict(group) for group in comparison.groups] == [
        "baseline",
        "not significant",
        "needs 3 seeds",
        "needs 3 seeds",
    ]


def test_another_baseline_and_direction(results):
    comparison = compare(results, metric="eval/bits_per_byte:max", baseline="local | b")
    assert comparison.baseline.label == comparison.best.label == "local | b"
    assert comparison.groups[0].difference.mean == pytest.approx(-0.2)


def _spread(**levels):
    """Values of groups by label, schedule and seed, at equal noise."""
    noise = {0: 0.02, 1: -0.01, 2: -0.01}
    return {
        (label, f"{n}x(full)", seed): level + seed / 10 + noise[(seed + n) % 3]
        for n, (label, level) in enumerate(levels.items(), 1)
        for seed in range(3)
    }


def test_better_and_worse_follow_the_direction(tmp_path):
    results = read([write_sweep(tmp_path / "sweep", _spread(a=0.5, b=0.7), metric="eval/accuracy")])
    up, down = compare(results), compare(results, metric="eval/accuracy:min")
    assert (up.metric, up.lower) == ("eval/accuracy", False)
    assert up.verdict(up.groups[1]) == "better"
    assert down.verdict(down.groups[1]) == "worse"


def test_larger_effects_never_have_weaker_verdicts(tmp_path):
    values = _spread(a=3.0, b=2.97, c=2.9, d=2.76, e=2.55, f=3.3)
    comparison = compare(read([write_sweep(tmp_path / "sweep", values)]))
    verdicts = [comparison.verdict(group) for group in comparison.groups]
    assert verdicts == ["baseline", "not significant", "better", "better", "better", "worse"]


def test_two_seeds_have_no_verdict(tmp_path):
    values = {key: value for key, value in _spread(a=3.0, b=2.0, c=2.5).items() if key[2] < 2}
    comparison = compare(read([write_sweep(tmp_path / "sweep", values)]))
    assert [comparison.verdict(group) for group in comparison.groups[1:]] == ["needs 3 seeds"] * 2
    assert "p" in summarize(comparison)
    check_message(describe_findings(comparison)[1])


def test_diverged_runs_are_in_no_mean(tmp_path):
    folder = write_sweep(tmp_path / "sweep", _spread(a=3.0, b=2.0, c=2.5, d=2.2))
    seeds = {
        (run["label"], run["seed"]): folder / "runs" / name
        for name, run in json.loads((folder / "sweep.json").read_text())["runs"].items()
    }
    # Older runs end with a result without a loss; the others write no result.
    for key in (("b", 2), ("d", 0)):
        (seeds[key] / "result.json").write_text('{"step": 20, "parameters": 1, "eval/loss": null}')
    for key in (("d", 1), ("d", 2)):
        (seeds[key] / "result.json").unlink()
        with (seeds[key] / "metrics.jsonl").open("a") as log:
            log.write('{"step": 25, "train/loss": 2.0, "eval/loss": null, "eval/bits_per_byte": null}\n')
    comparison = compare(read([folder]))
    assert comparison.results.runs["status"].value_counts().to_dict() == {"finished": 8, "diverged": 4}
    a, b, c = comparison.groups
    assert [comparison.verdict(group) for group in (a, b, c)] == ["baseline", "1 diverged", "better"]
    assert set(b.values) == {0, 1}
    assert comparison.lost == {"d": 3}
    lines = [line.strip("| ").split(" | ") for line in write_table(comparison).splitlines()]
    assert lines[5][:6] == ["d", "0", "-", "-", "-", "3 diverged"]
    check_message(count_runs(comparison))
    write(comparison.results, tmp_path / "out")
    assert write_table(compare(read([tmp_path / "out"]))) == write_table(comparison)


def test_unequal_costs_are_marked(tmp_path):
    for width, value in ((16, 2.0), (32, 3.0)):
        for seed in range(3):
            overrides = {"model.width": width, "train.seed": seed}
            write_workdir(tmp_path / f"{width} {seed}", settings_of(overrides), value + seed / 10)
    comparison = compare(read([tmp_path]))
    small, large = comparison.groups
    for cost in ("parameters", "training_flops"):
        assert comparison.excess(small, cost) is None
        assert comparison.excess(large, cost) == pytest.approx(large.mean(cost) / small.mean(cost) - 1)
    text = write_table(comparison)
    percent = 100 * comparison.excess(large, "parameters")
    assert f"{large.mean('parameters'):,.0f} ({percent:+.0f} %)†" in text
    check_message(text.splitlines()[-1])
    (equal,) = [compare(read([tmp_path / f"16 {seed}" for seed in range(3)]))]
    assert "†" not in write_table(equal)


def test_unequal_noise_is_marked(tmp_path):
    values = _spread(a=3.0, b=2.9, c=2.8, d=2.7) | {("e", "8x(full)", seed): 2.0 + 3 * seed for seed in range(3)}
    comparison = compare(read([write_sweep(tmp_path / "sweep", values)]))
    assert [group.difference.pooled for group in comparison.groups[1:]] == [True, True, True, False]
    table, note = write_table(comparison).split("\n\n")[0], write_table(comparison).splitlines()[-1]
    assert ["‡" in line for line in table.splitlines()[2:]] == [False, False, False, False, True]
    check_message(note)


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
        "label",
        "seeds",
        "eval/bits_per_byte (lower is better)",
        "difference from full",
        "p",
        "verdict",
        "parameters",
    ]
    difference = compare(results).groups[1].difference
    expected = [f"{0.2:+.3f} ± {difference.error:.3f}", f"{difference.p:.3f}", "not significant"]
    assert lines[3][:6] == ["local \\| b", "3", "2.333 ± 0.186", *expected]
    assert lines[4][:6] == ["ssm", "2", "2.050 ± 0.050", "+0.000", "-", "needs 3 seeds"]
    assert lines[5][:6] == ["**late**", "1", "1.900", "-0.100", "-", "needs 3 seeds"]


def test_the_summary(results):
    text = summarize(compare(results))
    assert "Best: late, 1.900." in text
    assert "3 degrees of freedom" in text
    for line in text.splitlines():
        if line and not line.startswith("| "):
            check_message(line)


def test_runs_without_a_value_are_reported(tmp_path):
    write_workdir(tmp_path / "good", settings_of(), 2.0)
    write_workdir(tmp_path / "bad", settings_of({"train.seed": 1}), 2.0)
    (tmp_path / "bad" / "result.json").write_text(
        '{"step": 20, "parameters": 1, "eval/loss": 1.0, "eval/bits_per_byte": null}'
    )
    comparison = compare(read([tmp_path]), metric="eval/bits_per_byte")
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
    assert all(line.startswith(("| ", "†")) for line in table.splitlines() if line)


def test_several_metrics_are_one_table(sweep, tmp_path, capsys):
    assert main(["report", str(sweep), "--metric=eval/bits_per_byte, eval/loss"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["label", "eval/bits_per_byte", "eval/loss"]
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
        ("certificate.json", '[{"passed": 1}]'),
    ],
    ids=["metrics", "timing", "result", "list", "empty_model", "versions", "certificate"],
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


def test_text_that_a_tokenizer_loses_is_noted(tmp_path):
    folder = write_sweep(tmp_path / "sweep", VALUES)
    for path in sorted(folder.glob("runs/*/result.json"))[:1]:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eval/restored": 0.8}))
    notes = describe_notes(compare(read([folder])))
    assert sum("gives back 80.00% of the text" in note for note in notes) == 1


def test_the_verdict_of_the_check_is_beside_each_run(tmp_path):
    folder = write_sweep(tmp_path / "sweep", VALUES)
    first, second, third, *_ = sorted(path.parent for path in folder.glob("runs/*/result.json"))
    (first / "certificate.json").unlink()
    (second / "certificate.json").write_text('[{"passed": true}, {"passed": false}]')
    settings = json.loads((third / "config.json").read_text())
    settings["model"]["allow_leaks"] = True
    (third / "config.json").write_text(json.dumps(settings))
    results = read([folder])
    verdicts = dict(zip(results.runs["name"], results.runs["check"], strict=True))
    names = [path.name for path in (first, second, third)]
    assert [verdicts.pop(name) for name in names] == ["not checked", "failed", "reads the future"]
    assert set(verdicts.values()) <= {"passed", ""}
    result = report(folder)
    assert "1 run without a check of the model" in str(result)
    assert "1 run whose model failed the check" in str(result)
    label = results.runs.set_index("name")["label"][third.name]
    assert f"{label} (reads the future)" in result.table.replace("\\|", "|")
    result.write(tmp_path / "out")
    assert f"{label} (reads the future)" in (tmp_path / "out" / "index.html").read_text()


def test_tables_from_before_the_check_have_no_verdict(tmp_path):
    folder = write_sweep(tmp_path / "sweep", VALUES)
    report(folder).write(tmp_path / "out")
    (tmp_path / "out" / "results.parquet").unlink()
    table = pd.read_csv(tmp_path / "out" / "results.csv", dtype=str, keep_default_na=False)
    table.drop(columns="check").to_csv(tmp_path / "out" / "results.csv", index=False)
    results = read([tmp_path / "out"])
    assert set(results.runs["check"]) == {""}
    assert not any("check" in note for note in describe_notes(compare(results)))
    configs_file = tmp_path / "out" / "configs.json"
    recorded = json.loads(configs_file.read_text())
    recorded["common"]["model.allow_leaks"] = True
    configs_file.write_text(json.dumps(recorded))
    assert set(read([tmp_path / "out"]).runs["check"]) == {"reads the future"}
