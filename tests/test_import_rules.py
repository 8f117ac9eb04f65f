"""Who may import whom: files that travel to the Hub, files that stay, and the arrow between the two packages.

Static; imports neither package. Needs no data. Run: pytest tests/test_import_rules.py
"""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

ROOT = Path(__file__).parents[1]
MODELING, TOKENIZATION = "modeling_scdiva", "tokenization_scdiva"
FILES = sorted(path for package in (MODELING, TOKENIZATION) for path in (ROOT / package).rglob("*.py"))
TRAVELLING = [path for path in FILES if path.name.endswith("_scdiva.py")]
AT_HOME = [path for path in FILES if path not in TRAVELLING]
# What somebody who loads a checkpoint with trust_remote_code has for certain.
EVERYWHERE = sys.stdlib_module_names | {"numpy", "torch", "transformers", "huggingface_hub"}


def named(path):
    return str(path.relative_to(ROOT))


def imports(tree):
    """Yield (statement, full module name, is guarded by ``try: ... except ImportError``)."""
    guarded = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(catches_import_error(handler) for handler in node.handlers):
            guarded |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name, id(node) in guarded
        elif isinstance(node, ast.ImportFrom):
            yield node, "." * node.level + (node.module or ""), id(node) in guarded


def catches_import_error(handler):
    return isinstance(handler.type, ast.Name) and handler.type.id in ("ImportError", "ModuleNotFoundError")


def travelling_faults(source, siblings):
    """List what would keep a travelling file from loading elsewhere.

    ``siblings``: names of the travelling modules of its package.
    """
    faults = []
    tree = ast.parse(source)
    relative = set()
    for node, module, is_guarded in imports(tree):
        if module == ".":
            faults.append(f"line {node.lineno}: `from . import`: the loader does not see it")
        elif module.startswith("."):
            relative.add(module.removeprefix("."))
            if module.removeprefix(".") not in siblings:
                faults.append(f"line {node.lineno}: `{module}` is no travelling file of its package")
        elif module.split(".")[0] in (MODELING, TOKENIZATION):
            faults.append(f"line {node.lineno}: `{module}`: the package's own name is unknown elsewhere")
        elif module.split(".")[0] not in EVERYWHERE and not is_guarded:
            faults.append(
                f"line {node.lineno}: `{module}` may be missing; put it into try/except ImportError"
            )
        elif module == "__future__":
            faults.append(f"line {node.lineno}: `__future__` turns config_class into text")
    # The loader looks for relative imports with this pattern, in docstrings too.
    pattern = r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)"
    seen = {first or second for first, second in re.findall(pattern, source, flags=re.MULTILINE)}
    faults += [f"text that the loader takes for an import: .{name}" for name in seen - relative]
    return faults


def siblings_of(path):
    return {other.stem for other in TRAVELLING if other.parent == path.parent}


def test_there_are_files():
    assert {"configuration_scdiva.py", "modeling_scdiva.py"} <= {path.name for path in TRAVELLING}
    assert {"tokenization_scdiva.py", "vocabulary_scdiva.py"} <= {path.name for path in TRAVELLING}
    assert len(AT_HOME) > 5


@pytest.mark.parametrize("path", TRAVELLING, ids=named)
def test_travelling_file_imports_what_is_everywhere(path):
    assert path.parent.parent == ROOT, "a travelling file lies directly in its package"
    assert travelling_faults(path.read_text("utf-8"), siblings_of(path)) == []


@pytest.mark.parametrize("path", TRAVELLING, ids=named)
def test_the_loader_of_transformers_agrees(path):
    assert set(get_imports(path)) <= EVERYWHERE
    assert set(get_relative_imports(path)) <= siblings_of(path)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from . import other_scdiva", "does not see it"),
        ("from .folder.other_scdiva import name", "no travelling file"),
        ("from .files import name", "no travelling file"),
        ("from ..other_scdiva import name", "no travelling file"),
        ("from modeling_scdiva.other_scdiva import name", "unknown elsewhere"),
        ("def f():\n    import tokenization_scdiva", "unknown elsewhere"),
        ("import anndata", "may be missing"),
        ("def f():\n    from scipy.sparse import csr_matrix", "may be missing"),
        ("try:\n    import anndata\nexcept ValueError:\n    pass", "may be missing"),
        ("try:\n    pass\nexcept ImportError:\n    import anndata", "may be missing"),
        ("if TYPE_CHECKING:\n    import anndata", "may be missing"),
        ("from __future__ import annotations", "config_class"),
        ('"""Docs.\n\nfrom .other import name\n"""', "takes for an import: .other"),
    ],
)
def test_faults_are_found(source, fault):
    found = travelling_faults(source, {"other_scdiva"})
    assert len(found) == 1
    assert fault in found[0]


def test_what_is_allowed_passes():
    source = (
        '"""Docs of `from .other_scdiva`."""\nimport json\nimport numpy as np\nfrom torch import nn\n'
        "from huggingface_hub.dataclasses import strict\nfrom .other_scdiva import (\n    name,\n)\n"
        "def f():\n    try:\n        import anndata\n        from scipy.sparse import csr_matrix\n"
        "    except ImportError as error:\n        raise ImportError from error\n"
    )
    assert travelling_faults(source, {"other_scdiva"}) == []


@pytest.mark.parametrize("path", AT_HOME, ids=named)
def test_home_file_uses_full_names(path):
    relative = [
        node.lineno for node, module, _ in imports(ast.parse(path.read_text("utf-8"))) if module[0] == "."
    ]
    assert relative == []


@pytest.mark.parametrize("path", FILES, ids=named)
def test_arrow_points_from_tokenization_to_modeling(path):
    if path.parent.name == TOKENIZATION:
        return
    tree = ast.parse(path.read_text("utf-8"))
    found = [node for node, module, _ in imports(tree) if module.split(".")[0] == TOKENIZATION]
    if (
        path == ROOT / MODELING / "__init__.py"
    ):  # the one exception, so that either import registers everything
        last = tree.body[-1]
        assert len(found) == 1
        assert any(inner is found[0] for inner in ast.walk(last)), "the import must be the last statement"
        assert isinstance(found[0], ast.Import)
        return
    assert [node.lineno for node in found] == []


@pytest.mark.parametrize("path", FILES, ids=named)
def test_scripts_and_tests_are_never_imported(path):
    scripts = {"data", "examples", "tests", "benchmarks", "model_cards"}
    modules = {module.split(".")[0] for _, module, _ in imports(ast.parse(path.read_text("utf-8")))}
    assert modules & scripts == set()


def test_travelling_names_are_unique():
    # In an exported folder they lie side by side, whatever package they are from.
    repeated = [name for name, times in Counter(path.name for path in TRAVELLING).items() if times > 1]
    assert repeated == []


def test_auto_map_names_classes_that_exist():
    tree = ast.parse((ROOT / MODELING / "configuration_scdiva.py").read_text("utf-8"))
    tables = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "AUTO_MAP"
    ]
    assert len(tables) == 1
    assert {"AutoConfig", "AutoModel", "AutoModelForMaskedLM"} <= set(tables[0])
    for reference in tables[0].values():
        module, name = reference.split(".")
        classes = [
            node.name
            for node in ast.parse((ROOT / MODELING / f"{module}.py").read_text("utf-8")).body
            if isinstance(node, ast.ClassDef)
        ]
        assert name in classes
