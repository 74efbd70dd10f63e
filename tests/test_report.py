"""The benchmark report as Markdown and as a page, looked at with a real browser."""

import builtins
import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from bench_reports import MEDIANS, WRONG, assert_as_measured, make_report
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.errors import BenchmarkError, MissingDependencyError
from sjepa_deploy.pages import figures, tables
from sjepa_deploy.runtime.bench import report_plots, report_tables, words
from sjepa_deploy.runtime.bench.cells import CellKey, Estimate, Percentile
from sjepa_deploy.runtime.bench.compare import Change, Comparison
from sjepa_deploy.runtime.bench.decision_age import decision_ages, with_decision_ages
from sjepa_deploy.runtime.bench.files import load_report, write_report
from sjepa_deploy.runtime.bench.report import comparison_to_markdown, summary, to_markdown, warnings, write_comparison, write_html
from sjepa_deploy.runtime.bench.results import Disturbance, Ending, LeftOut, Noise
from sjepa_deploy.spec import ModelSpec

EVIL = """<img src=x onerror="document.title='run'">|`x`*b*</script>&amp;"""


@pytest.fixture(scope="module")
def made():
    return make_report()


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    """Return the path of the page of a report whose bundle has a hostile name."""
    report, samples = make_report(bundles=("prelocal", EVIL), command=f"sjepa-bench 'prelocal' '{EVIL}'", n=1500)
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(report, samples, path)
    return path


def test_the_reports_of_these_tests_are_such_as_are_measured(made):
    assert_as_measured(*made)


# ---------------------------------------------------------------- numbers and tables


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (3, "3"),
        (0.0731, "0.073"),
        (2.13, "2.13"),
        (24.06, "24.1"),
        (350.84, "350.8"),
        (41494.2, "41,494"),
        (1e3, "1,000"),
    ],
)
def test_numbers_have_the_digits_that_people_read(value, text):
    assert tables.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (2.5e-8, "25 ns"), (50e-6, "50 us"), (8.2e-4, "820 us"), (5.1e-3, "5.10 ms"), (0.48, "480 ms"), (612, "612 s")],
)
def test_times_have_the_unit_that_people_read(seconds, text):
    assert tables.duration(seconds) == text


def column(table, name):
    place = [c.name for c in table.columns].index(name)
    return [row.entries[place] for row in table.rows]


@pytest.mark.parametrize("scenario", ["back-to-back", "paced", "streams"])
def test_tables_of_latencies_are_sorted_by_the_median_with_what_is_wrong_at_the_end(made, scenario):
    found = report_tables.cell_tables(made[0], scenario)
    assert [table.caption for table in found] == ["prelocal, microseconds", "contextual, microseconds"]
    for table in found:
        assert table.columns[table.sorted_by].name == "p50"
        right = [entry.sort for entry, row in zip(column(table, "p50"), table.rows, strict=True) if not row.struck]
        known = [value for value in right if value is not None]
        assert known == sorted(known)
        assert right[: len(known)] == known  # those that were not held come after all others
        assert [row.struck for row in table.rows] == sorted(row.struck for row in table.rows)
    struck = {row.entries[0].text for table in found for row in table.rows if row.struck}
    assert struck == {WRONG[1]}


def test_throughput_is_sorted_from_the_most(made):
    for table in report_tables.cell_tables(made[0], "throughput"):
        assert (table.columns[table.sorted_by].name, table.direction) == ("decoded/s", "descending")
        values = [entry.sort for entry, row in zip(column(table, "decoded/s"), table.rows, strict=True) if not row.struck]
        assert values == sorted(values, reverse=True)


def test_a_percentile_without_enough_samples_says_how_many_it_needs(made):
    table = report_tables.cell_tables(made[0], "back-to-back")[0]
    assert {entry.text for entry in column(table, "p99.9")} == {"needs 5,000"}
    assert all(entry.absent for entry in column(table, "p99.9"))
    assert words.percentile(Percentile(percent=99.0, value=Estimate(value=24.14, low=23.9, high=24.31), n_needed=500)) == (
        tables.Entry(text="24.1", small="23.9 to 24.3", sort=24.14)
    )


def test_a_rate_that_was_not_held_is_said_to_be_so_and_has_no_latency(made):
    table = report_tables.cell_tables(made[0], "paced")[1]
    rows = [row for row in table.rows if row.entries[0].text == "braindecode" and row.entries[2].text == "100"]
    assert len(rows) == 2
    for row in rows:
        texts = [entry.text for entry in row.entries]
        assert texts.count("not held") == 1
        assert not [entry for entry in row.entries if re.fullmatch(r"\d{4,}.*", entry.text.replace(",", "")) and not entry.absent]


# ---------------------------------------------------------------- Markdown


def markdown_tables(text):
    """Return the tables of a Markdown text as lists of rows, each a list of cells."""
    blocks = re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().splitlines()] for block in blocks]


def test_markdown_has_every_figure_and_strikes_out_what_is_wrong(made):
    report, _ = made
    text = to_markdown(report)
    read = markdown_tables(text)
    assert len(read) > 10
    assert all(len({len(row) for row in table}) == 1 for table in read)
    assert "    sjepa-bench prelocal contextual --scenario all --out report\n" in text
    assert "- prelocal: **ort-cpu fp32**. Lowest paced p99" in text
    assert re.search(r"\| ~~torch-compile \(fp32\)~~ \| ~~WRONG \(3.1e-01 of 1e-05\)~~ \|", text)
    assert "| ort-cpu (fp32) | passed (2.1e-07 of 1e-05) |" in text
    assert "| braindecode (fp32) | not with offsets (3.1e-01 of 1e-05) |" in text
    assert "| prelocal | braindecode (fp32) | not with offsets | 3.1e-01 | 2.1e-07 | 1e-05 |" in text
    for cell in report.cells:
        if cell.latency is not None:
            assert tables.number(cell.latency.at(50.0).value) in text


def test_markdown_shows_names_as_they_are():
    report, _ = make_report(bundles=("a", EVIL), n=200)
    text = to_markdown(report)
    assert all(len({len(row) for row in table}) == 1 for table in markdown_tables(text))
    assert not re.search(r"(?<!\\)<img", text)
    assert not re.search(r"(?<!\\)[`*]x|[^\\]\*b", text.replace(report.command, ""))


# ---------------------------------------------------------------- warnings


def test_what_a_reader_must_know_first_comes_first(made):
    report, _ = made
    noise = Noise(
        noisy=True, reasons=(Disturbance(kind="others busy", value=1.2),), canary_us=Estimate(value=1.0), canary_spread=0.3
    )
    bundles = (dataclasses.replace(report.bundles[0], weights="random"), report.bundles[1])
    cells = list(report.cells)
    cells[1] = dataclasses.replace(cells[1], latency=dataclasses.replace(cells[1].latency, drifting=True, stable=False))
    report = dataclasses.replace(report, partial=(Ending(kind="interrupted"),), noise=noise, bundles=bundles, cells=tuple(cells))
    label = cells[1].key.label
    assert warnings(report) == (
        "Partial: It was interrupted.",
        "The machine was not quiet: Other processes kept 1.20 cores busy.",
        "Outputs are wrong, and struck out: contextual on torch-compile fp32.",
        "Right on EEG, but not on windows with electrode offsets of millivolts (errors are under Parity): "
        "braindecode fp32 (prelocal).",
        f"Latencies rose or fell over the run: {label}.",
        f"The warm-up did not become stable: {label}.",
        "Random weights, whose predictions mean nothing: prelocal.",
    )
    assert to_markdown(report).index("> Partial: It was interrupted.") < to_markdown(report).index("## ")


# ---------------------------------------------------------------- the ages of decisions of a report


def test_the_decision_age_takes_the_recommended_backend_at_the_slowest_paced_rate(made):
    report, _ = made
    specs = {
        "prelocal": ModelSpec.of(variant="prelocal", n_chans=129, n_times=200, sfreq=100.0),
        "contextual": ModelSpec.of(variant="prelocal", n_chans=129, n_times=152, sfreq=100.0),
    }
    ages = decision_ages(report, specs)
    assert [age.bundle for age in ages] == ["prelocal", "prelocal, --n-times 152", "contextual"]
    cell = report.cell(CellKey(scenario="paced", bundle="prelocal", backend="ort-cpu", precision="fp32", rate=10.0))
    parts = {part.name: part for part in ages[0].parts}
    assert parts["inference"].seconds == pytest.approx(cell.latency.at(99.0).value * 1e-6)
    assert parts["inference"].source == "measured: p99, paced 10/s"
    assert parts["hop"].seconds == 0.1
    assert [part.seconds for part in ages[2].parts if part.name == "model"] == [0]


def test_without_a_paced_run_the_decision_age_takes_the_closed_loop_and_without_a_p99_there_is_none(made):
    report, _ = made
    spec = ModelSpec.of(variant="prelocal", n_chans=129, n_times=152, sfreq=100.0)
    closed = dataclasses.replace(report, cells=tuple(c for c in report.cells if c.key.scenario == "back-to-back"))
    (age, _) = decision_ages(closed, dict.fromkeys(MEDIANS, spec))
    assert age.parts[-1].source == "measured: p99, back to back"
    few, _ = make_report(n=200)
    assert decision_ages(dataclasses.replace(few, cells=few.cells[:2]), dict.fromkeys(MEDIANS, spec)) == ()


# ---------------------------------------------------------------- the page


class Structure(HTMLParser):
    """Collects what a validator would complain about first: identifiers that stand twice, tags that do not close."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self):
        super().__init__()
        self.ids, self.open, self.tags, self.outside = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        self.outside += [v for k, v in attrs.items() if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_small_and_refers_to_nothing(page):
    text = page.read_text()
    structure = Structure()
    structure.feed(text)
    assert structure.open == []
    assert len(structure.ids) == len(set(structure.ids))
    assert structure.outside == []
    assert structure.tags.count("script") == 1
    assert structure.tags.count("svg") > 12
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", text)
    assert len(text) < 1_000_000


def test_the_page_is_the_same_every_time(page, tmp_path):
    report, samples = make_report(n=300)
    report = dataclasses.replace(report, cells=report.cells[:8])
    for name in ("a.html", "b.html"):
        write_html(report, samples, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_every_cell_with_samples_is_drawn_with_what_it_shows_in_words(made):
    report, samples = made
    cells = [c for c in report.cells if c.key.scenario == "back-to-back" and c.key.bundle == "contextual"]
    plot = report_plots.histograms(cells, samples, "A title")
    for cell in cells:
        p50, p99 = np.percentile(samples[f"{cell.id}.latency_us"], (50, 99), method="inverted_cdf") / 1e6
        words = f"{cell.key.backend} fp32: median {tables.duration(p50)}, 99 % within {tables.duration(p99)}, max "
        assert words in plot.description
        assert f"{cell.key.backend} fp32" in plot.svg
    assert "WRONG: torch-compile fp32<" in plot.svg  # without a figure
    assert plot.svg.startswith("<svg ")
    assert not re.search("#f[01][0-9a-f]{2}01", plot.svg)  # every colour is the page's


def test_curves_of_what_took_longer_are_those_of_the_samples():
    values = np.random.default_rng(0).gamma(2, 100, 5000)
    x, share = report_plots._tail(values)
    for at, found in zip(x[:-1], share[:-1], strict=True):
        assert found == pytest.approx((values > at).mean(), abs=1e-12)
    assert 0 < share[-1] < 1 / 5000
    assert x[-1] == values.max()


@pytest.mark.parametrize("draw", [report_plots.histograms, report_plots.exceedance, report_plots.time_series])
def test_without_samples_nothing_is_drawn(made, draw):
    assert draw(made[0].cells, {}, "title") is None


def test_the_latency_curve_tells_the_medians_over_the_batch_of_what_is_right(made):
    own = [cell for cell in made[0].cells if cell.key.bundle == "contextual"]
    plot = report_plots.latency_curve(own, "title")
    for backend, median in MEDIANS["contextual"].items():
        drawn = re.search(rf"(^|; ){backend}: 1: (\S+ \S+), 8: (\S+ \S+), 64: (\S+ \S+?)(;|$)", plot.description)
        assert (drawn is None) == (("contextual", backend) == WRONG)
        assert plot.svg.count(f">{backend}<") == (drawn is not None), "its name stands at its line"
        if drawn is not None:
            found = [float(text.split()[0]) * {"us": 1, "ms": 1e3}[text.split()[1]] for text in drawn.group(2, 3, 4)]
            np.testing.assert_allclose(found, [median * batch**0.4 for batch in (1, 8, 64)], rtol=0.1)
    one_size = [cell for cell in own if cell.key.batch == 1]
    assert report_plots.latency_curve(one_size, "title") is None


def test_there_is_a_latency_curve_for_each_bundle_and_precision_and_one_table(made, tmp_path):
    report, samples = made
    extra = [
        dataclasses.replace(cell, id=f"x{i}", key=dataclasses.replace(cell.key, precision="fp16"))
        for i, cell in enumerate(report.cells)
        if cell.key.scenario == "throughput" and cell.key.bundle == "prelocal"
    ]
    report = dataclasses.replace(report, cells=(*report.cells, *extra))
    write_html(report, samples, tmp_path / "a.html")
    curves = re.findall(r"(\w+ \w+): latency of a call over the batch size</figcaption>", (tmp_path / "a.html").read_text())
    assert curves == ["prelocal fp32", "prelocal fp16", "contextual fp32"]
    table = report_tables.curve_table(report.cells)
    assert [c.name for c in table.columns] == ["bundle", "precision", "backend", "1", "8", "64"]
    assert len(table.rows) == 3 * 4
    for row in table.rows:
        bundle, precision, backend = (entry.text for entry in row.entries[:3])
        cells = {c.key.batch: c for c in report.cells if (c.key.scenario, c.key.bundle) == ("throughput", bundle)
                 and (c.key.backend, c.key.precision) == (backend, precision)}  # fmt: skip
        assert [entry.sort for entry in row.entries[3:]] == [cells[batch].latency.at(50.0).value for batch in (1, 8, 64)]
        assert row.struck == ((bundle, backend) == WRONG)
    assert table.rows[-1].struck
    assert "| prelocal | fp16 | ort-cpu | 2" in to_markdown(report)


@given(st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=8).map(sorted), st.floats(0.01, 0.12))
def test_names_at_lines_stand_apart_in_their_order_and_as_near_as_can_be(wanted, gap):
    places = np.array(figures.apart(wanted, gap))
    assert (np.diff(places) >= gap - 1e-9).all()
    assert places[-1] <= 1 + 1e-9
    steps = np.arange(len(wanted)) * gap
    nearest = isotonic_regression(np.array(wanted) - steps).x + steps
    if nearest[-1] <= 1:
        np.testing.assert_allclose(places, nearest, atol=1e-9)


def test_few_samples_and_equal_samples_are_drawn(made):
    cell = next(c for c in made[0].cells if c.key.scenario == "paced" and not c.struck_out)
    for values in (np.array([5.0]), np.full(100, 7.0)):
        samples = {f"{cell.id}.latency_us": values, f"{cell.id}.at_s": np.arange(len(values)) * 0.1}
        for draw in (report_plots.histograms, report_plots.exceedance, report_plots.time_series):
            assert "<path" in draw([cell], samples, "title").svg


def test_a_section_whose_tables_have_no_rows_is_on_the_page_if_it_has_a_plot(made, monkeypatch, tmp_path):
    """In Markdown, which has no plots, it is left out; and so is one without either."""
    report, samples = made
    cells = tuple(cell for cell in report.cells if cell.key.scenario == "throughput")
    monkeypatch.setattr(report_tables, "cell_tables", lambda *_: ())
    monkeypatch.setattr(report_tables, "curve_table", lambda _: tables.Table(caption="", columns=(), rows=()))
    report = dataclasses.replace(report, cells=cells)
    write_html(report, samples, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert '<section id="throughput"' in page
    assert "prelocal: windows a second over the batch size</figcaption>" in page
    assert '<section id="paced"' not in page
    assert "## Throughput" not in to_markdown(report)


def test_a_report_of_nothing_but_its_environment_is_a_page(tmp_path):
    report, _ = make_report(n=200)
    ended = Ending(kind="time limit", limit=2.0, n=0, of=9)
    empty = dataclasses.replace(
        report, cells=(), parity=(), capacity=(), decision_age=(), recommendations=(), left_out=(), noise=None, partial=(ended,)
    )
    write_html(empty, {}, tmp_path / "a.html")
    assert "Partial: The time limit of 2 s passed after 0 of 9 blocks." in (tmp_path / "a.html").read_text()
    assert to_markdown(empty).count("## ") == 1


def test_a_page_that_cannot_be_written_is_an_error(tmp_path):
    report, _ = make_report(n=200)
    empty = dataclasses.replace(report, cells=(), decision_age=())
    with pytest.raises(BenchmarkError, match=r"cannot be written .* Choose another --out"):
        write_html(empty, {}, tmp_path / "missing" / "a.html")


@pytest.mark.parametrize(("package", "name"), [("matplotlib", "matplotlib"), ("jinja2", "Jinja2")])
def test_a_missing_package_names_the_extra(monkeypatch, made, tmp_path, package, name):
    real = builtins.__import__

    def without(wanted, *args, **kwargs):
        if wanted.partition(".")[0] == package:
            raise ImportError(wanted)
        return real(wanted, *args, **kwargs)

    report = dataclasses.replace(made[0], cells=())
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        MissingDependencyError,
        match=re.escape(f"This needs {name}, which is not installed. Install it with: pip install 'matplotlib>="),
    ):
        write_html(report, {}, tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_markdown_needs_neither_matplotlib_nor_jinja():
    code = (
        "import sys; sys.modules.update(matplotlib=None, jinja2=None, scipy=None, torch=None);"
        "import sjepa_deploy.runtime.bench.report, sjepa_deploy.runtime.bench.decision_age"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- in a browser


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (320, "dark")])
def test_the_page_asks_for_nothing_complains_of_nothing_and_fits(browser, page, width, scheme):
    browser.open(page.as_uri(), width=width, scheme=scheme)
    browser.look()
    assert browser.errors == []
    assert browser.requests == [page.as_uri()]
    folded = "[...document.querySelectorAll('section > details')]"
    assert browser.run(f"return {folded}.length") > 6
    assert not browser.run(f"return {folded}.some(details => details.open)")
    if width == 1280:
        summary = "document.getElementById('summary').getBoundingClientRect()"
        assert browser.run(f"return {summary}.bottom <= innerHeight"), "it is on the first screen"
    browser.run("document.getElementById('unfold').click()")
    assert browser.run(f"return {folded}.every(details => details.open)")
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    shown = "[...document.querySelectorAll('figure')].map(f => [...f.querySelectorAll('svg')].filter(s => s.clientWidth))"
    assert browser.run(f"return {shown}.every(drawn => drawn.length === 1)"), "each plot is shown once"
    sizes = browser.run(f"return {shown}.map(([svg]) => [svg.clientWidth, svg.clientHeight])")
    assert len(sizes) > 12
    if width == 1280:  # two in a row, or one as wide as the section
        inside = browser.run("return document.querySelector('.plots').clientWidth")
        assert {round(w / inside, 1) for w, _ in sizes} == {0.5, 1.0}
    assert all(w > 250 and h > 60 for w, h in sizes)
    smallest = browser.run(
        "const scale = (svg) => svg.clientWidth / svg.viewBox.baseVal.width;"
        "const size = (text) => parseFloat(getComputedStyle(text).fontSize) * scale(text.ownerSVGElement);"
        f"return Math.min(...{shown}.flatMap(([svg]) => [...svg.querySelectorAll('text')]).map(size))"
    )
    assert smallest > 6


def test_a_phone_shows_the_names_and_the_medians_first_and_both_ends_of_a_table(browser, page):
    browser.open(page.as_uri(), width=390, height=800)
    browser.run("document.getElementById('unfold').click()")
    tables = browser.run(
        "return [...document.querySelectorAll('.scroll')].map(s => { const row = s.querySelector('tbody tr');"
        "const box = (e) => { const b = e.getBoundingClientRect(); return [b.left, b.right] };"
        "return [[...s.querySelectorAll('thead th')].map(h => h.textContent.trim()), box(s), [...row.cells].map(box),"
        " s.clientHeight, s.scrollWidth > s.clientWidth] })"
    )
    with_medians = [found for found in tables if "p50" in found[0]]
    assert len(with_medians) > 6
    for names, (left, right), cells, height, _ in with_medians:
        if names[1] == "decoded/s":  # what is sorted by it
            continue
        assert names[1] == "p50"
        assert left <= cells[0][0] < cells[1][1] <= right
        assert height < 800, "its scroll bar is in sight with it"
    assert any(scrolls for *_, scrolls in tables)
    wide = "[...document.querySelectorAll('.scroll')].find(s => s.scrollWidth > s.clientWidth)"
    browser.run(f"window.s = {wide}; s.scrollLeft = 1e4")
    stays = "s.querySelector('tbody th').getBoundingClientRect().left - s.getBoundingClientRect().left"
    assert browser.run(f"return {stays}") < 3, "names stay"


def test_a_link_opens_the_section_that_it_leads_to(browser, page):
    browser.open(f"{page.as_uri()}#paced")
    browser.wait("document.querySelector('#paced details').open")
    assert not browser.run("return document.querySelector('#parity details').open")
    browser.run("document.querySelector('nav a[href=\"#parity\"]').click()")
    browser.wait("document.querySelector('#parity details').open")


def test_the_summary_is_of_the_quickest_that_are_right_beside_the_quickest_pytorch(made):
    report, _ = made
    table = summary(report).tables[0]
    assert table.caption == "Microseconds, paced 10/s"
    for bundle, medians in MEDIANS.items():
        rows = [row for row in table.rows if row.entries[0].small == bundle]
        right = [backend for backend in medians if (bundle, backend) != WRONG]
        assert [row.entries[0].text for row in rows] == [f"{b} fp32" for b in sorted(right, key=medians.get)][: len(rows)]
        by_name = {row.entries[0].text.split()[0]: row for row in rows}
        torch = min((b for b in right if b != "ort-cpu"), key=medians.get)
        expected = by_name[torch].entries[1].sort / by_name["ort-cpu"].entries[1].sort
        assert by_name["ort-cpu"].entries[3].sort == pytest.approx(expected)
    lone = dataclasses.replace(report, cells=tuple(c for c in report.cells if c.key.scenario == "back-to-back"))
    assert summary(lone).tables[0].caption == "Microseconds, back to back"
    assert summary(dataclasses.replace(report, cells=())).tables[0].rows == ()


@pytest.mark.parametrize("width", [1280, 390])
def test_names_at_lines_are_in_the_figure_and_none_upon_another(browser, made, tmp_path, width):
    report, samples = made
    lines = [c for c in report.cells if c.key.scenario == "throughput" and c.key.bundle == "prelocal"]
    longer = [
        dataclasses.replace(cell, id=f"x{i}", key=dataclasses.replace(cell.key, backend=f"{cell.key.backend}-no-fast-path"))
        for i, cell in enumerate(lines)
    ]
    write_html(dataclasses.replace(report, cells=(*lines, *longer)), samples, tmp_path / "a.html")
    browser.open((tmp_path / "a.html").as_uri(), width=width)
    boxes = browser.run(
        "const svg = [...document.querySelectorAll('figure svg')].find(s => s.textContent.includes('latency of a call over'));"
        "const box = (e) => { const b = e.getBoundingClientRect(); return [b.left, b.right, b.top, b.bottom] };"
        "return [box(svg), ...[...svg.querySelectorAll('text')].filter(t => /ort|torch|brain/.test(t.textContent)).map(box)]"
    )
    (left, right, top, bottom), *names = boxes
    assert len(names) == 8
    for i, (x0, x1, y0, y1) in enumerate(names):
        assert left <= x0 < x1 <= right + 1
        assert top - 1 <= y0 < y1 <= bottom
        overlaps = [min(y1, d) - max(y0, c) for a, b, c, d in names[:i] if a < x1 and x0 < b]
        assert all(overlap < 0.3 * (y1 - y0) for overlap in overlaps), "boxes are higher than letters"


def test_hostile_names_are_shown_and_not_run(browser, page):
    browser.open(page.as_uri())
    assert browser.run("return document.title").startswith("sjepa-bench: AMD EPYC")
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert EVIL in browser.text("pre")
    assert EVIL in browser.text("#environment")
    assert EVIL in browser.run("return [...document.querySelectorAll('svg title')].map(t => t.textContent).join()")


TABLE = "const table = [...document.querySelectorAll('table')].find(t => t.caption.textContent === arguments[0]);"


def rows(browser, caption, place):
    """Return of each row whether it is struck out, and what the cell at `place` is sorted by."""
    read = "const cell = r.cells[arguments[1]]; return [r.className === 'struck', cell.dataset.sort ?? cell.textContent.trim()]"
    return browser.driver.execute_script(f"{TABLE} return [...table.tBodies[0].rows].map(r => {{{read}}})", caption, place)


def heads(browser, caption):
    script = f"{TABLE} return [...table.tHead.rows[0].cells].map(c => [c.textContent.trim(), c.ariaSort])"
    return browser.driver.execute_script(script, caption)


def press(browser, caption, place):
    script = f"{TABLE} table.tHead.rows[0].cells[arguments[1]].firstElementChild.click()"
    browser.driver.execute_script(script, caption, place)


def test_tables_are_sorted_say_so_and_can_be_sorted_anew(browser, page):
    browser.open(page.as_uri())
    caption = f"{EVIL}, microseconds"
    names = [name for name, _ in heads(browser, caption)]
    p50 = names.index("p50")
    assert heads(browser, caption)[p50][1] == "ascending"
    right = [float(value) for struck, value in rows(browser, caption, p50) if not struck]
    assert right == sorted(right)
    assert [struck for struck, _ in rows(browser, caption, p50)] == [False, False, False, True]
    press(browser, caption, p50)
    assert heads(browser, caption)[p50][1] == "descending"
    assert [float(value) for struck, value in rows(browser, caption, p50) if not struck] == sorted(right, reverse=True)
    assert rows(browser, caption, 0)[-1][0] is True  # what is wrong stays at the end
    press(browser, caption, 0)
    assert [sort for _, sort in heads(browser, caption)].count(None) == len(names) - 1
    backends = [text.split()[0] for struck, text in rows(browser, caption, 0) if not struck]
    assert backends == ["braindecode", "ort-cpu", "torch-eager"]


def test_what_is_wrong_is_struck_out_in_the_browser(browser, page):
    browser.open(page.as_uri())
    lines = browser.run(
        "return [...document.querySelectorAll('tr.struck')].map(r => [r.cells[0].querySelector('del') !== null, r.textContent])"
    )
    assert len(lines) >= 8
    assert all(WRONG[1] in text for _, text in lines)
    decoration = browser.run("return getComputedStyle(document.querySelector('tr.struck del')).textDecorationLine")
    assert decoration == "line-through"


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    """Return the contrast ratio of two colours (WCAG 2.2)."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


COLOURS = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const [r, g, b, a] = rgb(getComputedStyle(element).backgroundColor);
    if (a === undefined || a === 1) return [r, g, b];
  }
  return [255, 255, 255];
};
const found = [];
for (const element of document.querySelectorAll(arguments[0])) {
  const style = getComputedStyle(element), colour = style[arguments[1]];
  if (colour !== "none") found.push([rgb(colour), behind(element), element.textContent.slice(0, 40)]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("selector", "what", "least"),
    [
        ("p, h1, h2, a, li, code, caption, th button, td span, td del, tbody th span, figcaption", "color", 4.5),
        ("figure svg text", "fill", 4.5),
        ("figure svg path[style*='fill: var(--series']", "fill", 3.0),
        ("figure svg path[style*='stroke: var(--series']", "stroke", 3.0),  # what is paler than its colour has an edge in it
    ],
)
def test_text_and_lines_stand_out_from_what_is_behind_them(browser, page, scheme, selector, what, least):
    """WCAG AA: 4.5 for text, 3 for what a graph is made of."""
    browser.open(page.as_uri(), scheme=scheme)
    found = browser.driver.execute_script(COLOURS, selector, what)
    assert len(found) > 5
    for colour, background, text in found:
        ratio = contrast([c / 255 for c in colour[:3]], [c / 255 for c in background])
        assert ratio >= least, (text, colour, background, ratio)
    dark = luminance([c / 255 for c in found[0][1]]) < 0.2
    assert dark == (scheme == "dark")


def test_plots_have_words_and_tables_have_heads(browser, page):
    browser.open(page.as_uri())
    plots = browser.run(
        "return [...document.querySelectorAll('figure svg')].map(s => [s.getAttribute('role'), "
        "...s.getAttribute('aria-labelledby').split(' ').map(i => document.getElementById(i).textContent)])"
    )
    assert all(role == "img" and title and len(words) > 20 for role, title, words in plots)
    assert browser.run("return [...document.querySelectorAll('table')].every(t => t.caption && t.tHead.rows[0].cells.length > 1)")
    assert browser.run("return [...document.querySelectorAll('thead th')].every(h => h.scope === 'col' && h.textContent.trim())")
    assert browser.run("return [...document.querySelectorAll('tbody tr')].every(r => r.cells[0].scope === 'row')")
    assert browser.run("return document.documentElement.lang") == "en"
    assert browser.run(
        "return [...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')) !== null)"
    )


# ---------------------------------------------------------------- comparisons


def comparison():
    key = CellKey(scenario="back-to-back", bundle="a", backend="ort-cpu", precision="fp32")
    changes = (
        Change(
            key=key, verdict="no change shown", before_us=20.0, after_us=20.1, change=Estimate(value=0.005, low=-0.01, high=0.02)
        ),
        Change(
            key=dataclasses.replace(key, backend="torch-eager"),
            verdict="slower",
            before_us=100.0,
            after_us=110.2,
            change=Estimate(value=0.102, low=0.09, high=0.113),
        ),
        Change(key=dataclasses.replace(key, backend="braindecode"), verdict="not held any more"),
    )
    return Comparison(
        before="a<b>.json",
        after="b.json",
        smallest_claim=0.03,
        machine=Estimate(value=0.004, low=-0.002, high=0.01),
        differs=("onnxruntime 1.31 is 1.32",),
        changes=changes,
        only_before=("paced: x",),
    )


def test_a_comparison_shows_the_worst_first_with_its_interval():
    text = comparison_to_markdown(comparison())
    (table,) = markdown_tables(text)
    assert [[cell.strip() for cell in row[:2]] for row in table[2:]] == [
        ["back-to-back batch 1: a braindecode fp32", "not held any more"],
        ["back-to-back batch 1: a torch-eager fp32", "slower"],
        ["back-to-back batch 1: a ort-cpu fp32", "no change shown"],
    ]
    assert "+10.2 (+9.0 to +11.3)" in text
    assert "> Changes within 3 % are not claimed." in text
    assert "> Different: onnxruntime 1.31 is 1.32" in text
    assert "took +0.4% (-0.2% to +1.0%) longer" in text


def test_the_page_of_a_comparison(browser, tmp_path):
    write_comparison(comparison(), tmp_path / "c")
    assert (tmp_path / "c.md").read_text() == comparison_to_markdown(comparison())
    browser.open((tmp_path / "c.html").as_uri(), width=390)
    browser.look()
    assert (browser.errors, len(browser.requests)) == ([], 1)
    assert browser.text("h1") == "a<b>.json against b.json"
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("return document.querySelectorAll('tbody tr').length") == 3


# ---------------------------------------------------------------- the command


def render(capsys, *arguments):
    status = run_command(_command("bench"), "sjepa-bench", ["--render", *map(str, arguments)])
    return status, capsys.readouterr()


@pytest.fixture
def written(tmp_path, make_bundle):
    """Return the path of a report as a machine without SciPy and matplotlib leaves it, and the bundle that it is of."""
    bundle = make_bundle("prelocal")
    report, samples = make_report(n=600)
    (fact, _) = report.bundles
    left_out = (
        *report.left_out,
        LeftOut(what=("ages of decisions",), reason="This needs SciPy, which is not installed.", kind="ages"),
    )
    report = dataclasses.replace(
        report,
        bundles=(dataclasses.replace(fact, digest=bundle.manifest.digest),),
        cells=tuple(cell for cell in report.cells if cell.key.bundle == "prelocal" and cell.key.scenario == "back-to-back"),
        decision_age=(),
        recommendations=report.recommendations[:1],
        left_out=left_out,
    )
    write_report(report, samples, tmp_path / "bench.json")
    return tmp_path / "bench.json", bundle


def test_pages_are_written_anew_and_with_the_bundle_the_ages_of_decisions(capsys, written):
    path, bundle = written
    status, _ = render(capsys, path)
    assert status == 0
    pages = [path.with_suffix(suffix).read_text() for suffix in (".md", ".html")]
    assert all("ages of decisions" in page and "Age of a decision" not in page for page in pages)
    status, _ = render(capsys, path, bundle.path)
    assert status == 0
    pages = [path.with_suffix(suffix).read_text() for suffix in (".md", ".html")]
    assert all("Age of a decision" in page and "ages of decisions" not in page for page in pages)
    assert [age.bundle for age in load_report(path).decision_age] == ["prelocal", "prelocal, --n-times 152"]


def test_another_bundle_is_refused(capsys, written):
    path, bundle = written
    path.write_text(path.read_text().replace(bundle.manifest.digest, "0" * 64))
    status, said = render(capsys, path, bundle.path)
    assert (status, said.out) == (2, "")
    assert "bench.json also measured other bundles: prelocal. Name all that were measured, or none." in said.err


def test_without_matplotlib_there_are_tables_and_the_command_that_adds_the_page(capsys, monkeypatch, written):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, said = render(capsys, written[0])
    assert status == 0
    assert "No page of plots was written. This needs" in said.out
    assert f"Then: sjepa-bench --render {written[0]}" in said.out
    assert written[0].with_suffix(".md").is_file()
    assert not written[0].with_suffix(".html").exists()


def test_without_scipy_a_report_says_why_it_has_no_ages(monkeypatch, made):
    report = dataclasses.replace(made[0], decision_age=())
    spec = ModelSpec.of(variant="prelocal", n_chans=129, n_times=200, sfreq=100.0)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    without = with_decision_ages(report, dict.fromkeys(MEDIANS, spec))
    assert without.decision_age == ()
    assert without.left_out[-1].kind == "ages"
    assert "SciPy" in without.left_out[-1].reason
    monkeypatch.undo()
    again = with_decision_ages(without, dict.fromkeys(MEDIANS, spec))
    assert len(again.decision_age) == 4
    assert again.left_out == report.left_out
