"""What pages of the site are made of: the parser's, the settings' and the package's own texts.

A page asks for a text with a block of one line, ``{generated}`` and its name (`TEXTS`);
``docs/conf.py`` puts it there when the site is built, so that no page repeats what the code says.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import dora_diffusion
from dora_diffusion import cli
from dora_diffusion.config import Setting, settings
from dora_diffusion.config.fields import AnyOf, Condition, Need
from dora_diffusion.config.flag_map import DIFFUSERS_FLAGS

_GENERATED = re.compile(r"^```\{generated\} ([a-z-]+)\n```$", re.MULTILINE)
_PACKAGES = ("config", "export", "analysis")
"""Of the package, those that say themselves which of their names are public."""
_RESUME = {
    "same": "Resuming: must be the same.",
    "free": "Resuming: may change.",
    "ignored": "Resuming: not compared.",
}


def expanded(source: str) -> str:
    """A page with the texts that it asks for."""
    return _GENERATED.sub(lambda block: TEXTS[block[1]](), source)


def plain(text: str) -> str:
    """Markdown of a text that has none: flags as code, all else as it is written."""
    parts = re.split(r"((?<![\w-])--[a-z][\w-]*|`[^`]+`)", text)
    escaped = (re.sub(r"([\\`*_{}\[\]<>|#$~])", r"\\\1", part) for part in parts[::2])
    codes = (f"`{part.strip('`')}`" for part in parts[1::2])
    return "".join(x + y for x, y in itertools.zip_longest(escaped, codes, fillvalue=""))


@cache
def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, with all its flags."""
    [commands] = (
        action
        for action in cli.build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(commands.choices)


def commands() -> str:
    """Every command with what it takes; of `train`, what is no setting."""
    return "\n\n".join(_command(name, parser) for name, parser in parsers().items())


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    known = {setting.name for setting in settings()} if name == "train" else set()
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    own = [action for action in shown if action.dest not in {*known, "help", "help_all", "debug"}]
    required = [a for a in own if a.required and a.option_strings]
    words = [a.metavar or a.dest.upper() for a in own if not a.option_strings]
    usage = " ".join([parser.prog, *map(str, words), *(_invocation(a) for a in required)])
    parts = [f"## {name}", plain(parser.description or ""), f"```console\n{usage}\n```"]
    if known:
        parts.append("And a flag for each setting: [Settings](settings.md).")
    parts.append(f"```{{program}} {parser.prog}\n```")
    return "\n\n".join([*parts, *(_argument(parser, action) for action in own)])


def _invocation(action: argparse.Action) -> str:
    """``--flag VALUE``, as usage lines have it."""
    return f"{action.option_strings[-1]} {action.metavar or action.dest.upper()}"


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    names = formatter._format_action_invocation(action).replace(", ", ",, ").split(",, ")
    text = formatter._expand_help(action)
    if action.choices is not None and action.metavar:
        text += f" One of: {', '.join(map(str, action.choices))}."
    return _option(names, plain(text))


def _option(names: list[str], text: str) -> str:
    return f"````{{option}} {', '.join(names)}\n\n{text}\n````"


def setting_groups() -> str:
    """Every setting of training, under the heading of its group."""
    parts = ["```{program} dora-diffusion train\n```"]
    for group, members in itertools.groupby(settings(), lambda setting: setting.group):
        parts += [f"## {group}", *(_setting(setting) for setting in members)]
    return "\n\n".join(parts)


def _setting(setting: Setting) -> str:
    parser = parsers()["train"]
    [action] = (a for a in parser._actions if f"--{setting.name}" in a.option_strings)
    names = parser._get_formatter()._format_action_invocation(action)
    facts = [f"Default: {setting.default_text}.", *_range(setting)]
    needs = [text for need in setting.needs if (text := _need(need))]
    if needs:
        facts.append(f"Has an effect only with {' and '.join(dict.fromkeys(needs))}.")
    facts.append(_RESUME[setting.resume])
    return _option(names.split(", "), f"{plain(setting.help)}\n\n{plain(' '.join(facts))}")


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
    """What a setting needs, as flags; what a function decides, by its docstring."""
    if isinstance(need, AnyOf):
        return " or ".join(filter(None, map(_need, need.needs)))
    if not isinstance(need, Need):
        return (inspect.getdoc(need) or "").partition("\n")[0].rstrip(".")
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


def diffusers_flags() -> str:
    """What the command line answers to flags of Diffusers' scripts that are no settings."""
    parts = []
    statuses = {"renamed": "Renamed", "ignored": "Accepted, and not needed", "absent": "Not here"}
    for status, title in statuses.items():
        parts += [f"### {title}\n", "| flag | here |", "|---|---|"]
        for name, answer in DIFFUSERS_FLAGS.items():
            if answer.status == status:
                parts.append(f"| `--{name}` | {plain(answer.text)} |")
        parts.append("")
    return "\n".join(parts)


TEXTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "diffusers-flags": diffusers_flags,
    "measures": measures,
    "settings": setting_groups,
    "python": python_api,
}
