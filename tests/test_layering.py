"""Arrows only point down: who may import whom, and what quick commands must not import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up. Modules may import their own package and what stands before it; `solve` and `pareto` nothing else.
ORDER = (
    *(
        "errors",
        "files",
        "quiet",
        "stopping",
        "claims",
        "storages",
        "units",
        "tasks",
        "kinds",
        "follow",
        "trace",
        "ties",
        "policy",
        "space",
        "legal",
        "quantize",
        "budget",
    ),
    *("pricing", "trials", "quality", "solve", "pareto", "sensitivity", "assignment", "objective"),
    *("shortlist", "strategies"),
    *(
        "recover",
        "plan",
        "backends",
        "rundir",
        "starts",
        "job",
        "front",
        "history",
        "planning",
        "preparation",
        "headway",
        "progress",
        "events",
        "workers",
        "run",
        "figures",
        "pages",
        "portrait",
        "tracking",
    ),
    *(
        "answers",
        "terminal",
        "deliver",
        "report",
        "comparison",
        "merging",
        "status",
        "config",
        "planned_task",
        "hardware",
        "profile_command",
        "sweep",
        "slurm",
        "resolve",
        "api",
        "app",
        "commands",
    ),
    "cli",
    "__main__",
)
ALONE = ("solve", "pareto")
HEAVY = (
    *("torch", "mlflow", "matplotlib", "plotly", "optuna", "hydra"),
    *("onnx", "onnxruntime", "torchao", "transformers", "sklearn", "pandas"),
)

MODULES = sorted(path.relative_to(ROOT) for folder in ("search", "hwmodels") for path in (ROOT / folder).rglob("*.py"))


def imports(module: Path) -> set[str]:
    """Every absolute module name that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def place(module: str) -> str:
    """The entry of `ORDER` that a name such as `search.quality.evaluate.Evaluator` belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("module", [m for m in MODULES if m.parts[0] == "search" and len(m.parts) > 1], ids=str)
def test_arrows_point_down(module: Path) -> None:
    own = module.parts[1].removesuffix(".py")
    if own == "__init__":
        return  # the package's own front door may lead anywhere
    assert own in ORDER, f"say in ORDER where {module} stands"
    for imported in imports(module):
        if imported.startswith("search."):
            other = place(imported)
            assert other in ORDER, f"{module} imports {imported}"
            allowed = other == own or (own not in ALONE and ORDER.index(other) < ORDER.index(own))
            assert allowed, f"{module} imports {imported}, which stands above it"
        if own in ALONE:
            assert not imported.startswith("hwmodels"), f"{module} imports {imported}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.parts[0] == "hwmodels"], ids=str)
def test_hwmodels_stands_alone(module: Path) -> None:
    barred = ("search",) if "measure" in module.parts else ("search", "torch")  # which alone times a runtime's kernels
    for imported in imports(module):
        assert imported.split(".")[0] not in barred, f"{module} imports {imported}"


def loaded(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement."""
    code = f"import sys\n{statement}\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(found.stdout.split())


@pytest.mark.parametrize("statement", ["import hwmodels", "import hwmodels; hwmodels.load_device('zen5')"])
def test_hwmodels_needs_no_torch(statement: str) -> None:
    assert not loaded(statement) & {"torch", "search", "scipy", "pandas"}


HELP = """
from search.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
"""


@pytest.mark.parametrize("statement", ["import search", "import search.cli", HELP, "import search.__main__"])
def test_help_is_quick(statement: str) -> None:
    assert not loaded(statement) & set(HEAVY)


def test_the_check_itself_sees_imports() -> None:
    assert "search.errors.DataError" in imports(Path("search/files.py"))
    assert "torch" in imports(Path("search/trace.py"))
    assert "torch" in loaded("import search.trace")
