"""Numbers of README and cards are those of the result files they name; the file map is complete.

Run: pytest tests/test_readme.py
"""

import re
import runpy
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text("utf-8")


def test_numbers_come_from_result_files():
    script = runpy.run_path(str(REPOSITORY / "benchmarks" / "update_tables.py"))
    for name in script["PAGES"]:
        page = (REPOSITORY / name).read_text("utf-8")
        assert script["BLOCK"].search(page), name
        assert script["updated"](page) == page, f"{name}: run python benchmarks/update_tables.py"


def test_every_module_is_in_the_file_map():
    modules = [
        path.name
        for package in ("tokenization_scdiva", "modeling_scdiva")
        for path in (REPOSITORY / package).rglob("*.py")
        if path.name != "__init__.py"
    ]
    missing = [name for name in modules if not re.search(rf"`(\w+/)?{re.escape(name)}`", README)]
    assert not missing
