"""The architecture as a test: who may import whom, which part may name a library, how long files and functions may be.

Each test lists everything that is wrong at once.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "lgp_dist"
TREES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
MAX_FILE, MAX_FUNCTION = 400, 60
MAX_PACKAGE = 27_310

BASE = {"config", "errors", "files", "paths", "protocols"}
BUILDING = BASE | {"data", "models", "ops", "recipes", "run"}
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "protocols": set(),
    "config": {"errors"},
    "paths": {"config", "errors"},
    "ops": {"config"},
    "recipes": {"config", "errors"},
    "run": {"config", "errors", "files", "paths"},
    "data": BASE,
    "models": {"config", "errors", "ops", "paths"},
    "tasks": BUILDING,
    "engine": BASE | {"run"},
    "report": {"errors", "files", "paths", "run"},
    "timm_models": {"models", "paths"},
    "export": BASE | {"models", "run", "timm_models"},
    "stages": BUILDING | {"engine", "export", "report", "tasks"},
    "pipeline": BUILDING | {"engine", "report", "stages"},
    "bench": BUILDING | {"engine", "report", "stages", "tasks"},
    "study": BUILDING | {"pipeline", "report", "stages"},
    "commands": BUILDING | {"engine", "export", "pipeline", "report", "stages", "tasks", "timm_models"},
    "api": BASE | {"commands", "engine", "export", "models", "run"},
    "cli": BASE | {"bench", "commands", "data", "engine", "pipeline", "recipes", "report", "run", "stages", "study"},
    "__main__": {"cli"},
    "__init__": set(),
}
"""Part of the package -> parts that it may import; each may import itself."""

ONLY_IN = {
    "accelerate": {"engine"},
    "deepspeed": {"engine"},
    "torch.distributed": {"engine"},
    "webdataset": {"bench"},
    "fsspec": {"data"},
    "aiohttp": {"data"},
    "triton": {"ops"},
    "tyro": {"cli"},
    "matplotlib": {"report"},
}
"""Library -> the parts that may name it."""

NO_TORCH = {"config", "cli", "errors", "files", "paths", "recipes", "report", "study", "__main__", "__init__"}
"""Parts that do not import torch or timm themselves."""

LAZY = {"cli"}
"""Parts whose functions may import, so that `lgp --help` answers at once."""


def part_of(path: Path) -> str:
    """The part of the package a file belongs to: its folder, or its own name at the top."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def check(problems: list[str]) -> None:
    """Fails with all problems, one a line."""
    assert not problems, "\n" + "\n".join(problems)


def test_every_part_has_its_row() -> None:
    assert {part_of(path) for path in TREES} == ALLOWED.keys()
    assert len(ALLOWED) <= 25


def test_imports_stay_within_their_level() -> None:
    problems = []
    for path, tree in TREES.items():
        part = part_of(path)
        for line, name in imports(tree):
            other = name.split(".")[1] if name.startswith("lgp_dist.") else part
            if other != part and other not in ALLOWED[part]:
                problems.append(f"{path}:{line} imports {name}")
            for library, parts in ONLY_IN.items():
                if part not in parts and (name == library or name.startswith(library + ".")):
                    problems.append(f"{path}:{line} names {library}")
            if part in NO_TORCH and name.split(".")[0] in ("torch", "timm", "torchvision"):
                problems.append(f"{path}:{line} imports {name}")
    check(problems)


def test_a_stage_never_imports_a_stage() -> None:
    stages = {path.stem for path in TREES if part_of(path) == "stages"} - {"__init__", "context", "start"}
    check(
        [
            f"{path}:{line} imports {name}"
            for path, tree in TREES.items()
            if part_of(path) == "stages"
            for line, name in imports(tree)
            if name.startswith("lgp_dist.stages.") and name.split(".")[2] in stages
        ]
    )


def test_size_budgets() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in TREES}
    problems = [
        f"{path} has {length} lines, {MAX_FILE} at most" for path, length in lengths.items() if length > MAX_FILE
    ]
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MAX_FUNCTION:
                problems.append(f"{path}:{node.lineno} {node.name} is longer than {MAX_FUNCTION} lines")
    if sum(lengths.values()) >= MAX_PACKAGE:
        problems.append(f"the package has {sum(lengths.values())} lines, fewer than {MAX_PACKAGE} are allowed")
    check(problems)


def test_no_imports_in_functions_and_no_globals() -> None:
    problems = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                problems.append(f"{path}:{node.lineno} changes a global")
            if isinstance(node, ast.FunctionDef) and part_of(path) not in LAZY:
                problems += [f"{path}:{line} imports {name} inside a function" for line, name in imports(node)]
    check(problems)


def test_no_import_cycles() -> None:
    """Modules can be put in an order in which each imports only earlier ones."""
    names = {".".join(("lgp_dist", *path.relative_to(ROOT).with_suffix("").parts)): path for path in TREES}
    needs = {}
    for name, path in names.items():
        wanted = {found for _, found in imports(TREES[path])}
        others = names.keys() - {name}
        needs[name] = {other for other in others if any(w == other or w.startswith(other + ".") for w in wanted)}
    done: set[str] = set()
    while len(done) < len(names):
        ready = {name for name in names if name not in done and needs[name] <= done}
        assert ready, f"import cycle among {sorted(set(names) - done)}"
        done |= ready


def test_public_functions_have_docstrings() -> None:
    problems = []
    for path, tree in TREES.items():
        if path.name != "__init__.py" and not ast.get_docstring(tree):
            problems.append(f"{path} has no docstring")
        for node in tree.body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                problems.append(f"{path}:{node.lineno} {node.name} has no docstring")
    check(problems)


def test_names_stand_once() -> None:
    """A file's name stands twice at most (a task and its stage), not counting its command and its benchmark; a class's
    name stands once."""
    problems, files, classes = [], {}, {}
    for path, tree in TREES.items():
        if path.stem not in ("__init__", "__main__") and part_of(path) not in ("bench", "cli"):
            files.setdefault(path.stem, []).append(path.relative_to(ROOT))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    problems += [f"{name}: {', '.join(map(str, found))}" for name, found in files.items() if len(found) > 2]
    problems += [f"class {name}: {', '.join(found)}" for name, found in classes.items() if len(found) > 1]
    check(problems)
