"""Write the result tables of the README from result files, so that no number in it is typed.

    python benchmarks/update_readme.py

The README names the files: `<!-- results: A.json B.json -->` ... `<!-- end of results -->`; what stands
between is replaced by the tables of these files in benchmarks/results.
"""

import re
from pathlib import Path

from modeling_scdiva.model_card import result_section

REPOSITORY = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- results:([^>]*?)-->\n).*?(<!-- end of results -->)", re.DOTALL)


def updated(readme: str) -> str:
    """Return the README with the tables of the files it names."""

    def tables(found: re.Match[str]) -> str:
        files = [REPOSITORY / "benchmarks" / "results" / name for name in found[2].split()]
        return found[1] + "\n" + "\n\n".join(map(result_section, files)) + "\n\n" + found[3]

    return BLOCK.sub(tables, readme)


def main() -> None:
    """Update the README in place."""
    path = REPOSITORY / "README.md"
    if not BLOCK.search(path.read_text("utf-8")):
        msg = f"{path.name} has no block of results: <!-- results: A.json --> ... <!-- end of results -->"
        raise SystemExit(msg)
    path.write_text(updated(path.read_text("utf-8")), "utf-8")
    print(f"updated {path.name}")


if __name__ == "__main__":
    main()
