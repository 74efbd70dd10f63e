"""Makes the reference pages of the site from the code, and leads links out of ``docs`` to the repository."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import click
from docutils import nodes
from numpydoc.docscrape import NumpyDocString
from sphinx.application import Sphinx

import sjepa_deploy
from sjepa_deploy import errors
from sjepa_deploy.bundle import Manifest
from sjepa_deploy.cli import COMMANDS, _command
from sjepa_deploy.cli.help_page import GENERAL, title_of
from sjepa_deploy.eeg.steps import STEPS
from sjepa_deploy.runtime.backend import BACKENDS

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
MADE = DOCS / "_made"
REPOSITORY = "https://github.com/sjepa-deploy/sjepa-deploy/blob/main/"

CONFIGURATIONS = {
    "Streams": ["sjepa_deploy.runtime.live.config:StreamConfig", "sjepa_deploy.runtime.backend:BackendOptions"],
    "The signal": ["sjepa_deploy.spec:SignalSpec", "sjepa_deploy.spec:EventWindow"],
    "The model": ["sjepa_deploy.spec:ModelSpec", "sjepa_deploy.spec:EncoderSpec"],
    "Fine-tuning": [
        "sjepa_deploy.learning.finetune:FinetuneConfig",
        "sjepa_deploy.learning.data:DataConfig",
        "sjepa_deploy.learning.data:Target",
        "sjepa_deploy.learning.data:Synthetic",
        "sjepa_deploy.learning.loop:Engine",
    ],
    "Pretraining": ["sjepa_deploy.learning.pretrain:PretrainConfig", "sjepa_deploy.learning.masking:Masking"],
}
"""Dataclasses whose fields are keys of YAML files or arguments, by heading."""


def make_pages(app: Sphinx) -> None:
    """Write the pages; a page that is the same stays, so that Sphinx does not read it again."""
    pages = {
        "commands/index.md": _commands_index(),
        "configuration.md": _configuration(),
        "api.md": _api(),
        "manifest.md": _manifest(),
        "errors.md": _errors(),
        "metrics.md": _metrics(),
    }
    pages |= {f"commands/{name}.md": _command_page(name) for name in COMMANDS}
    for name, text in pages.items():
        file = MADE / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


# ---- commands ----------------------------------------------------------------------------------------------------------------


def _commands_index() -> str:
    rows = [f"| [sjepa-{name}]({name}.md) | {_first_sentence(_command(name).help)} |" for name in COMMANDS]
    toc = "\n".join(COMMANDS)
    return f"""# Commands

Every command is made from the same options ([options that commands share](../../options.md)).

| command | what the command does |
| --- | --- |
{chr(10).join(rows)}

```{{toctree}}
:hidden:

{toc}
```
"""


def _command_page(name: str) -> str:
    command = _command(name)
    module = importlib.import_module(f"sjepa_deploy.cli.{name}")
    sections: dict[str, list[str]] = {}
    for option in command.params:
        if isinstance(option, click.Option):
            record = option.get_help_record(click.Context(command))
            assert record is not None
            sections.setdefault(title_of(option), []).append(f"| `{_cell(record[0])}` | {_cell(record[1])} |")
    sections[GENERAL] = sections.pop(GENERAL)  # the last one
    tables = [f"## {title}\n\n| option | meaning |\n| --- | --- |\n" + "\n".join(rows) for title, rows in sections.items()]
    guide = DOCS / f"{name}.md"
    more = f"\n[{name}](../../{name}.md) explains how to use the command.\n" if guide.exists() else ""
    usage = " ".join(command.collect_usage_pieces(click.Context(command)))
    return f"""# sjepa-{name}

    sjepa-{name} {usage}

{_paragraphs(command.help)}
{more}
{(chr(10) * 2).join(tables)}

The source is `{Path(inspect.getfile(module)).relative_to(ROOT)}`.
"""


def _paragraphs(text: str | None) -> str:
    return re.sub(r"(?<![`\w-])(--[a-z][a-z-]*)", r"`\1`", inspect.cleandoc(text or "").replace("*", r"\*"))


def _first_sentence(text: str | None) -> str:
    return _cell(inspect.cleandoc(text or "").split("\n\n")[0])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", r"\*").replace("<", "&lt;")


# ---- configuration -----------------------------------------------------------------------------------------------------------


def _configuration() -> str:
    parts = [
        "# Configuration keys",
        "Keys of YAML files are the fields of these dataclasses. A field that has no default must be given.",
    ]
    for heading, names in CONFIGURATIONS.items():
        parts.append(f"## {heading}")
        for name in names:
            module, _, attribute = name.partition(":")
            parts.append(_fields_of(getattr(importlib.import_module(module), attribute)))
    return "\n\n".join(parts) + "\n"


def _fields_of(cls: type) -> str:
    assert dataclasses.is_dataclass(cls)
    told = _attributes_of(cls)
    hints = typing.get_type_hints(cls)
    rows = [
        f"| `{field.name}` | {_type_words(hints[field.name])} | {_default(field)} | {told.get(field.name, '')} |"
        for field in dataclasses.fields(cls)
    ]
    table = "\n".join(rows)
    return f"""### {cls.__name__}

{_first_sentence(cls.__doc__)} (`{cls.__module__}.{cls.__qualname__}`)

| key | type | default | meaning |
| --- | --- | --- | --- |
{table}"""


def _attributes_of(cls: type) -> dict[str, str]:
    doc = NumpyDocString(inspect.cleandoc(cls.__doc__ or ""))
    told = {}
    for entry in [*doc["Attributes"], *doc["Parameters"]]:
        for name in entry.name.split(","):
            told[name.strip()] = _cell(" ".join(entry.desc))
    return told


def _type_words(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return _cell(", ".join(f"`{each}`" for each in typing.get_args(hint)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_words(each) for each in typing.get_args(hint))
    if hint is type(None):
        return "nothing"
    if origin is tuple:
        inner = [each for each in typing.get_args(hint) if each is not ...]
        return f"list of {', '.join(dict.fromkeys(_type_words(each) for each in inner))}"
    if origin is typing.Annotated:
        return _type_words(typing.get_args(hint)[0])
    names = {float: "number", int: "whole number", str: "text", bool: "true or false"}
    return names.get(hint, f"`{getattr(hint, '__name__', str(hint))}`")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return (
            f"`{_cell(json.dumps(field.default) if isinstance(field.default, (bool, str, float, int)) else repr(field.default))}`"
        )
    if field.default_factory is not dataclasses.MISSING:
        return "its own defaults"
    return "none"


# ---- Python ------------------------------------------------------------------------------------------------------------------


def _api() -> str:
    parts = [
        "# Python API",
        "`import sjepa_deploy` brings these names, and never imports PyTorch.",
    ]
    for name in sjepa_deploy.__all__:
        directive = "autoclass" if inspect.isclass(getattr(sjepa_deploy, name)) else "autofunction"
        members = "   :members:\n" if directive == "autoclass" else ""
        parts.append(f"## {name}\n\n```{{eval-rst}}\n.. {directive}:: sjepa_deploy.{name}\n{members}```")
    parts.append("## For training elsewhere")
    for name in ("prepare", "signal_from_braindecode"):
        parts.append(f"### {name}\n\n```{{eval-rst}}\n.. autofunction:: sjepa_deploy.eeg.{name}\n```")
    parts.append("## Backends")
    rows = "\n".join(f"| `{name}` | `[{entry.extra or 'none'}]` | `{entry.package}` |" for name, entry in BACKENDS.items())
    parts.append(f"| name | extra | package |\n| --- | --- | --- |\n{rows}")
    return "\n\n".join(parts) + "\n"


# ---- the manifest ------------------------------------------------------------------------------------------------------------


def _manifest() -> str:
    schema = json.loads((ROOT / "sjepa_deploy/assets/manifest.schema.json").read_text())
    classes = {cls.__name__: cls for cls in (*_dataclasses_in(Manifest), *STEPS.values())}
    parts = [
        "# The manifest",
        "`manifest.json` describes a [bundle](../bundle.md). It is a `Manifest`. The tables are made from "
        "`sjepa_deploy/assets/manifest.schema.json` and the classes.",
    ]
    for name, part in schema["$defs"].items():
        if "properties" in part:
            told = _attributes_of(classes[name]) if name in classes else {}
            parts += [f"## {name}", _properties(part, told)]
    return "\n\n".join(parts) + "\n"


def _dataclasses_in(cls: type) -> set[type]:
    """Return the dataclasses that the fields of `cls` are made of, and `cls`."""
    found: set[type] = {cls}
    pending: list[Any] = [*typing.get_type_hints(cls).values()]
    while pending:
        hint = pending.pop()
        pending += typing.get_args(hint)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint not in found:
            found.add(hint)
            pending += typing.get_type_hints(hint).values()
    return found


def _properties(schema: dict[str, Any], told: dict[str, str]) -> str:
    required = set(schema.get("required", ()))
    rows = [
        f"| `{name}` | {_schema_type(part)} | {'yes' if name in required else 'no'} | {told.get(name, '')} |"
        for name, part in schema["properties"].items()
    ]
    table = "\n".join(rows)
    text = _cell(schema.get("description", ""))
    return f"{text}\n\n| key | type | required | meaning |\n| --- | --- | --- | --- |\n{table}"


def _schema_type(part: dict[str, Any]) -> str:
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in part:
            return " or ".join(_schema_type(each) for each in part[key])
    if "enum" in part:
        return ", ".join(f"`{each}`" for each in part["enum"])
    if "const" in part:
        return f"`{part['const']}`"
    kind = part.get("type", "any")
    if kind == "array" and isinstance(part.get("items"), dict):
        return f"array of {_schema_type(part['items'])}"
    return _cell(str(kind))


# ---- errors ------------------------------------------------------------------------------------------------------------------


def _errors() -> str:
    parts = [
        "# Errors and their mends",
        "An error says what is wrong, and how to mend it. All are `sjepa_deploy.SjepaError`. The exit status is 2, or "
        "1 where a verification failed. Words in braces stand for values.",
    ]
    raised = _raised()
    for name, cls in inspect.getmembers(errors, inspect.isclass):
        if issubclass(cls, errors.SjepaError) and raised.get(name):
            rows = "\n".join(f"| {_cell(problem)} | {_cell(mend)} |" for problem, mend in sorted(raised[name]))
            parts.append(
                f"## {name}\n\n{_first_sentence(cls.__doc__)}\n\n| what is wrong | how to mend it |\n| --- | --- |\n{rows}"
            )
    return "\n\n".join(parts) + "\n"


def _raised() -> dict[str, set[tuple[str, str]]]:
    """Return problem and mend of every error that the code makes with two texts, by the name of its class."""
    found: dict[str, set[tuple[str, str]]] = {}
    for folder in ("sjepa_deploy", "export", "runtime"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 2:
                    texts = [_text(each) for each in node.args]
                    if node.func.id.endswith("Error") and all(texts):
                        found.setdefault(node.func.id, set()).add((str(texts[0]), str(texts[1])))
    return found


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(each.value) if isinstance(each, ast.Constant) else f"{{{_name(each)}}}" for each in node.values)
    return None


def _name(node: ast.expr) -> str:
    """Return the last word of an expression, as a name of the value."""
    words = re.findall(r"[A-Za-z]\w*", ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node))
    return words[-1] if words else "value"


# ---- metrics -----------------------------------------------------------------------------------------------------------------


def _metrics() -> str:
    from sjepa_deploy.learning import metrics

    parts = ["# Metrics", "Scores come with intervals of 95 %, from a bootstrap over what is independent."]
    for name, value in inspect.getmembers(metrics, inspect.isfunction):
        if not name.startswith("_") and value.__module__ == metrics.__name__:
            parts.append(f"## {name}\n\n```{{eval-rst}}\n.. autofunction:: {metrics.__name__}.{name}\n```")
    return "\n\n".join(parts) + "\n"


# ---- links out of docs -------------------------------------------------------------------------------------------------------


def lead_out(app: Sphinx, docname: str, source: list[str]) -> None:
    """Lead links to files of the repository, which are no pages, to where the repository is."""
    if docname == "index":  # a page that is named nowhere stands at the end of its part
        named = set(re.findall(r"^(\w+)$", source[0], re.MULTILINE))
        rest = sorted(file.stem for file in DOCS.glob("*.md") if file.stem not in {*named, "index"})
        source[0] = source[0].replace("the rest\n", "".join(f"{name}\n" for name in rest))
    source[0] = re.sub(r"\]\(gallery/(\w+)\.py\)", r"](_made/gallery/\1.rst)", source[0])
    source[0] = source[0].replace("](gallery)", "](_made/gallery/index.rst)")
    source[0] = re.sub(r"\]\(\.\./(?!docs/)([^)]+)\)", rf"]({REPOSITORY}\1)", source[0])


def note_links(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Note the links of a page that lead to other places."""
    for node in doctree.findall(nodes.reference):
        if node.get("refuri", "").startswith(("http://", "https://")):
            _links.setdefault(node["refuri"], set()).add(docname)


def list_links(app: Sphinx, error: Exception | None) -> None:
    """List the links that lead to other places, which nothing checks offline, with their pages."""
    lines = [f"{link}\t{', '.join(sorted(pages))}\n" for link, pages in sorted(_links.items())]
    (Path(app.outdir) / "external_links.txt").write_text("".join(lines))


_links: dict[str, set[str]] = {}


def setup(app: Sphinx) -> dict[str, bool]:
    """Register what this file does."""
    app.connect("builder-inited", make_pages, priority=100)
    app.connect("source-read", lead_out)
    app.connect("doctree-resolved", note_links)
    app.connect("build-finished", list_links)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
