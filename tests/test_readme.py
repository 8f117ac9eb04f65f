"""The README's numbers are those of the result files it names, and its file map is complete.

Run: pytest tests/test_readme.py
"""

import re
import runpy
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text("utf-8")


def test_numbers_come_from_result_files():
    script = runpy.run_path(str(REPOSITORY / "benchmarks" / "update_readme.py"))
    assert script["BLOCK"].search(README)
    assert script["updated"](README) == README, "run: python benchmarks/update_readme.py"


def test_every_module_is_in_the_file_map():
    modules = [
        path.name
        for package in ("tokenization_scdiva", "modeling_scdiva")
        for path in (REPOSITORY / package).rglob("*.py")
        if path.name != "__init__.py"
    ]
    missing = [name for name in modules if not re.search(rf"`(\w+/)?{re.escape(name)}`", README)]
    assert not missing
