"""The rules that options keep in every command: one meaning a name, --config, --version, --out."""

import json
import re
from pathlib import Path

import click
import numpy as np
import pytest
import yaml
from bundles import MONTAGE, copy_bundle, listing
from small import FINETUNE

from sjepa_deploy.cli import COMMANDS, _command, run_command
from sjepa_deploy.cli.options import Names
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.serialize import encode

MODEL, SIGNAL = {"export", "pretrain", "finetune", "evaluate"}, {"run", "stream", "decide", "calibrate"}
RECIPES, TUNING = {"pretrain", "finetune", "evaluate"}, {"finetune", "evaluate"}
MEANINGS = {
    "--sfreq": (MODEL, SIGNAL),  # of the model, or of a recording that does not say
    "--unit": ({"export"}, SIGNAL | RECIPES),  # of the model, or of a recording
    "--channels": ({"export"}, SIGNAL),
    "--out": (SIGNAL - {"calibrate"}, {"export", "bench", "calibrate", "sweep"} | RECIPES),  # a file, or a folder
    "--config": (set(COMMANDS) - RECIPES - {"sweep"}, RECIPES | {"sweep"}),  # options, or a recipe
    # one, several, Lightning's
    "--precision": (
        {"run", "stream", "serve", "decide", "session"},
        {"verify", "bench", "export", "build", "evaluate"},
        {"pretrain", "finetune"},
    ),
    "--backend": ({"run", "stream", "serve", "decide", "session"}, {"verify", "bench", "evaluate"}),  # one, several
    "--events": (SIGNAL | {"evaluate"}, {"export"}),  # to decode, of the model
    "--phase": ({"export"}, RECIPES),  # that a model learned from, to learn from
    "--task": ({"export"}, TUNING, {"stream"}),  # of any model, to learn, of a run
    "--data": (RECIPES, {"calibrate"}),  # of many people, of one
    "--lr": (RECIPES, {"calibrate"}),  # from the beginning, of a model that has learned
    "--seed": ({"export", "bench", "calibrate"}, RECIPES),  # a recipe has its own
    "--variant": ({"export"}, TUNING),  # a base model is not fine-tuned
    "--max-batch": ({"export"}, {"build"}),  # of a graph, of an engine
    "--class-names": ({"export"}, {"decide"}),  # one for each output; two for one output too
    "--classes": ({"stream", "decide", "export", "calibrate"}, TUNING),  # pairs of class and event, names of classes alone
    "--column": ({"stream", "decide", "export", "calibrate"}, TUNING),  # of a table, or of whatever holds a target
    # a recording is cut into windows side by side, a stream is decided on often; none by default
    "--hop": ({"run"}, {"stream"}, {"decide"}, {"evaluate"}),
    "--deadline": ({"stream"}, {"bench"}, {"serve"}),  # the hop, the next window, seconds to an answer
    "--time-limit": ({"bench"}, {"build"}),  # ends with what it has, is given up
    "--duration": ({"bench"}, {"stream"}),  # of each cell, of the stream
    "--from": ({"bench"}, TUNING),  # a report, a model
    "--name": ({"bench"}, {"serve"}, {"evaluate"}),  # of files, of a model, in tables
}
"""Commands in which an option means the same, for the options that mean several things."""


def options_of(name):
    return [each for each in _command(name).params if isinstance(each, click.Option)]


def long_ones(option):
    return [spelling for spelling in option.opts if spelling.startswith("--")]


def look(option):
    """Return what a user sees of an option, without defaults that depend on the command."""
    kind = option.type.to_info_dict() | {"metavar": option.metavar, "choices": getattr(option.type, "choices", None)}
    default = tuple(option.default) if isinstance(option.default, list) else option.default
    text = option.help.partition("  [default")[0]
    return str(kind), str(default), option.multiple, option.nargs, option.is_flag, text, tuple(option.opts)


def test_an_option_means_the_same_in_every_command():
    seen = {}
    for command in COMMANDS:
        for option in options_of(command):
            for spelling in long_ones(option):
                groups = [each for each in MEANINGS.get(spelling, (set(COMMANDS),)) if command in each]
                assert len(groups) == 1, f"{spelling} of {command} belongs to {len(groups)} groups"
                first, known = seen.setdefault((spelling, frozenset(groups[0])), (command, look(option)))
                assert look(option) == known, f"{spelling} of {command} and of {first}"


def test_a_short_option_stands_for_one_long_option():
    stands_for = {}
    for command in COMMANDS:
        for option in options_of(command):
            for short in set(option.opts) - set(long_ones(option)):
                assert re.fullmatch("-[A-Za-z]", short)
                assert stands_for.setdefault(short, long_ones(option)) == long_ones(option), (command, short)
    assert {"-o", "-f", "-b", "-p", "-c", "-s", "-e", "-v", "-q", "-V", "-j"} <= {*stands_for}


def test_no_meaning_is_listed_in_vain():
    for spelling, groups in MEANINGS.items():
        have = {command for command in COMMANDS if any(spelling in option.opts for option in options_of(command))}
        assert set().union(*groups) == have, spelling
        looks = [{look(o) for c in group for o in options_of(c) if spelling in o.opts} for group in groups]
        assert len(set().union(*looks)) == len(groups), f"{spelling}: two groups look the same"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_config_version_help_and_json(name, capsys):
    opts = {spelling for option in options_of(name) for spelling in option.opts}
    assert {"--config", "--version", "--json", "--verbose", "--quiet", "--help-all"} <= opts
    settings = _command(name).context_settings
    assert settings == {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
    assert run_command(_command(name), f"sjepa-{name}", ["--version"]) == 0
    assert re.fullmatch(rf"sjepa-{name}, version \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_writes_can_replace(name):
    opts = {spelling for option in options_of(name) for spelling in option.opts}
    assert ("--out" in opts or name == "session") == ("--force" in opts)
    assert ("--append" in opts) == (name == "stream")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_a_command_does_in_whole_sentences(name):
    first, _, _ = _command(name).help.partition("\n")
    assert re.fullmatch(r"[A-Z][a-z-]+ .*\.", " ".join(_command(name).help.split("\n\n")[0].split())), first
    for option in options_of(name):
        assert re.match(r"[A-Z*.\w-]", option.help), option.help
        assert re.search(r"[.\])]$", option.help), f"{option.opts} of {name}: {option.help}"


def test_names_are_taken_as_text_or_list():
    kind = Names(("a", "b"))
    assert kind.convert("a, b", None, None) == kind.convert(["a", "b"], None, None) == ("a", "b")
    assert Names().convert("", None, None) == ()
    for wrong, message in (("a,,b", "empty name"), ("a,c", "'c' is not one of 'a', 'b'"), (",", "empty name")):
        with pytest.raises(click.BadParameter, match=message):
            kind.convert(wrong, None, None)


# ---------------------------------------------------------------- --config


@pytest.fixture
def call(capsys):
    def run(name, *arguments):
        status = run_command(_command(name), f"sjepa-{name}", [str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def decode(call, make_bundle, tmp_path):
    """Return a function that decodes ten seconds of EEG in millivolts with options and the file `text`."""
    np.save(tmp_path / "a.npy", eeg_windows(1, 8, 1000, 100.0, np.random.default_rng(0))[0] / 1000)

    def run(text, *arguments):
        (tmp_path / "c.yaml").write_text(text)
        return call("run", make_bundle("prelocal").path, tmp_path / "a.npy", "--config", tmp_path / "c.yaml", *arguments)

    return run


def test_a_file_stands_for_options_and_the_command_line_wins(decode, call, make_bundle, tmp_path):
    given = ("--sfreq", 100, "--unit", "mV", "--channels", ",".join(MONTAGE.ch_names))
    want = call("run", make_bundle("prelocal").path, tmp_path / "a.npy", *given, "--hop", 1)
    text = yaml.safe_dump({"sfreq": 100, "unit": "mV", "channels": list(MONTAGE.ch_names), "hop": 0.5, "backend": None})
    assert decode(text, "--hop", 1) == want
    assert want[0] == 0
    assert decode(text)[1].count("\n") == 1 + 17  # every 0.5 s
    assert decode("", *given, "--hop", 1) == want


def test_keys_are_the_names_of_options(decode, tmp_path):
    out = tmp_path / "out.tsv"
    status, printed, _ = decode(f"sfreq: 100\nunit: mV\nout: '{out}'\njson: true\ninterpolate: false\n")
    assert (status, json.loads(printed)["n_windows"]) == (0, 5)
    assert decode(f"sfreq: 100\nunit: mV\nout: '{out}'\nforce: true\n")[0] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "hopp: 1",
            r"has the unknown key 'hopp'. The keys are backend, channels, check-unit, device, events, force, hop, interpolate,",
        ),
        ("config: c.yaml", "unknown key 'config'"),
        ("version: true", "unknown key 'version'"),
        ("1: 2", "unknown key 1"),
        ("hop: fast", "hop: 'fast' is not a valid float"),
        ("hop: [1, 2]", "hop: one value is needed, not a list"),
        ("hop: {a: 1}", "hop: .* is no value of an option"),
        ("hop: true", "hop: true or false is no value of this option"),
        ("out: 2026-01-01", "out: .* is no value of an option. Put text in quotes"),
        ("json: 1", "json: true or false is needed"),
        ("interpolate: 'yes'", "interpolate: 'yes' is no share from 0 to 1"),
        ("interpolate: 2", "interpolate: 2 is no share from 0 to 1"),
        ("precision: fp8", "precision: 'fp8' is not one of 'fp32'"),
        ("channels: [Cz, '']", "channels: .* has an empty name"),
        ("- hop", "holds no options. Write one on each line"),
        ("a: [1", "is not YAML"),
    ],
)
def test_a_file_with_mistakes_is_refused(decode, text, message):
    status, out, err = decode(text)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(rf"c\.yaml.*{message}", err), err
    assert err.endswith("See sjepa-run --help.\n")


def test_a_file_that_is_not_there(call, tmp_path):
    status, _, err = call("doctor", "--config", tmp_path / "c.yaml")
    assert status == 2
    assert "c.yaml cannot be read (No such file or directory)" in err


def test_the_file_of_the_docs_is_one(call, make_bundle, tmp_path):
    page = (Path(__file__).parents[1] / "docs/options.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "lab.yaml").write_text(example)
    status, _, err = call("stream", make_bundle("prelocal").path, "--config", tmp_path / "lab.yaml")
    assert status == 2
    assert "Give one of --source, --check and --replay" in err  # the only thing that is wrong


def test_options_that_are_given_several_times_and_switches_stand_in_a_file(call, make_bundle, tmp_path):
    path = make_bundle("prelocal", precisions=("fp32", "fp16", "bf16")).path
    for backend, precision in (("ort-cpu", ["fp16", "fp32"]), (["ort-cpu"], "fp32,fp16"), ("ort-cpu", ["fp32,fp16"])):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"backend": backend, "precision": precision, "json": True}))
        status, out, err = call("verify", path, "--config", tmp_path / "c.yaml")
        assert status == 0, err
        assert [(r["backend"], r["precision"]) for r in json.loads(out)["results"]] == [("ort-cpu", "fp32"), ("ort-cpu", "fp16")]


# ---------------------------------------------------------------- --out


def refused(result, path, *more):
    status, out, err = result
    assert (status, out, err.count("\n")) == (2, "", 1), err
    for text in (str(path), "--force", *more):
        assert text in err
    return True


def stream_arguments(bundle):
    return (bundle, "--source", "synthetic", "--speed", "inf", "--duration", "3", "--quiet")


@pytest.fixture
def must_not_start(monkeypatch):
    """Make every start of real work an error: what is in the way is said before."""

    def started(*_, **__):
        raise AssertionError("the work has started")

    for place in ("run.Bundle", "stream.Bundle", "bench.Bundle", "bench.load_report"):
        monkeypatch.setattr(f"sjepa_deploy.cli.{place}", started, raising=True)
    for place in ("models.checkpoint.read_checkpoint", "learning.finetune.load_windows", "learning.pretrain.load_windows"):
        monkeypatch.setattr(f"sjepa_deploy.{place}", started)


@pytest.mark.usefixtures("must_not_start")
def test_what_is_there_is_refused_before_the_work_starts(call, make_bundle, tmp_path):
    bundle = copy_bundle(make_bundle("prelocal"), tmp_path / "bundle")
    for name in ("t.tsv", "d.jsonl", "r.xdf", "o/bench.md", "o/compare.html", "model/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    before = listing(tmp_path)
    assert refused(call("run", bundle, "nothing.edf", "--out", tmp_path / "t.tsv"), tmp_path / "t.tsv")
    stream = stream_arguments(bundle)
    assert refused(call("stream", *stream, "--out", tmp_path / "d.jsonl"), tmp_path / "d.jsonl", "--append", "another --out")
    for more in ((), ("--append",)):
        assert refused(call("stream", *stream, "--record", tmp_path / "r.xdf", *more), tmp_path / "r.xdf", "another --record")
    assert refused(call("bench", bundle, "--out", tmp_path / "o"), tmp_path / "o/bench.md")
    assert refused(call("bench", "--compare", "a.json", "b.json", "--out", tmp_path / "o"), tmp_path / "o/compare.html")
    assert refused(call("export", "--checkpoint", "nowhere", "--out", bundle), bundle)
    for name in ("pretrain", "finetune"):
        assert refused(call(name, "--out", tmp_path / "model"), tmp_path / "model")
    assert listing(tmp_path) == before


@pytest.mark.usefixtures("must_not_start")
def test_places_that_cannot_be_written_are_named_before_the_work_starts(call, tmp_path):
    (tmp_path / "file").touch()
    for flag, arguments in (("--out", ("run", "b", "r.edf")), ("--record", ("stream", *stream_arguments("b")))):
        for place, reason in (("", "Is a directory"), ("no/f", "No such file or directory"), ("file/f", "Not a directory")):
            status, _, err = call(*arguments, flag, tmp_path / place)
            assert status == 2
            assert f"cannot be written ({reason}). Choose another {flag}." in err


def test_a_stream_appends_or_replaces(call, make_bundle, tmp_path):
    lines, record = tmp_path / "d.jsonl", tmp_path / "r.xdf"
    arguments = (*stream_arguments(make_bundle("prelocal").path), "--late", "queue", "--out", lines)
    assert call("stream", *arguments, "--append")[0] == 0  # there is none yet
    once = lines.read_text().count("\n")
    assert once > 5
    assert call("stream", *arguments, "--append")[0] == 0
    assert lines.read_text().count("\n") == 2 * once
    record.write_text("old")
    assert call("stream", *arguments, "--force", "--record", record)[0] == 0
    assert lines.read_text().count("\n") == once
    assert record.read_bytes().startswith(b"XDF:")
    status, _, err = call("stream", *arguments, "--force", "--append")
    assert status == 2
    assert "give one of them" in err


def test_a_table_goes_to_standard_output_a_device_or_a_new_file(call, make_bundle, tmp_path):
    np.save(tmp_path / "a.npy", eeg_windows(1, 8, 1000, 100.0, np.random.default_rng(0))[0])
    arguments = ("run", make_bundle("prelocal").path, tmp_path / "a.npy", "--sfreq", 100, "--unit", "uV")
    status, out, _ = call(*arguments)
    assert status == 0
    assert call(*arguments, "--out", "-")[:2] == (0, out)
    assert call(*arguments, "--out", "/dev/null")[:1] == (0,)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert call(*arguments, "--out", tmp_path / "link")[0] == 0
    assert (tmp_path / "target").read_text() == out
    assert not Path("-").exists()


def test_a_benchmark_adds_to_a_folder_and_replaces_when_told(call, make_bundle, tmp_path):
    options = ("--backend", "ort-cpu", "--scenario", "back-to-back", "--duration", "0.05", "--out", tmp_path / "o")
    path = make_bundle("prelocal").path
    (tmp_path / "c.yaml").write_text("backend: ort-cpu\nscenario: [back-to-back]\nduration: '0.05'\nquick: false\nseed: 3\n")
    assert call("bench", path, "--config", tmp_path / "c.yaml", "--seed", 4, *options[-2:])[0] == 0
    command = json.loads((tmp_path / "o/bench.json").read_text())["command"].split()
    wanted = "--backend ort-cpu --scenario back-to-back --duration 0.05 --seed 4 --out"
    assert command == ["sjepa-bench", str(path), *wanted.split(), str(tmp_path / "o")]  # it repeats the run without the file
    assert refused(call("bench", path, *options), tmp_path / "o/bench.json")
    assert call("bench", path, *options, "--name", "other")[0] == 0
    assert call("bench", path, *options, "--force")[0] == 0
    assert {file.name for file in (tmp_path / "o").glob("*.json")} == {"bench.json", "other.json"}


@pytest.mark.alone
def test_a_training_replaces_a_run_and_its_model_when_told(call, tmp_path):
    content = encode(FINETUNE)
    del content["encoder"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content | {"variant": "prelocal"}))
    out = tmp_path / "model"
    arguments = ("finetune", "--config", tmp_path / "c.yaml", "--out", out, "--max-epochs", 1, "--accelerator", "cpu")
    assert call(*arguments)[0] == 0
    old = (out / "model.safetensors").read_bytes()
    assert refused(call(*arguments, "--seed", 1), out, "--resume")
    status, _, err = call(*arguments, "--seed", 1, "--force", "--resume")
    assert status == 2
    assert "Give --resume or --force" in err
    status, _, err = call(*arguments, "--seed", 1, "--force", "--batch-size", 100000)
    assert status == 2
    assert (out / "model.safetensors").read_bytes() == old  # a mistake costs no model
    assert call(*arguments, "--seed", 1, "--force")[0] == 0
    assert (out / "model.safetensors").read_bytes() != old
    assert json.loads((out / "training/run.json").read_text())["engine"]["seed"] == 1
