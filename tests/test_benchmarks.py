"""The index of benchmark results is what the results say, and scripts read the results that are there."""

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmarks_index", FOLDER / "index.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_index_is_up_to_date(script):
    readme = (FOLDER / "README.md").read_text()
    assert readme == script.with_index(readme, script.index()), "run: python benchmarks/index.py"


def test_every_result_is_indexed_and_every_file_of_the_index_is_there():
    readme = (FOLDER / "README.md").read_text()
    results = [file for file in (FOLDER / "results").iterdir() if file.name != ".gitignore"]
    assert len(results) > 10
    for file in results:
        assert f"](results/{file.name})" in readme


@pytest.fixture(scope="module")
def readme_tables():
    spec = importlib.util.spec_from_file_location("readme_tables", FOLDER / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_of_the_readme_are_those_of_the_results(readme_tables):
    readme = readme_tables.README.read_text()
    assert readme == readme_tables.readme(readme), "run: python benchmarks/readme_tables.py"
    rows = {
        row[0]: row[1:] for row in (re.split(r" *\| *", line.strip("| ")) for line in readme.splitlines() if line[:2] == "| ")
    }
    cells = json.loads((FOLDER / "results/latency_H100_2026-11-28.json").read_text())["cells"]

    def medians(scenario, bundles, names, precision):
        """Medians by batch of what gave the reference outputs."""
        found = {}
        for cell in cells:
            key, latency = cell["key"], cell["latency"]
            if key["scenario"] != scenario or key["bundle"] not in bundles or key["precision"] != precision:
                continue
            if cell["parity"] is not True or not key["backend"].startswith(names) or latency["percentiles"][0]["value"] is None:
                continue
            assert latency["percentiles"][0]["percent"] == 50.0
            found.setdefault(key["batch"], []).append(latency["percentiles"][0]["value"]["value"])
        return {batch: min(each) for batch, each in found.items()}

    sizes = [int(size.replace(",", "")) for size in rows["windows of a call"][:-2]]
    assert (sizes[0], sizes[-1]) == (1, 1024)
    for model, precision in (("Contextual", "fp16"), ("Contextual", "fp32"), ("PostLocal", "fp32"), ("PreLocal", "fp32")):
        bundles = (model.lower(), f"{model.lower()}-1024")
        for who, names in (("ours", "cuda"), ("TensorRT 8.6", "tensorrt"), ("PyTorch", "torch")):
            row, measured = rows[f"{model} {precision}, {who}"], medians("throughput", bundles, names, precision)
            assert [int(us.replace(",", "")) for us in row[:-2]] == [round(measured[size]) for size in sizes]
            assert int(row[-2].replace(",", "")) == pytest.approx(1024e6 / measured[1024], rel=1e-4)
    one = medians("back-to-back", ("contextual",), "tensorrt-in-place", "fp32")
    assert rows["TensorRT 8.6"][2] == f"{one[1]:.0f}"


def test_the_page_of_batches_is_that_of_the_result(tmp_path):
    """Curves and a table, drawn without a GPU; every median of the result is on the page."""
    spec = importlib.util.spec_from_file_location("batches_page", FOLDER / "batches_page.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    result = FOLDER / "results/gpu_batches_H100_2026-11-28.json"
    shutil.copy(result, tmp_path)
    page = script.write(tmp_path / result.name).read_text()
    assert page == result.with_suffix(".html").read_text(), "run: python benchmarks/batches_page.py RESULT"
    cases = json.loads(result.read_text())["cases"]
    for model in ("contextual fp32", "contextual fp16", "contextual bf16", "postlocal fp32", "prelocal fp32"):
        assert f"{model}: latency of a call over the batch size</figcaption>" in page
    shown = [tuple(re.findall(r"<t[dh][^>]*><span>([^<]*)</span>", row)) for row in page.split("<tr")]
    at = cases["contextual:fp16:curve"]["auto"]
    (ours,) = [row for row in shown if row[:3] == ("contextual", "fp16", "cuda")]
    assert [float(text.replace(",", "")) for text in ours[3:]] == [
        pytest.approx(at[str(1 << i)]["median"], rel=0.01) for i in range(11)
    ]


def test_the_table_of_the_page_of_the_kernels_is_that_of_the_result():
    cases = json.loads((FOLDER / "results/gpu_batches_H100_2026-11-28.json").read_text())["cases"]
    found = re.findall(
        r"^\| (PreLocal|PostLocal|Contextual) `(\w+)` \| (.*) \|$", (FOLDER / "../docs/fused.md").read_text(), re.M
    )
    rows = [(name.lower(), precision, re.split(r" \| ", figures)) for name, precision, figures in found]
    rows = [row for row in rows if all(figure.replace(",", "").isdigit() for figure in row[2])]
    assert len(rows) == 5
    for variant, precision, (*ours, theirs) in rows:
        at = cases[f"{variant}:{precision}:curve"]["auto"]
        assert ours == [f"{at[size]['windows/s']:,.0f}" for size in ("1", "16", "64", "256", "1024")]
        assert theirs in [f"{found['1024']['windows/s']:,.0f}" for found in cases[f"{variant}:{precision}:torch"].values()
                          if isinstance(found, dict)]  # fmt: skip


def write(folder, name, **content):
    (folder / name).write_text(json.dumps(content))


def test_a_row_comes_from_the_name_and_the_content(script, tmp_path):
    write(tmp_path, "a_b_2-core-cpu_2026-01-02.json", machine={"commit": "abc with changes", "command": "python x.py --y z"})
    write(
        tmp_path, "a_b_2-core-cpu_2026-03-04.json", runs=[{"commit": "d", "command": "x.py"}, {"commit": "e", "command": "x.py"}]
    )
    write(tmp_path, "bench_H100_2026-01-02.json", environment={"commit": "f"}, command="sjepa-bench a --out b")
    (tmp_path / "bench_H100_2026-01-02.html").touch()
    assert script.index(tmp_path).splitlines()[2:] == [
        "| a_b | `x.py` | 2-core-cpu | 2026-03-04 | d, e | [json](results/a_b_2-core-cpu_2026-03-04.json) |",
        "| a_b | `x.py` | 2-core-cpu | 2026-01-02 | abc | [json](results/a_b_2-core-cpu_2026-01-02.json) |",
        "| bench | `sjepa-bench` | H100 | 2026-01-02 | f | [html](results/bench_H100_2026-01-02.html), "
        "[json](results/bench_H100_2026-01-02.json) |",
    ]


def test_the_streaming_benchmark_writes_what_it_measures(make_bundle, tmp_path):
    """The script as it is, for a few seconds."""
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles/prelocal").symlink_to(make_bundle("prelocal").path)
    script = [sys.executable, str(FOLDER / "streaming.py")]
    common = ["--bundles", "bundles", "--variants", "prelocal", "--sfreqs", "200"]
    for command in (["live", "--minutes", "0.1", "--hops", "0"], ["fast", "--hours", "0.02", "--extra", "--out /dev/null"]):
        result = tmp_path / f"streaming_{command[0]}_here_2026-01-02"
        subprocess.run(
            [*script, *command, *common, "--out", result.name], cwd=tmp_path, check=True, capture_output=True, timeout=120
        )
        (run,) = json.loads(result.with_suffix(".json").read_text())["runs"]
        assert run["accounted"]
        assert "| prelocal | 200 |" in (text := result.with_suffix(".md").read_text()) or "0.02 h of stream" in text
    run = json.loads((tmp_path / "streaming_live_here_2026-01-02.json").read_text())["runs"][0]
    assert run["n_decisions"] > 20
    stages = sum(stage["p50"] for stage in run["stages_ms"].values())
    assert stages == pytest.approx(run["age_ms"]["p50"], rel=0.5)


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", {"commit": "a", "command": "x.py"}), ("a_b_2026-01-02.json", {"command": "x.py"})]
)
def test_a_result_that_does_not_say_where_it_is_from_is_refused(script, tmp_path, name, content):
    write(tmp_path, name, **content)
    with pytest.raises(SystemExit, match="is not named NAME_HARDWARE_DATE|does not say from which commit"):
        script.index(tmp_path)


def test_every_listed_recording_says_where_it_comes_from():
    with (FOLDER / "recordings.tsv").open(newline="") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    assert len(rows) >= 40
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", row["repository"])
        assert re.fullmatch("[0-9a-f]{40}", row["commit"])
        assert re.fullmatch("[0-9a-f]{64}", row["sha256"])
        assert row["licence"]


def test_a_readme_without_marks_is_refused(script):
    with pytest.raises(SystemExit, match="has no marks"):
        script.with_index("# Benchmarks\n", "| a |\n")


@pytest.mark.parametrize(
    ("result", "gpu", "us"),
    [
        (
            "gpu_engines_H100_2026-11-25",
            "NVIDIA H100 80GB HBM3",
            [(58, 77, 126, 841), (65, 96, 187, 1109), (331, 444, 666, 3330)],
        ),
        ("gpu_engines_H200_2026-11-22", "NVIDIA H200", [(61, 87, 160, 854), (65, 82, 132, 848), (318, 387, 588, 2667)]),
    ],
)
def test_servers_are_simulated_with_the_batches_of_either_run(monkeypatch, result, gpu, us):
    """They were measured with the first of the ways to call, which changed from one run to the other."""
    monkeypatch.syspath_prepend(str(FOLDER))  # it imports a module that lies beside it
    spec = importlib.util.spec_from_file_location("serving_simulation", FOLDER / "serving_simulation.py")
    simulation = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serving_simulation", simulation)
    spec.loader.exec_module(simulation)
    kinds = simulation.gpu_kinds(json.loads((FOLDER / "results" / f"{result}.json").read_text()))
    assert [kind.name for kind in kinds] == [f"{v}, {gpu} (tf32 engine)" for v in ("prelocal", "postlocal", "contextual")]
    assert [tuple(round(kind.compute(batch) * 1e6) for batch in (1, 3, 8, 64)) for kind in kinds] == us
