"""Parts of pages that come from the code: flags, settings, figures.

``python -m tools.site`` writes tables of `TEXTS` into pages, between two comments, where GitHub
shows them too. The build of the site puts long lists in, by a block such as
``{generated} commands``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import dora_diffusion
from dora_diffusion.cli import main as cli
from dora_diffusion.config import Setting, settings
from dora_diffusion.config.base import OfModel
from dora_diffusion.config.fields import AnyOf, Condition, Need
from dora_diffusion.config.flag_map import DIFFERENCES, DIFFUSERS_FLAGS, advice, rules

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"^```\{generated\} ([a-z-]+)\n```$", re.MULTILINE)
_PART = re.compile(r"(<!-- generated: ([a-z-]+) -->\n)(?:.*\n)*?(?=<!-- end -->)")
_PACKAGES = ("config", "export")
"""Packages that say themselves which of their names are public."""
_RESUME = {
    "same": "Resuming: must be the same.",
    "free": "Resuming: may change.",
    "ignored": "Resuming: not compared.",
}


def expanded(source: str) -> str:
    """A page with the texts that its blocks name."""
    return _BLOCK.sub(lambda block: TEXTS[block[1]]().rstrip(), source)


def current(source: str) -> str:
    """A page whose tables between comments are what the code says now."""
    return _PART.sub(lambda part: f"{part[1]}\n{TEXTS[part[2]]().rstrip()}\n\n", source)


def plain(text: str) -> str:
    """Markdown of a text that has none: flags as code, all else as it is written."""
    parts = re.split(r"((?<![\w-])--[a-z][\w-]*|`[^`]+`)", text)
    escaped = (re.sub(r"([\\`*_{}\[\]<>|#$~])", r"\\\1", part) for part in parts[::2])
    codes = (f"`{part.strip('`')}`" for part in parts[1::2])
    return "".join(x + y for x, y in itertools.zip_longest(escaped, codes, fillvalue=""))


@cache
def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, with all its flags."""
    return parsers_of(cli.build_parser())


def parsers_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command of a program."""
    [commands] = (
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    return dict(commands.choices)


def commands() -> str:
    """Every command with what it takes; of `train`, what is not a setting."""
    return "\n\n".join(_command(name, parser) for name, parser in parsers().items())


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    known = {setting.name for setting in settings()} if name in ("train", "fleet") else set()
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    own = [action for action in shown if action.dest not in {*known, "help", "help_all", "debug"}]
    required = [a for a in own if a.required and a.option_strings]
    words = [a.metavar or a.dest.upper() for a in own if not a.option_strings]
    usage = " ".join([parser.prog, *map(str, words), *(_invocation(a) for a in required)])
    parts = [f"## {name}", plain(parser.description or ""), f"```text\n{usage}\n```"]
    if known:
        parts.append("And a flag for each setting: [Settings](settings.md).")
    return "\n\n".join([*parts, "\n".join(_argument(parser, action) for action in own)]).rstrip()


def _invocation(action: argparse.Action) -> str:
    """``--flag VALUE``, as usage lines have it."""
    return f"{action.option_strings[-1]} {action.metavar or action.dest.upper()}"


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action)
    if action.choices is not None and not str(action.metavar or "{").startswith("{"):
        text += f" One of: {', '.join(map(str, action.choices))}."
    return f"- {_names(parser, action)}: {plain(text)}"


def _names(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """An argument's flags, and what it takes, in bold."""
    formatter = parser._get_formatter()
    takes = str(action.metavar or action.dest.upper())
    if not action.option_strings:
        return f"**`{takes}`**"
    values = "" if action.nargs in (0, "?") else f" {formatter._format_args(action, takes)}"
    *others, last = action.option_strings
    return ", ".join(f"**`{name}`**" for name in [*others, last + values])


def setting_groups() -> str:
    """Every setting of training, under the heading of its group."""
    parts = []
    for group, members in itertools.groupby(settings(), lambda setting: setting.group):
        parts += [f"## {group}", "\n".join(map(_setting, members))]
    return "\n\n".join(parts)


def _setting(setting: Setting) -> str:
    parser = parsers()["train"]
    [action] = (a for a in parser._actions if f"--{setting.name}" in a.option_strings)
    facts = [f"Default: {setting.default_text}.", *_range(setting)]
    needs = [text for need in setting.needs if (text := _need(need))]
    if needs:
        facts.append(f"Has an effect only with {' and '.join(dict.fromkeys(needs))}.")
    facts.append(_RESUME[setting.resume])
    if difference := DIFFERENCES.get(setting.name):
        facts.append(f"In other trainers: {difference.trainer} {difference.text}.")
    return f"- {_names(parser, action)}: {plain(f'{setting.help} {chr(32).join(facts)}')}"


def _range(setting: Setting) -> Iterator[str]:
    limits = [
        f"{word} {value:g}"
        for word, value in (
            ("greater than", setting.above),
            ("at least", setting.least),
            ("at most", setting.most),
            ("less than", setting.below),
        )
        if value is not None
    ]
    if limits:
        yield f"Must be {' and '.join(limits)}."
    if setting.choices and setting.is_list:
        yield "Several may be given."


def _need(need: Condition) -> str:
    """Return a setting's condition, as flags; of a function, by its docstring."""
    if isinstance(need, OfModel):  # as its help says
        return ""
    if isinstance(need, AnyOf):
        return " or ".join(filter(None, map(_need, need.needs)))
    if not isinstance(need, Need):
        text = (inspect.getdoc(need) or "").partition("\n")[0].rstrip(".")
        return text[:1].lower() + text[1:]
    if need.values in ((None,), (False,)):
        return f"`--no-{need.setting}`" if need.values[0] is False else f"no `--{need.setting}`"
    words = " or ".join(map(str, need.values))
    return f"`--{need.setting} {words}`" if words else f"`--{need.setting}`"


def python_api() -> str:
    """Every public name, under the headings of the package's docstring, from the docstrings."""
    parts = []
    rows = re.findall(r"^    (\w[\w, ]*?)   *(\S.*)$", dora_diffusion.__doc__ or "", re.MULTILINE)
    for names, heading in rows:
        parts.append(f"## {heading[0].upper()}{heading[1:]}".replace("Torch.", "torch."))
        parts.append(_autodoc(dict.fromkeys(names.split(", "), "dora_diffusion")))
    for package in _PACKAGES:
        names = public_names()
        own = {name: home for name, home in names.items() if home.endswith(f".{package}")}
        parts += [f"## From `dora_diffusion.{package}`", _autodoc(own)]
    parts += ["## What these take and return", _autodoc(_classes_in_signatures())]
    events = importlib.import_module("dora_diffusion.training.events")
    classes = [name for name, value in vars(events).items() if inspect.isclass(value)]
    own = {
        name: home for name in classes if (home := homes_of_names().get(name)) == events.__name__
    }
    return "\n\n".join([*parts, "## What `train` tells as it runs", _autodoc(own)])


@cache
def public_names() -> dict[str, str]:
    """Each public name, with the package that it is imported from."""
    names: dict[str, str] = {}
    for package in [f"dora_diffusion.{name}" for name in _PACKAGES] + ["dora_diffusion"]:
        names |= dict.fromkeys(importlib.import_module(package).__all__, package)
    return names


@cache
def homes_of_names() -> dict[str, str]:
    """Each class and annotated constant of the package, with its module."""
    top = Path(dora_diffusion.__file__).parent
    homes: dict[str, str] = {}
    for path in sorted(top.rglob("*.py")):
        module = ".".join(path.relative_to(top.parent).with_suffix("").parts)
        names = re.findall(
            r"^(?:class )?([A-Z]\w+)(?=[(:])", path.read_text(encoding="utf-8"), re.MULTILINE
        )
        homes |= dict.fromkeys(names, module.removesuffix(".__init__"))
    return homes


def _classes_in_signatures() -> dict[str, str]:
    """Classes of the package that signatures of public names have, and that are not public."""
    found: set[str] = set()
    for name, home in public_names().items():
        value = getattr(importlib.import_module(home), name)
        values = [value]
        if inspect.isclass(value):
            values += [v for n, v in vars(value).items() if inspect.isfunction(v) and n[0] != "_"]
        if inspect.isclass(value) and issubclass(value, Exception):
            continue
        for function in filter(callable, values):
            found |= set(re.findall(r"[A-Z]\w+", str(inspect.signature(function))))
    homes = {name: homes_of_names().get(name, "") for name in sorted(found - {*public_names()})}
    return {n: home for n, home in homes.items() if home and ".numerics." not in home}


def _autodoc(homes: dict[str, str]) -> str:
    """Directives of autodoc, for the kind of thing that each name is."""
    lines = []
    for name, home in homes.items():
        value = getattr(importlib.import_module(home), name)
        kind = "data"
        if inspect.isclass(value):
            kind = "exception" if issubclass(value, Exception) else "class"
        elif callable(value):
            kind = "function"
        else:  # Only where it is assigned is it documented.
            home = homes_of_names()[name]
        # Its signature would have every setting; they have a page of their own.
        signature = "(**settings)" if name == "TrainConfig" else ""
        lines.append(f".. auto{kind}:: {home}.{name}{signature}")
        if kind == "class" and not signature and name in public_names():
            lines.append("   :members:")
    return "```{eval-rst}\n" + "\n".join(lines) + "\n```"


def measures() -> str:
    """The figures of an evaluation, as its results explain them."""
    from dora_diffusion.evaluation.measures import MEASURES

    good = {"higher": "high", "lower": "low", "base": "as the base"}
    rows = (f"| {m.title} | {good[m.better]} | {plain(m.meaning)} |" for m in MEASURES.values())
    return "\n".join(["| figure | good | what it is |", "|---|---|---|", *rows])


def adapter_verdicts() -> str:
    """List the verdicts on adapter files of UNets, a few programs at a time."""
    return _adapter_verdicts(lambda kind: not _is_of_transformers(kind))


def transformer_verdicts() -> str:
    """List the verdicts on adapter files of transformers."""
    return _adapter_verdicts(_is_of_transformers)


def _is_of_transformers(kind: str) -> bool:
    return kind.startswith("diffusion_model ") or " of " in kind


def _adapter_verdicts(has: Callable[[str], bool]) -> str:
    from dora_diffusion.formats.layouts import COLUMNS, VERDICTS

    kinds = {kind: row for kind, row in VERDICTS.items() if has(kind)}
    return "\n\n".join(_verdicts("file", names, kinds) for names in (COLUMNS[:3], COLUMNS[3:]))


def model_verdicts() -> str:
    """List the readings of a merged model by other programs."""
    from dora_diffusion.formats.layouts import MODEL_VERDICTS

    return _verdicts("model", tuple(MODEL_VERDICTS["folder"]), MODEL_VERDICTS)


def _verdicts(head: str, names: Sequence[str], kinds: Mapping[str, Mapping[str, str]]) -> str:
    """A table of programs, with each verdict in short."""
    rows = [[head, *names], ["---"] * (len(names) + 1)]
    rows += [
        [f"`{kind}`", *(row[name].partition(":")[0] for name in names)]
        for kind, row in kinds.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def programs() -> str:
    """List the results of `convert --to` for each program, and its place."""
    from dora_diffusion.formats.layouts import PROGRAMS

    rows = ["| `--to` | its place | output axis | input axis | LoRA |", "|---|---|---|---|---|"]
    for name, program in PROGRAMS.items():
        place = re.sub(r"\w+(?:[/_]\w+)+", r"`\g<0>`", program.place)
        formats = (program.output_axis, program.input_axis, program.lora)
        rows.append(f"| `{name}` | {place} | {' | '.join(f'`{form}`' for form in formats)} |")
    return "\n".join(rows)


def diffusers_flags() -> str:
    """List the command line's answers to flags of Diffusers' scripts that are no settings."""
    parts = []
    statuses = {"renamed": "Renamed", "ignored": "Accepted, and not needed", "absent": "Not here"}
    for status, title in statuses.items():
        parts += [f"### {title}\n", "| flag | here |", "|---|---|"]
        for name, answer in DIFFUSERS_FLAGS.items():
            if answer.status == status:
                parts.append(f"| `--{name}` | {plain(answer.text)} |")
        parts.append("")
    return "\n".join(parts)


def differences(*trainers: str) -> str:
    """List the settings whose name has another meaning in other trainers."""
    rows = ["| setting | what differs |", "|---|---|"]
    for name, (trainer, text, needs, *_) in DIFFERENCES.items():
        only = f" Only with {_need(AnyOf(needs))}." if needs else ""
        if trainer in trainers:
            rows.append(f"| `--{name}` | {trainer} {plain(text)}.{only} |")
    return "\n".join(rows)


def settings_of(*trainers: str) -> str:
    """List the settings of other trainers' files and commands, with the answers to them."""
    parts = []
    for trainer in trainers:
        rows = [f"| {trainer} | here |", "|---|---|"]
        # One row for all names with one answer.
        names: dict[str, list[str]] = {}
        for name, rule in rules(trainer).items():
            names.setdefault(plain(advice(rule)), []).append(f"`{name}`")
        rows += [f"| {', '.join(members)} | {text} |" for text, members in names.items()]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


TEXTS: dict[str, Callable[[], str]] = {
    "adapter-verdicts": adapter_verdicts,
    "commands": commands,
    "differences-diffusers": partial(differences, "Diffusers"),
    "differences-kohya": partial(differences, "sd-scripts"),
    "differences-onetrainer-ai-toolkit": partial(differences, "OneTrainer", "ai-toolkit"),
    "diffusers-flags": diffusers_flags,
    "measures": measures,
    "model-verdicts": model_verdicts,
    "programs": programs,
    "python": python_api,
    "settings": setting_groups,
    "settings-of-kohya": partial(settings_of, "sd-scripts"),
    "settings-of-onetrainer-ai-toolkit": partial(settings_of, "OneTrainer", "ai-toolkit"),
    "transformer-verdicts": transformer_verdicts,
}

if __name__ == "__main__":
    for path in sorted(DOCS.rglob("*.md")):
        source = path.read_text(encoding="utf-8")
        if (text := current(source)) != source:
            path.write_text(text, encoding="utf-8")
            print(f"written: {path}")
