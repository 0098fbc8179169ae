"""The page and its figures: equal for equal runs, complete, harmless, and without errors in a real browser."""

import base64
import csv
import itertools
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sparsejax import palette
from sparsejax.report import ReportError, figures, read, report, summary
from sparsejax.report.comparison import compare
from tests.messages import rejects
from tests.report.workdirs import settings_of, write_sweep, write_workdir

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = """<script>document.title = "run"</script>"""
VALUES = {
    **{(EVIL, "2x(full)", seed): value for seed, value in enumerate([2.0, 2.1, 2.3])},
    **{('local "quoted" & $x$', "2x(local)", seed): value for seed, value in enumerate([2.4, 2.2, 2.7])},
    **{("ssm", "2x(ssm)", seed): value for seed, value in enumerate([1.1, 1.0, None])},
}


def write_report(inputs, out, **options):
    report(*inputs, **options).write(out)
    return out


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report([write_sweep(folder / "sweep", VALUES)], folder / "out")


def test_all_files_are_written(out):
    figures_ = [f"{name}{ending}" for name in ("curves", "pareto") for ending in (".png", ".svg")]
    tables = [f"{name}{ending}" for name in ("results", "curves") for ending in (".csv", ".parquet")]
    assert {path.name for path in out.iterdir()} == {*figures_, *tables, "configs.json", "summary.md", "index.html"}


def test_recorded_results_give_the_same_report_byte_for_byte(out, tmp_path):
    for ending in (".csv", ".parquet"):
        again = write_report([out / f"results{ending}"], tmp_path / ending)
        for path in out.iterdir():
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_page_needs_nothing_beside_it(out):
    page = (out / "index.html").read_text()
    addresses = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", page)
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    svg = base64.b64decode(re.search(r'id="curves" src="data:image/svg\+xml;base64,([^"]+)"', page)[1])
    assert svg == (out / "curves.svg").read_bytes()
    ElementTree.fromstring(svg)


def test_the_page_says_everything(out):
    page = (out / "index.html").read_text()
    for text in ("configs/recipe.py", "lower is better", "abc123", "0.10.2", "1 x cpu", "unfinished at step 10"):
        assert text in page
    with (out / "results.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert row["name"] in page
            assert row["digest"] in page
    assert "<code>optimizer.learning_rate</code></td><td><code>0.01</code>" in page
    assert "<code>model.schedule</code>" not in page  # the runs differ there


def test_labels_are_text_and_nothing_else(out):
    page = (out / "index.html").read_text()
    assert EVIL not in page
    assert page.count("<script>") == 1
    assert "&lt;script&gt;" in page


def test_a_notebook_shows_the_table_and_the_figures(tmp_path):
    made = report(write_sweep(tmp_path / "sweep", VALUES))
    html = made._repr_html_()
    assert html == report(tmp_path / "sweep")._repr_html_()
    assert "<script" not in html  # sorting needs a page
    assert "<button" not in html
    root = ElementTree.fromstring(re.sub(r"(<img [^>]*)>", r"\1/>", html))
    rows = [["".join(cell.itertext()) for cell in row] for row in root.find(".//tbody")]
    headings, cells = summary.tabulate(made.comparisons[0], costs=True)
    assert ["".join(cell.itertext()) for cell in root.find(".//thead/tr")] == headings
    assert rows == [[cell.text for cell in row] for row in cells]
    assert "verdict" in headings
    assert [image.get("id") for image in root.iter("img")] == ["curves", "pareto"]
    assert repr(made) == str(made) == summary.summarize(made.comparisons[0]).rstrip()


def test_several_metrics_make_a_table_only(tmp_path):
    made = report(write_sweep(tmp_path / "sweep", VALUES), metric="eval/loss, parameters:min")
    assert str(made).startswith("| label | eval/loss | parameters |")
    assert made._repr_html_().count('class="sparsejax-report"') == 2
    with rejects(ReportError, "out"):
        made.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _heat(tmp_path):
    for width in (16, 8, 128):
        for schedule in ("2x(full)", "2x(local)"):
            overrides = {"model.width": width, "model.schedule": schedule}
            write_workdir(tmp_path / f"{width}{schedule}", settings_of(overrides), 2.0 + width / 100)
    return read([tmp_path])


def test_two_keys_make_a_heat_map(tmp_path):
    results = _heat(tmp_path)
    for by in ((), ("width", "schedule")):
        (drawn,) = [drawn for drawn in figures.draw(compare(results, by=by)) if drawn.name == "heat_map"]
        across, down = ("schedule", "width") if by else ("width", "schedule")
        axis = drawn.figure.axes[0]
        assert (axis.get_xlabel(), axis.get_ylabel()) == (across, down)
        ticks = [tick.get_text() for tick in (axis.get_xticklabels() if across == "width" else axis.get_yticklabels())]
        assert ticks == ["8", "16", "128"]  # by size, not as texts
        assert len(axis.texts) == 6
    assert [drawn.name for drawn in figures.draw(compare(results, by=["width"]))] == ["curves", "pareto"]


def test_curves_are_means_with_errors(out):
    comparison = compare(read([out]))
    (drawn,) = [drawn for drawn in figures.draw(comparison) if drawn.name == "curves"]
    axis = drawn.figure.axes[0]
    assert [list(line.get_xdata()) for line in axis.lines] == [[5, 10, 15, 20]] * 3
    for line, group in zip(axis.lines, comparison.groups, strict=True):
        assert line.get_ydata()[-1] == pytest.approx(group.estimate.mean)
    low, high = axis.collections[0].get_paths()[0].get_extents().intervaly
    error = comparison.groups[0].estimate.error
    assert high - low == pytest.approx(1.5 + 2 * error)  # the curve falls by 1.5


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A comparison of more groups than fit in a panel."""
    values = {(f"group {n}", f"{n}x(full)", seed): 2.0 + n / 10 + seed / 100 for n in range(1, 12) for seed in range(3)}
    return compare(read([write_sweep(tmp_path_factory.mktemp("many") / "sweep", values)]), baseline="group 3")


def test_many_groups_have_a_panel_each(many):
    drawn = {drawn.name: drawn.figure for drawn in figures.draw(many)}
    for name in ("curves", "training"):
        axes = [axis for axis in drawn[name].axes if axis.get_visible()]
        assert [axis.get_title(loc="left").replace(" (baseline)", "") for axis in axes] == [
            group.label for group in many.groups
        ]
        baseline = axes[2].lines[0].get_ydata()
        for axis, group in zip(axes, many.groups, strict=True):
            grey = [line for line in axis.lines if line.get_color() == palette.BASELINE_GREY]
            assert len(axis.lines) - len(grey) == 1
            assert [list(line.get_ydata()) for line in grey] == [list(baseline)] * (group is not many.baseline)
        assert not overlaps(drawn[name])


def overlaps(figure):
    """Pairs of texts outside of the panels, and of panels, that share pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [axis.get_window_extent(renderer) for axis in figure.axes if axis.get_visible()]
    boxes += [axis._left_title.get_window_extent(renderer) for axis in figure.axes if axis.get_visible()]
    boxes += [text.get_window_extent(renderer) for text in (figure._supxlabel, figure._supylabel)]
    return [(a, b) for a, b in itertools.combinations(boxes, 2) if a.shrunk(0.98, 0.9).overlaps(b.shrunk(0.98, 0.9))]


def test_few_groups_share_a_panel_and_a_legend(out):
    comparison = compare(read([out]))
    (drawn,) = [drawn for drawn in figures.draw(comparison) if drawn.name == "curves"]
    (legend,) = drawn.figure.legends
    labels = [" ".join(text.get_text().split()) for text in legend.get_texts()]
    assert labels == [group.label for group in comparison.groups]
    styles = [(style["color"], style["linestyle"], style["marker"]) for _, style in figures._styles(comparison)]
    assert len(set(styles)) == len(comparison.groups)


def test_ticks_are_evaluations(out, many):
    for comparison in (compare(read([out])), many):
        curves = comparison.results.curves
        steps = set(curves[curves["metric"] == comparison.metric]["step"])
        for drawn in figures.draw(comparison):
            if drawn.name in ("curves", "training"):
                ticks = [set(axis.get_xticks()) for axis in drawn.figure.axes]
                assert all(tick <= steps and max(steps) in tick for tick in ticks)


def test_the_training_loss_has_the_unit_of_the_metric(out):
    comparison = compare(read([out]))
    (drawn,) = [drawn for drawn in figures.draw(comparison) if drawn.name == "curves"]
    evaluation, training = drawn.figure.axes
    assert evaluation.get_ylabel() == "validation bits per byte"
    assert training.get_ylabel() == "training loss (bits per byte)"
    runs, curves = comparison.results.runs, comparison.results.curves
    group = comparison.groups[0]
    expected = []
    for _, run in runs[runs["run"].isin(group.runs["run"])].iterrows():
        points = curves[(curves["run"] == run["run"]) & (curves["metric"] == "train/loss_mean")]
        expected.append(points["value"].to_numpy() * run["eval/bits_per_byte"] / run["eval/loss"])
    assert list(training.lines[0].get_ydata()) == pytest.approx(list(np.mean(expected, axis=0)))
    nats = compare(read([out]), metric="eval/loss")
    (drawn,) = [drawn for drawn in figures.draw(nats) if drawn.name == "curves"]
    assert [axis.get_ylabel() for axis in drawn.figure.axes] == [
        "validation loss (nats per token)",
        "training loss (nats per token)",
    ]


def browse(page, *options):
    """Opens a page in a headless browser; returns its DOM and the lines of the console."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options, "--dump-dom"]
    process = subprocess.run([BROWSER, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return process.stdout, [line for line in process.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.external
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
def test_a_browser_shows_it_and_says_nothing(out, tmp_path):
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    dom, console = browse(out / "index.html", profile)
    assert console == []
    assert (
        "<title>validation bits per byte by label: configs/recipe.py</title>" in dom
    )  # the label's script did not run
    # The same means show an error on the console, broken images and clicks on headings.
    page = tmp_path / "index.html"
    page.write_text(
        (out / "index.html").read_text()
        + """<script>
        const column = [...document.querySelectorAll(".sortable button")].slice(0, 3).pop();
        const body = document.querySelector(".sortable").tBodies[0];
        const order = () => [...body.rows].map((row) => row.cells[2].textContent);
        column.click(); const up = order(); column.click(); const down = order();
        addEventListener("load", () => {
          const broken = [...document.images].filter((image) => !image.naturalWidth).length;
          console.error(`seen ${document.images.length} ${broken} | ${up} | ${down}`);
        });
        </script>"""
    )
    _, (line,) = browse(page, profile)
    up = re.search(r"seen 2 0 \| (.*?) \| (.*?)[\"']?,? source|seen 2 0 \| (.*) \| (.*)\"", line)
    assert up, line
    first, second = (group for group in up.groups() if group is not None)
    means = [float(text.split()[0]) for text in first.split(",")]
    assert means == sorted(means)
    assert [float(text.split()[0]) for text in second.split(",")] == means[::-1]
