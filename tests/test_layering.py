"""The architecture as a test: who may import whom, how large files and functions may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lgp_dist"
FILES = sorted(ROOT.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 400, 60

BASE = {"budget", "config", "meaning", "paths", "depths", "spaces", "protocols", "errors", "files"}
SAMPLING = {"dealing", "costs", "sampling", "ledger"}
LEVELS_0_TO_2 = BASE | SAMPLING
LEVELS_0_TO_2 |= {
    "recipes",
    "artifacts",
    "checkpoints",
    "outcome",
    "metrics",
    "provenance",
    "statuses",
    "checks",
    "data",
    "models",
    "baselines",
    "ops",
}
ALLOWED = {
    "budget": {"errors"},
    "config": {"budget", "config_data", "errors"},
    "config_data": set(),
    "meaning": {"config"},
    "errors": set(),
    "files": set(),
    "paths": {"config", "errors"},
    "depths": {"config", "errors", "paths"},
    "spaces": {"config", "depths", "paths"},
    "protocols": set(),
    "provenance": {"files"},
    "statuses": set(),
    "metrics": set(),
    "logs": set(),
    "checks": BASE,
    "machine": set(),
    "doctor": {"config", "errors", "data", "machine"},
    "recipes": BASE,
    "dealing": set(),
    "costs": {"config", "depths", "paths", "spaces", "errors"},
    "sampling": BASE | {"dealing", "costs"},
    "ledger": set(),
    "artifacts": BASE,
    "checkpoints": {"errors", "files"},
    "outcome": {"artifacts", "errors"},
    "data": {"config", "protocols", "errors", "files"},
    "ops": {"config"},
    "models": {"config", "paths", "spaces", "errors", "ops"},
    "baselines": {"config", "depths", "errors", "models"},
    "tasks": LEVELS_0_TO_2,
    "engine": {"config", "meaning", "protocols", "errors", "files", "statuses", "sampling", "metrics", "checkpoints"}
    | {"machine"},
    "report": {"artifacts", "errors", "metrics"},
    "descendants": BASE | {"artifacts", "models", "provenance", "timm_models"},
    "timm_models": {"models", "paths"},
    "stages": LEVELS_0_TO_2 | {"tasks", "engine", "report", "descendants"},
    "pipeline": LEVELS_0_TO_2 | {"logs", "tasks", "engine", "report", "stages"},
    "chosen": BASE | {"artifacts", "checks", "provenance", "descendants", "engine", "models", "report", "stages"},
    "downstream": LEVELS_0_TO_2 | {"tasks", "engine", "stages", "descendants", "timm_models", "pipeline"},
    "bench": LEVELS_0_TO_2 | {"tasks", "engine", "report", "stages"},
    "study": LEVELS_0_TO_2 | {"report", "pipeline"},
    "cli": {"budget", "config", "meaning", "spaces", "errors", "statuses", "outcome", "recipes", "checkpoints", "data"}
    | {"pipeline", "bench", "chosen", "downstream", "study", "report", "engine", "doctor"},
    "__main__": {"cli"},
    "__init__": set(),
}
"""Part of the package -> parts that it may import; each may import itself."""

ONLY_IN = {
    "accelerate": {"engine"},
    "deepspeed": {"engine"},
    "torch.distributed": {"engine"},
    "webdataset": {"data", "bench"},
    "fsspec": {"data"},
    "aiohttp": {"data"},
    "triton": {"ops"},
    "tyro": {"cli"},
    "matplotlib": {"report"},
}
"""Library -> the parts that may name it."""

NO_TORCH = {
    "doctor",
    "machine",
    "checks",
    "metrics",
    "logs",
    "budget",
    "statuses",
    "outcome",
    "config",
    "config_data",
    "meaning",
    "errors",
    "files",
    "paths",
    "depths",
    "spaces",
    "recipes",
    "dealing",
    "costs",
    "sampling",
    "ledger",
    "provenance",
    "study",
    "cli",
    "__main__",
    "__init__",
    "report",
}
"""Parts that do not import torch or timm themselves."""

LAZY = {"cli"}
"""Parts whose functions may import, so that `lgp --help` answers at once."""


def part_of(path: Path) -> str:
    """The part of the package a file belongs to: its folder, or its own name at the top."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(tree: ast.AST) -> list[tuple[ast.stmt, str]]:
    """Every import statement with the full name of what it imports."""
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [(node, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_within_their_level(path: Path) -> None:
    part = part_of(path)
    for node, name in imports(parsed(path)):
        if name.startswith("lgp_dist."):
            other = name.split(".")[1]
            assert other == part or other in ALLOWED[part], f"{path}:{node.lineno} imports {name}"
        for library, parts in ONLY_IN.items():
            if name == library or name.startswith(library + "."):
                assert part in parts, f"{path}:{node.lineno} names {library}"
        if part in NO_TORCH:
            assert name.split(".")[0] not in ("torch", "timm", "torchvision"), f"{path}:{node.lineno} imports {name}"


def test_a_stage_never_imports_a_stage() -> None:
    names = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__", "context"}
    for path in (ROOT / "stages").glob("*.py"):
        for node, name in imports(parsed(path)):
            if name.startswith("lgp_dist.stages."):
                assert name.split(".")[2] not in names, f"{path}:{node.lineno} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_size_budgets(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE, f"{path} is longer than {MAX_FILE} lines"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{path}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_imports_in_functions_and_no_globals(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno} changes a global"
        if isinstance(node, ast.FunctionDef) and part_of(path) not in LAZY:
            for inner, name in imports(node):
                raise AssertionError(f"{path}:{inner.lineno} imports {name} inside a function")


def test_no_import_cycles() -> None:
    """Modules can be put in an order in which each imports only earlier ones."""
    names = {".".join(("lgp_dist", *path.relative_to(ROOT).with_suffix("").parts)): path for path in FILES}
    needs = {}
    for name, path in names.items():
        wanted = {found for _, found in imports(parsed(path))}
        others = names.keys() - {name}
        needs[name] = {other for other in others if any(w == other or w.startswith(other + ".") for w in wanted)}
    done: set[str] = set()
    while len(done) < len(names):
        ready = {name for name in names if name not in done and needs[name] <= done}
        assert ready, f"import cycle among {sorted(set(names) - done)}"
        done |= ready


def test_public_functions_have_docstrings() -> None:
    for path in FILES:
        tree = parsed(path)
        assert path.name == "__init__.py" or ast.get_docstring(tree), f"{path} has no docstring"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name} has no docstring"
