"""Help pages, completion, progress and the log: what every command has, whatever it does."""

import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest
from bundles import copy_bundle

from sjepa_deploy.cli import COMMANDS, _command, options, progress, run_command
from sjepa_deploy.cli.help_page import is_quiet, shortened
from sjepa_deploy.runtime.backend import BACKENDS

SCRIPTS = Path(sys.executable).parent


@pytest.fixture
def call(capsys):
    def run(name, *arguments):
        command = name if isinstance(name, click.Command) else _command(name)
        status = run_command(command, f"sjepa-{name}", [str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_all_options_are_told(name, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    spellings = {o: max(o.opts, key=len) for o in _command(name).params if isinstance(o, click.Option)}
    page, whole = call(name, "--help")[1], call(name, "--help-all")[1]
    assert len(page.splitlines()) <= 50, "mark options as rare: sjepa_deploy.cli.options.rare"
    for text in (page, whole):
        assert max(map(len, text.splitlines())) <= 100
        assert all(re.search(rf"{spelling}\b", text) for spelling in spellings.values())
    words = " ".join(whole.split())
    assert all(" ".join(option.help.split()).split("  [")[0][:40].strip() in words for option in spellings)


@pytest.mark.parametrize("name", ["stream", "verify"])
def test_help_fits_a_narrow_terminal(name, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, call(name, "--help")[1].splitlines())) <= 60


def test_texts_lose_clauses_from_the_end():
    text = "Seconds from one decision to the next; 0 decides at every sample.  [default: 0.1]"
    assert shortened(text, 90) == text
    assert shortened(text, 60) == "Seconds from one decision to the next.  [default: 0.1]"
    assert shortened(text, 40) == "Seconds from one decision to the next."
    assert shortened(text, 30) == "Seconds from one decision..."


# ---------------------------------------------------------------- completion

SHELLS = {
    "bash": """source <(sjepa --completion bash); COMP_WORDS=({words}); COMP_CWORD={at}; COMP_TYPE=9
        _{function}_completion "${{COMP_WORDS[0]}}"; printf '%s\\n' "${{COMPREPLY[@]}}" """,
    "fish": "sjepa --completion fish | source; complete --do-complete '{line}'",
}


def complete(shell, line, folder):
    program, *_ = words = line.split(" ")
    function = program.replace("-", "_")
    script = SHELLS[shell].format(words=" ".join(f"'{w}'" for w in words), at=len(words) - 1, line=line, function=function)
    environment = os.environ | {"PATH": f"{SCRIPTS}:{os.environ['PATH']}"}
    done = subprocess.run([shell, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [each.partition("\t")[0].strip() for each in done.stdout.splitlines() if each.strip()]


@pytest.fixture(scope="module")
def folder(make_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    copy_bundle(make_bundle("prelocal"), folder / "motor")
    (folder / "music").mkdir()
    return folder


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_complete_commands_bundles_and_backends(shell, folder):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    assert complete(shell, "sjepa ver", folder) == ["verify"]
    assert complete(shell, "sjepa-verify m", folder) == ["motor"]
    assert complete(shell, "sjepa-verify motor --backend tensorrt-", folder) == ["tensorrt-rtx"]
    if shell == "bash":  # click's lines for fish end at a comma
        assert complete(shell, "sjepa-verify motor --backend ort-cpu,tensorrt-", folder) == ["ort-cpu,tensorrt-rtx"]
    assert complete(shell, "sjepa-run motor --precision b", folder) == ["bf16"]


def test_zsh_completes(folder):
    """Its completion runs in its line editor alone: a terminal is needed, and a key."""
    if shutil.which("zsh") is None:
        pytest.skip("there is no zsh")
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ |= {"PATH": f"{SCRIPTS}:{os.environ['PATH']}", "TERM": "dumb", "PS1": "> "}
        os.execvp("zsh", ["zsh", "-f", "-i"])
    seen = ""

    def until(text):
        nonlocal seen
        deadline = time.monotonic() + 20
        while text not in seen:
            assert time.monotonic() < deadline, seen
            seen += os.read(terminal, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    try:
        os.write(terminal, b"autoload -Uz compinit; compinit -u -D; eval \"$(sjepa --completion zsh)\"; echo rea''dy\n")
        until("ready")
        os.write(terminal, b"echo sjepa-verify m\x01\x04\x04\x04\x04\x04")  # the keys arrive as one line
        until("sjepa-verify m")
        os.write(terminal, b"\x05\t")
        until("otor")
    finally:
        os.close(terminal)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_names_after_a_comma_are_completed_once():
    items = options.completion.after_commas("torch,", tuple(BACKENDS))
    assert {item.value for item in items} == {f"torch,{name}" for name in BACKENDS if name != "torch"}


# ---------------------------------------------------------------- the log, and progress


@options.command
def noisy():
    """Log."""
    logger = logging.getLogger("sjepa_deploy.somewhere")
    for level in ("debug", "info", "warning", "error"):
        getattr(logger, level)(level)
    click.echo(is_quiet())


def test_the_log_goes_to_standard_error_as_told(call):
    shown = {
        (): "warning\nerror\n",
        ("-q",): "error\n",
        ("-v",): "".join(f"sjepa_deploy.somewhere: {level}\n" for level in ("info", "warning", "error")),
        ("-vv",): "".join(f"sjepa_deploy.somewhere: {level}\n" for level in ("debug", "info", "warning", "error")),
    }
    for flags, log in shown.items():
        assert call(noisy, *flags) == (0, f"{'-q' in flags}\n", log)
    assert call(noisy, "-q", "-v")[0] == 2


def test_a_step_that_takes_long_is_told_in_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE_AFTER", 0.1)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.1)
    with progress.progress("judging", total=4) as steps:
        for text in ("the first", "the second", "the third"):
            steps.begin(text)
        time.sleep(0.35)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 3
    assert all(re.fullmatch(r"the third \(step 3 of 4\), \d s, about \d s left", line) for line in lines)
    assert not any(thread.name == "progress" for thread in threading.enumerate())


def test_the_rest_is_estimated_from_what_is_done(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    steps = progress.Steps("decoding", total=5, started=now)
    now = 130.0
    steps.at(done=1)
    assert str(steps) == "decoding (1 of 5), 30 s"
    steps.at(done=2)
    assert str(steps) == "decoding (2 of 5), 30 s, about 45 s left"
    now = 140.0
    assert str(steps) == "decoding (2 of 5), 40 s, about 35 s left"
    steps.at(total=0)
    assert str(steps) == "decoding, 40 s"
    assert [progress.duration(s) for s in (59.4, 200, 7500)] == ["59 s", "3 min 20 s", "2 h 5 min"]


# ---------------------------------------------------------------- entries and colours


def in_a_process(*command, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_the_package_is_a_command():
    done = in_a_process("-m", "sjepa_deploy", "doctor", "--version")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"python -m sjepa_deploy, version \S+\n", done.stdout)


def test_colours_are_left_out_on_request(folder):
    def look(**environment):
        done = in_a_process(
            "-m", "sjepa_deploy", "verify", "motor", "-b", "ort-cpu", cwd=folder, FORCE_COLOR="1", COLUMNS="60", **environment
        )
        assert done.returncode == 0, done.stderr
        assert "verified:" in done.stdout
        return done.stdout

    assert "\x1b[32m" in look()
    assert not re.search(r"\x1b\[[0-9;]*3\dm", look(NO_COLOR="1"))
