"""Rules on strings that name a setting: type checkers do not see there that it has left."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any

from dora_diffusion.cli import main as cli
from dora_diffusion.config import TrainConfig, flag_map, presets, settings
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.config.fields import Setting
from dora_diffusion.config.file import read_facts
from dora_diffusion.config.train import features_of
from tools.rules.sources import PACKAGE, ROOT, Repository, Source

POSITIONS = {
    "ConfigError": 1, "Excluded": 2, "Need": 0, "OfModel": 0, "default": 0, "require": 2, "uses": 0,
}  # fmt: skip
"""Calls that take the name of a setting, with the position of the argument."""
MAPPINGS = {"LABELS", "SETTINGS", "advanced", "current", "form", "settings"}
"""Mappings by such names."""
OTHERS = {
    "_class_name", "budget", "context_fn", "memory", "name", "originals", "plain_copies", "prior",
    "projection_seed",
}  # fmt: skip
"""Names there that are no settings, but arguments of functions, and keys of other mappings."""
TABLES = {
    "LABELS", "SHARED", "_ALIKE", "_LOADED", "_NOT_ADVANCED", "_SAME", "_SLIDER", "_SWITCHES",
    "advanced",
}  # fmt: skip
"""Tables of such names, or with such keys."""
TEXTS = ("flags", "elsewhere", "kohya", "trainers", "families")
"""Files of texts with flags."""
OTHER_FLAGS = {
    "allowed_host", "config", "config_file", "debug", "drift", "dry_run",
    "fsdp_activation_checkpointing", "fsdp_offload_params", "fsdp_reshard_after_forward",
    "fsdp_version", "head", "help", "help-all", "install", "mask", "memory", "num_processes",
    "preset", "prodigy_", "use_deepspeed", "use_fsdp", "version",
}  # fmt: skip
"""Flags that are no setting, those of other programs, and beginnings of flags."""
OTHER_WORDS = {
    "10_sks", "1_dog", PACKAGE, "load_image", "to_k", "v_pred", "weight_name",
}  # fmt: skip
"""Names of folders and tensors, and of what other libraries have."""
OF_FILES = {"formats", "numerics"}
"""Rooms whose texts name what is in files, or in torch."""
PIECES = f"{PACKAGE}/studio/app/pieces.html"
"""Templates of the app."""
FLAG = re.compile(r"(?<![\w-])--(?:no-)?([a-z]\w\w+(?:-[a-z]+)*)")
WORD = re.compile(r"(?<![\w./-])([a-z0-9]+(?:_[a-z0-9]+)+)\b(?![./(])")


@cache
def _all_settings() -> Sequence[Setting]:
    """All settings, those of commands among them."""
    commands = (cli.settings_of(name).settings() for name in cli.COMMANDS if name != "train")
    return (*settings(), *chain.from_iterable(commands))


@cache
def _known() -> frozenset[str]:
    return frozenset(setting.name for setting in _all_settings())


def calls_name_settings_that_exist(repository: Repository) -> Iterator[str]:
    for source in repository.package:
        for node, name in _names_in(source):
            if name.isidentifier() and name not in _known() | OTHERS:
                yield source.problem(node, f"there is no setting {name}; remove what names it")


def _names_in(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Names of settings in calls and mappings."""
    for node in source.nodes(ast.Call, ast.Subscript, ast.Assign, ast.AnnAssign):
        for argument in _arguments(node):
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument, argument.value


def _arguments(node: ast.AST) -> Iterable[ast.AST | None]:
    match node:
        case ast.Assign(targets=[target], value=table) | ast.AnnAssign(target=target, value=table):
            if _name_of(target) in TABLES and table:
                return table.keys if isinstance(table, ast.Dict) else ast.walk(table)
        case ast.Subscript(value=mapping, slice=key) if _name_of(mapping) in MAPPINGS:
            return [key]
        case ast.Call(func=function, args=args) if _name_of(function) in POSITIONS:
            named = [keyword.value for keyword in node.keywords if keyword.arg == "setting"]
            return [*args[POSITIONS[_name_of(function)] :][:1], *named]
        case ast.Call(func=ast.Attribute(value=mapping, attr="get" | "pop"), args=[key, *_]):
            return [key] if _name_of(mapping) in MAPPINGS else []
    return []


def _name_of(node: ast.expr) -> str:
    return str(getattr(node, "id", getattr(node, "attr", "")))


def texts_name_settings_that_exist(repository: Repository) -> Iterator[str]:
    """With dashes, or as a word with an underscore that no code has."""
    choices = (setting.choices or () for setting in _all_settings())
    others = {*OTHER_FLAGS, *OTHER_WORDS, *read_facts("config/kohya")}
    words = {*_known(), *others, *chain.from_iterable(choices)}
    for source in repository.package:
        words.update(_identifiers(source))
    for source in repository.package:
        documents = {node.value for node in source.nodes(ast.Expr)}
        for node, text in source.strings():
            if node not in documents:
                flags = {*FLAG.findall(text)} - _known() - OTHER_FLAGS
                is_text = " " in text and source.path.split("/")[1] not in OF_FILES
                named = {*WORD.findall(text)} - words if is_text else set()
                for name in sorted(flags | named):
                    yield source.problem(node, f"there is no setting {name}; change the text")
    for file in TEXTS:
        flags = {*FLAG.findall(json.dumps(read_facts(f"config/{file}")))} - _known() - OTHER_FLAGS
        for name in sorted(flags):
            yield f"{PACKAGE}/config/{file}.json:1: there is no setting {name}; change the text"


def _identifiers(source: Source) -> Iterator[str]:
    kinds = ast.Name, ast.Attribute, ast.arg, ast.keyword, ast.FunctionDef, ast.alias
    nodes: Iterator[Any] = source.nodes(*kinds)
    for node in nodes:
        names = (getattr(node, field, None) for field in ("id", "attr", "arg", "name"))
        yield from filter(None, names)


def tables_name_settings_that_exist(repository: Repository) -> Iterator[str]:
    for file, names in _tables().items():
        for name in sorted({*names} - _known()):
            yield f"{PACKAGE}/{file}:1: there is no setting {name}; remove it"


def _tables() -> dict[str, Iterable[str]]:
    """Names of settings, by the file that has them."""
    own, features = presets.PRESETS.values(), features_of(TrainConfig)
    families, differences = FAMILIES.values(), flag_map.DIFFERENCES.values()
    rules = chain(*(flag_map.rules(trainer).values() for trainer in flag_map.trainers()))
    texts = chain(*(rule if isinstance(rule, dict) else [rule] for rule in rules))
    return {
        "config/features": chain(
            (row.setting for one in features for row in one.excludes if row.setting),
            *(chain([one.on.setting], one.adds) for one in features),
        ),
        "config/presets.py": chain(
            presets.EMBEDDED, *(chain(one.settings, one.released, one.embedded) for one in own)
        ),
        "config/families.json": chain(
            (key.partition("=")[0] for one in families for key in one.refused),
            *(chain(one.without_effect, one.defaults, one.distilled) for one in families),
        ),
        "config/flags.json": flag_map.OTHER_NAMES.values(),
        "config/trainers.json": filter(
            str.isidentifier, (str(text).removeprefix("-") for text in texts)
        ),
        "studio/app/pieces.html": re.findall(
            r"settings\.get\('(\w+)'", (ROOT / PIECES).read_text(encoding="utf-8")
        ),
        "config/elsewhere.json": chain(
            flag_map.DIFFERENCES, (need.setting for one in differences for need in one.needs)
        ),
    }
