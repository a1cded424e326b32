"""Rules on the package: shape, names, libraries, what other systems and devices lack."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator

import dora_diffusion
from dora_diffusion.cli import main as cli
from dora_diffusion.config import Setting, TrainConfig, settings
from dora_diffusion.config.base import _NAMES, BaseModel
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.config.file import read_facts
from dora_diffusion.config.train import features_of, settings_by_name
from tests.portable.windows import GONE, GONE_MODULES
from tools.count import circles, graph
from tools.rules.requirements import OPTIONAL, REQUIRED
from tools.rules.sources import PACKAGE, Repository, Source

LONG = {f"{PACKAGE}/export/checkpoint.py": "export_checkpoint"}
"""Functions of more than 60 lines: what users call with keywords, each documented."""


def functions_fit_on_a_screen(repository: Repository) -> Iterator[str]:
    for source in repository.package:
        kinds = ast.FunctionDef, ast.AsyncFunctionDef
        functions: Iterator[ast.FunctionDef | ast.AsyncFunctionDef] = source.nodes(*kinds)
        for node in functions:
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > 60 and LONG.get(source.path) != node.name:
                message = f"{node.name} has {length} lines; split it, 60 are the most"
                yield source.problem(node, message)


def classes_have_names_of_their_own(repository: Repository) -> Iterator[str]:
    homes: dict[str, str] = {}
    for source in repository.package:
        for node in source.nodes(ast.ClassDef):
            first = homes.setdefault(node.name, source.path)
            if first != source.path:
                yield source.problem(node, f"{first} has a class {node.name} too; rename one")


def imports_make_no_circle(repository: Repository) -> Iterator[str]:
    """Those inside of functions and for type checkers included, unlike import-linter's."""
    nodes = {
        _module_of(source).removeprefix(f"{PACKAGE}."): [*_imports(source)]
        for source in repository.package
    }
    for circle in circles(graph(nodes, PACKAGE)):
        modules = ", ".join(circle)
        yield f"{PACKAGE}:1: {modules} import each other; move what they share below them"


def errors_are_public(repository: Repository) -> Iterator[str]:
    """Whoever calls a public function can name what it raises, or what that derives from."""
    names_and_homes: dict[str, str] = vars(dora_diffusion)["_HOMES"]
    public = {*names_and_homes}
    homes = {f"{PACKAGE}/{home.replace('.', '/')}" for home in names_and_homes.values()}
    files = {source.path.removesuffix("/__init__.py") for source in repository.package}
    rooms = {home if home in files else home.rpartition("/")[0] for home in homes}
    for source in repository.package:
        if source.path.rpartition("/")[0] in rooms:
            for node in source.nodes(ast.ClassDef):
                names = {node.name, *(base.id for base in node.bases if isinstance(base, ast.Name))}
                if node.col_offset == 0 and node.name.endswith("Error") and not names & public:
                    message = f"a public function may raise {node.name}; add it to __init__.pyi"
                    yield source.problem(node, message)


def features_read_what_exists(repository: Repository) -> Iterator[str]:
    """Settings, and properties of a config, which type checkers do not see there."""
    known = {*dir(TrainConfig), *settings_by_name()}
    for source in repository.package:
        if not source.path.startswith(f"{PACKAGE}/config/features/"):
            continue
        for name in dict.fromkeys(re.findall(r"\b(?:config|subject)\.([a-z]\w*)", source.text)):
            if name not in known and f".config.{name}" not in source.text:
                yield f"{source.path}:1: there is no setting {name}; remove what reads it"


def settings_of_training_are_read(repository: Repository) -> Iterator[str]:
    """By their names, besides the command line, the app and the fields themselves."""
    interface = {"app", "commands", "flag_map.py"}
    sources = [s for s in repository.package if not interface & {*s.path.split("/")}]
    text = "".join(source.text for source in sources)
    read = {*re.findall(r"\b(?:config|self|base)(?=\.(\w+))", text)}
    read |= {one.on.setting for one in features_of(TrainConfig)}
    for setting in settings():
        if setting.name not in read:
            yield _problem_of(setting, sources, "nothing reads it; remove it")


def settings_of_commands_are_read(repository: Repository) -> Iterator[str]:
    """In the modules of a command's settings, or at most three imports away."""
    modules = {_module_of(source): source for source in repository.package}
    found = {name: _read_in(source, modules) for name, source in modules.items()}
    # `BaseModel.of_settings` takes those by their names.
    described = {*_NAMES, *(field.name for field in dataclasses.fields(BaseModel))}
    for command in cli.COMMANDS.keys() - {"train", "fleet"}:
        kind = cli.settings_of(command)
        own = [base.__module__ for base in kind.__mro__ if base.__module__ in modules]
        reached = {*own}
        for _ in range(3):
            reached |= {name for module in reached for name in found[module][1]}
        read = described.union(*(found[module][0] for module in reached))
        for setting in kind.settings():
            if setting.name not in read:
                homes = [modules[name] for name in own]
                yield _problem_of(setting, homes, f"{command} does not read it; remove it")


def _problem_of(setting: Setting, homes: Iterable[Source], message: str) -> str:
    """A finding at the field of a setting."""
    for source in homes:
        if field := re.search(rf"^    {setting.name}: ", source.text, re.MULTILINE):
            return source.problem(source.line_of(field.start()), f"{setting.name}: {message}")
    return f"{PACKAGE}:1: {setting.name}: {message}"


def _module_of(source: Source) -> str:
    return source.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _read_in(source: Source, modules: dict[str, Source]) -> tuple[set[str], set[str]]:
    """The attributes that a module reads, and the modules of the package that it imports."""
    read = {n.attr for n in source.nodes(ast.Attribute) if isinstance(n.ctx, ast.Load)}
    names = {
        name
        for n in source.nodes(ast.ImportFrom)
        for name in (n.module or "", *(f"{n.module}.{alias.name}" for alias in n.names))
    }
    return read, names & {*modules}


FAMILY = re.compile(r"sd[-_]?v?[12]|xl|diffusion-v", flags=re.IGNORECASE)
"""A family's name, or a piece of one such as the "xl" in a model's name."""
PREFIXES = ("startswith", "endswith", "removeprefix", "removesuffix", "find")


def families_are_not_told_apart_by_name(repository: Repository) -> Iterator[str]:
    message = "a model family known by its name; ask for a fact of it (config/families.py)"
    for source in repository.package:
        if source.path == f"{PACKAGE}/config/families.py":
            continue
        tests: list[ast.AST] = [*source.nodes(ast.Compare, ast.match_case)]
        for call in source.nodes(ast.Call):
            if isinstance(call.func, ast.Attribute) and call.func.attr in PREFIXES:
                tests.append(call)
        compared = {part for test in tests for part in ast.walk(test)}
        for node, text in source.strings():
            if text in FAMILIES or (node in compared and FAMILY.search(text)):
                yield source.problem(node, message)


TABLES = (
    "unet_top", "unet_resnet", "vae_attention", "vae_resnet", "vae_early", "open_clip_top",
    "open_clip_layer",
)  # fmt: skip
# Canonical names of something else, too; and families are told by the last norm.
AMBIGUOUS = {"proj_out", "text_projection", "ln_final"}


def original_names_are_written_once(repository: Repository) -> Iterator[str]:
    """A second, hand-written direction of a table would have to repeat its names."""
    file = f"{PACKAGE}/formats/names/names.json"
    pairs = [pair for table in TABLES for pair in read_facts("formats/names/names")[table].items()]
    changed = [original for name, original in pairs if name != original]
    names = {name for name in changed if len(name) > 5 and "#" not in name} - AMBIGUOUS
    for name in names:
        if sum(original == name for _, original in pairs) > 1:
            yield f"{file}: {name} is twice in it; one table can have both pairs"
    for source in repository.package:
        for node, text in source.strings():
            if names & {text, text.removesuffix(".weight")}:
                yield source.problem(node, f"{text} is written in {file}; look it up there")


HOLDERS = {"CheckpointFile", "PipelineFolder", "LiveWeights", "WithVae", "MergedModel"}


def holders_of_weights_are_alike(repository: Repository) -> Iterator[str]:
    for source in repository.package:
        for node in source.nodes(ast.Call):
            if getattr(node.func, "id", "") == "isinstance":
                names = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                for name in names & HOLDERS:
                    message = f"asks for {name}; put what differs behind ModelWeights"
                    yield source.problem(node, message)


OF_ONE_VENDOR = {
    f"{PACKAGE}/numerics/devices.py": "the one home: names of each kind, and what each lacks",
    f"{PACKAGE}/numerics/precision.py": "TensorFloat-32, of NVIDIA's GPUs, and its switches",
    f"{PACKAGE}/models/offload.py": "memory that CUDA fetches from by itself",
    f"{PACKAGE}/numerics/norms.py": "a product of bfloat16 in float32, which CUDA has",
    f"{PACKAGE}/adapters/flags.py": "an event to read behind; others read at once",
    f"{PACKAGE}/training/metrics.py": "a fused optimizer that CUDA can hold back",
    f"{PACKAGE}/models/precision.py": "what Apple's GPU needs for bfloat16",
    f"{PACKAGE}/models/memory.py": "a GPU of so much memory: taken to be CUDA",
    f"{PACKAGE}/training/results/record.py": "a switch of cuDNN, which changes bits",
    f"{PACKAGE}/cli/console/environment.py": "an NVIDIA GPU that torch cannot use",
    f"{PACKAGE}/adapters/compiled.py": "what to install so that torch compiles for a device",
    "tools/start_app.py": "which torch to install, before there is one to ask",
    "tools/rules/code.py": "the names that are looked for",
    "tools/rules/project.py": "a compiler that a message may name",
}
"""Files that name what the hardware of one vendor alone has, and why."""
VENDOR = re.compile(r"cuda|cudnn|nvidia|\bmps\b|\bxpu\b|\brocm\b", re.IGNORECASE)


def devices_are_not_named(repository: Repository) -> Iterator[str]:
    """In code and its texts; docstrings may."""
    for source in repository.python(PACKAGE, "tools"):
        documents = {node.value for node in source.nodes(ast.Expr)}
        words: list[tuple[ast.AST, str]] = [(n, n.attr) for n in source.nodes(ast.Attribute)]
        words += [(node, text) for node, text in source.strings() if node not in documents]
        found = [(node, match[0]) for node, word in words for match in VENDOR.finditer(word)]
        if found and source.path not in OF_ONE_VENDOR:
            for node, word in found:
                message = (
                    f"{word} is one vendor's; ask numerics.devices, or state why in {__name__}"
                )
                yield source.problem(node, message)
        elif not found and source.path in OF_ONE_VENDOR:
            yield source.problem(1, f"needs no exception in {__name__}.OF_ONE_VENDOR any more")


TEMPORARY = {
    "gettempdir": (f"{PACKAGE}/system.py",),
    "/tmp": (f"{PACKAGE}/system.py",),
    "mktemp(": (),
}


def temporary_names_are_drawn(repository: Repository) -> Iterator[str]:
    """Others could make a name of the shared temporary folder first."""
    for source in repository.package:
        for word, homes in TEMPORARY.items():
            if word in source.text and source.path not in homes:
                line = source.line_of(source.text.index(word))
                message = f"{word}: others share that folder; use system.private_folder or tempfile"
                yield source.problem(line, message)


HOME = f"{PACKAGE}/system.py"
"""The one module that may have what only POSIX has."""
# On Windows it ends a process, whatever the signal.
GONE_HERE = {"os": (*GONE["os"], "kill"), "signal": GONE["signal"]}
KEYWORDS = ("start_new_session", "preexec_fn", "process_group", "pass_fds")


def windows_has_what_is_used(repository: Repository) -> Iterator[str]:
    for source in repository.python(PACKAGE, ""):
        if source.path != HOME:
            for node, name in _posix_names(source):
                yield source.problem(node, f"Windows has no {name}; put it into {HOME}")


def _posix_names(source: Source) -> Iterator[tuple[ast.AST, str]]:
    for node in source.nodes(ast.Import, ast.ImportFrom, ast.Attribute, ast.keyword, ast.Constant):
        gone: list[str] = []
        match node:
            case ast.Import(names):
                gone = [alias.name for alias in names if alias.name in GONE_MODULES]
            case ast.ImportFrom(module=str(module), names=names):
                names_gone = GONE_HERE.get(module, ())
                gone = [alias.name for alias in names if alias.name in names_gone]
                gone += [module] if module in GONE_MODULES else []
            case ast.Attribute(value=ast.Name(id=module), attr=name):
                gone = [f"{module}.{name}"] if name in GONE_HERE.get(module, ()) else []
            case ast.keyword(arg=str(name)) if name in KEYWORDS:
                gone = [name]
            case ast.Constant(value=str(text)) if (
                text.startswith("/proc") or text in GONE["signal"] or text in KEYWORDS
            ):
                gone = [text]
        for name in gone:
            yield node, name


def text_has_an_encoding(repository: Repository) -> Iterator[str]:
    for source in repository.python():
        for node in source.nodes(ast.Call):
            names = {keyword.arg for keyword in node.keywords}
            if not names & {"encoding", None} and _is_text(node, names):
                yield source.problem(node, 'give encoding="utf-8"; Windows has another default')


def _is_text(call: ast.Call, keywords: set[str | None]) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    is_method = isinstance(call.func, ast.Attribute)
    match name:
        case "read_text" | "write_text":
            return len(call.args) < {"read_text": 1, "write_text": 2}[name]
        case "run" | "Popen" | "check_output":
            return bool(keywords & {"text", "universal_newlines"})
        case "open" | "fdopen" if not is_method or name == "fdopen":
            return "b" not in (_mode(call, 1) or "r")
        case "open":  # of a path, where its mode tells it from others of this name
            mode = _mode(call, 0)
            return mode is not None and set(mode) <= set("rwaxt+")
        case "NamedTemporaryFile" | "TemporaryFile" | "SpooledTemporaryFile":
            return "b" not in (_mode(call, int(name.startswith("Spooled"))) or "b")
    return False


def _mode(call: ast.Call, place: int) -> str | None:
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    given += call.args[place : place + 1]
    value = given[0].value if given and isinstance(given[0], ast.Constant) else None
    return value if isinstance(value, str) else None


BROUGHT_ALONG = {
    "fastapi", "grpc", "httpx", "jinja2", "packaging", "prometheus_client", "pydantic", "starlette",
    "tokenizers", "typing_extensions", "uvicorn",
}  # fmt: skip
"""Libraries that come with the requirements; where one does not, versions are not compared."""


def imports_are_requirements(repository: Repository) -> Iterator[str]:
    """A library that may be absent is imported inside of the function that needs it."""
    known = {*REQUIRED, *OPTIONAL, *BROUGHT_ALONG, *sys.stdlib_module_names, PACKAGE}
    for source in repository.package:
        for node in _imports(source):
            for name in _libraries(node) - known:
                yield source.problem(
                    node, f"pyproject.toml requires no {name}; add it, or an extra"
                )
            for name in _libraries(node) & (OPTIONAL - REQUIRED):
                if node in source.tree.body:
                    message = f"{name} may be absent; import it inside of the function"
                    yield source.problem(node, message)


def _imports(source: Source) -> Iterator[ast.Import | ast.ImportFrom]:
    return source.nodes(ast.Import, ast.ImportFrom)


def _libraries(node: ast.Import | ast.ImportFrom) -> set[str]:
    if isinstance(node, ast.Import):
        names = {alias.name for alias in node.names}
    else:
        names = {node.module} if node.module and not node.level else set()
    return {name.partition(".")[0] for name in names}


def docstrings_begin_with_a_verb_or_a_noun(repository: Repository) -> Iterator[str]:
    """Those of modules, classes, functions and values: not with what begins a clause."""
    clause = r"How|Let|See that|That|What|Whether|When|Where|Which|Who|Why"
    begin = re.compile(rf'^ *"""((?:{clause})\b.*)', re.MULTILINE)
    for source in repository.python():
        for match in begin.finditer(source.text):
            message = f"{match[1]!r}: begin with a verb or a noun phrase"
            yield source.problem(source.line_of(match.start()), message)
