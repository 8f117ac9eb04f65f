"""Write the result tables of the README and of the cards from result files, so that no number is typed.

    python benchmarks/update_tables.py

A page names the files: `<!-- results: A.json B.json -->` ... `<!-- end of results -->`; what stands between
is replaced by the tables of these files in benchmarks/results.
"""

import re
from pathlib import Path

from modeling_scdiva.model_card import result_section

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "model_cards/small.md",
    "model_cards/generator.md",
    "data/SCALING.md",
    "benchmarks/README.md",
)
BLOCK = re.compile(r"(<!-- results:([^>]*?)-->\n).*?(<!-- end of results -->)", re.DOTALL)


def updated(page: str) -> str:
    """Return a page with the tables of the files it names."""

    def tables(found: re.Match[str]) -> str:
        files = [REPOSITORY / "benchmarks" / "results" / name for name in found[2].split()]
        return found[1] + "\n" + "\n\n".join(map(result_section, files)) + "\n\n" + found[3]

    return BLOCK.sub(tables, page)


def main() -> None:
    """Update the pages in place."""
    for name in PAGES:
        path = REPOSITORY / name
        text = path.read_text("utf-8")
        if not BLOCK.search(text):
            msg = f"{name} has no block of results: <!-- results: A.json --> ... <!-- end of results -->"
            raise SystemExit(msg)
        path.write_text(updated(text), "utf-8")
        print(f"updated {name}")


if __name__ == "__main__":
    main()
