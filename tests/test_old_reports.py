"""Benchmark reports of earlier releases are read, compared, merged and rendered as they were.

``compat/report-of-4af6286`` was written at that commit: two merged runs in two Pythons, the second of which was interrupted. One
backend in it is wrong, one loses electrode offsets, and two could not run there. It has schema version 1, as the reports in
``benchmarks/results`` have.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from bench_reports import make_report

from sjepa_deploy.errors import BenchmarkError
from sjepa_deploy.pages.tables import number
from sjepa_deploy.runtime.bench.compare import compare, recommend
from sjepa_deploy.runtime.bench.files import load_report, load_samples, write_report
from sjepa_deploy.runtime.bench.merge import merge, renamed
from sjepa_deploy.runtime.bench.report import to_markdown, warnings, write_html

OLD = Path(__file__).parent / "compat" / "report-of-4af6286.json"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PUBLISHED = [path for path in sorted(RESULTS.glob("*.json")) if '"schema_version"' in path.read_text()]


@pytest.fixture
def old():
    report = load_report(OLD)
    return report, load_samples(report, OLD)


def test_its_figures_are_those_of_its_samples(old):
    report, samples = old
    checked = 0
    for cell in report.cells:
        values = samples[f"{cell.id}.latency_us"].astype(np.float64)
        for found in () if cell.latency is None else cell.latency.percentiles:
            if found.value is not None:
                expected = np.quantile(values, found.percent / 100, method="inverted_cdf")
                assert found.value.value == pytest.approx(expected, rel=1e-6)
                checked += 1
    assert checked > 10


def test_its_sentences_are_told_as_they_were(old):
    """The file itself is the oracle: what it says of the run, and what was left out, stands in the pages."""
    report, _ = old
    said = json.loads(OLD.read_text())
    told = " ".join(warnings(report))
    assert said["partial"] == "Run 2: It was interrupted."
    assert f"Partial: {said['partial']}" in told
    assert len(said["noise"]["reasons"]) == 2
    assert all(reason in told for reason in said["noise"]["reasons"])
    text = re.sub(r"\\(.)", r"\1", to_markdown(report))
    for entry in said["left_out"]:
        assert f"| {entry['what']} | {entry['reason']} |" in text
    for name, version in said["environment"]["versions"].items():
        assert f"{name} {version}" in text
    assert f"| Python | {said['environment']['python']} |" in text
    for choice in said["recommendations"]:
        assert choice["why"] in text
    for cell in report.cells:
        if cell.latency is not None and cell.latency.at(50.0) is not None:
            assert number(cell.latency.at(50.0).value) in text


def test_what_its_text_held_is_known_as_data(old):
    report, _ = old
    assert report.interrupted
    assert report.environment.python == ("3.11.7", "3.13.1")
    assert report.environment.versions["torch"] == ("2.13.0+cpu", "2.13.0+cu130")
    assert report.environment.versions["onnxruntime"] == ("1.32.0",)
    assert [entry.what for entry in report.left_out] == [("tensorrt",), ("tensorrt-rtx",)]


def test_it_recommends_the_same_again(old):
    report, _ = old
    assert recommend(report) == report.recommendations


def test_it_is_written_in_the_form_of_today_without_a_loss(old, tmp_path):
    report, samples = old
    written = write_report(report, samples, tmp_path / "new.json")
    again = load_report(tmp_path / "new.json")
    assert again == written
    assert to_markdown(again) == to_markdown(written)
    assert warnings(again) == warnings(report)


def test_it_is_compared_with_a_report_of_today(old, tmp_path):
    report, samples = old
    same = write_report(report, samples, tmp_path / "new.json")
    comparison = compare((report, samples), (same, load_samples(same, tmp_path / "new.json")))
    assert len(comparison.changes) >= 4
    assert {change.verdict for change in comparison.changes} <= {"no change shown", "too few blocks"}
    assert (comparison.only_before, comparison.only_after) == ((), ())
    assert all("noisy" in text or "partial" in text for text in comparison.differs)
    slower = {name: values * 2 if name.endswith("latency_us") else values for name, values in samples.items()}
    medians = [change.change.value for change in compare(old, (report, slower)).changes if change.change is not None]
    np.testing.assert_allclose(medians, 1.0, rtol=1e-6)


def test_it_is_merged_with_a_report_of_today(old):
    report, samples = old
    new, new_samples = make_report(n=200)
    new = renamed(new, {name: f"{name} today" for name in ("ort-cpu", "torch-eager")})
    new = dataclasses.replace(new, environment=dataclasses.replace(report.environment, versions={"numpy": ("2.5",)}))
    new = dataclasses.replace(new, bundles=())
    found, _ = merge([(report, samples), (new, new_samples)])
    assert found.interrupted
    assert found.environment.versions["numpy"] == (*report.environment.versions["numpy"], "2.5")
    assert len(found.cells) >= len(report.cells)


def test_it_is_a_page(old, tmp_path):
    write_html(*old, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Run 2: It was interrupted." in text
    assert text.count("<svg") >= 3


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_reports_are_read(path):
    report = load_report(path)
    said = json.loads(path.read_text())
    text = re.sub(r"\\(.)", r"\1", to_markdown(report))
    for entry in said["left_out"]:  # a text of version 1 is a list of texts since then
        what = [entry["what"]] if isinstance(entry["what"], str) else entry["what"]
        assert f"| {', '.join(what)} | {entry['reason']} |" in text
    if said["schema_version"] == 1:  # later versions hold the facts, of which the page makes the text
        assert all(" ".join(reason.split()) in text for reason in said["noise"]["reasons"])


def test_there_are_published_reports():
    assert len(PUBLISHED) >= 2


@pytest.mark.parametrize("broken", [
    {"partial": 3},
    {"noise": {"reasons": [1]}},
    {"environment": {"versions": 3}},
    {"environment": None},
    {"left_out": [7]},
    {"left_out": [{"what": 1, "reason": "x"}]},
])  # fmt: skip
def test_a_broken_old_report_is_refused(tmp_path, broken):
    data = json.loads(OLD.read_text())
    for key, value in broken.items():
        data[key] = data[key] | value if isinstance(value, dict) else value
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(data))
    with pytest.raises(BenchmarkError, match="is no benchmark report"):
        load_report(path)
