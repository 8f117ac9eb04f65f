"""Load an exported folder as somebody does who has not installed these packages.

A script, run by `export.py` in a fresh interpreter:

    python -I export_check.py FOLDER CELLS.npz EMBEDDING.npy

Both packages are blocked, so every class must come out of the folder. The cells are tokenised and embedded
with the folder's own code and the vectors written out, to be compared by the caller.

Dimensions: N cells, G genes, D width.
"""

import sys
from pathlib import Path

BLOCKED_PACKAGES = ("modeling_scdiva", "tokenization_scdiva")


def embed_without_packages(folder: str, cells_path: Path, embedding_path: Path) -> None:
    """Tokenise and embed cells with nothing but the folder.

    Args:
        folder: Exported folder.
        cells_path: ``.npz`` with ``counts`` (N, G) and ``gene_ids`` (G,).
        embedding_path: ``.npy`` to write, (N, D) float32.

    Raises:
        RuntimeError: If a class does not come from the folder.
    """
    for package in BLOCKED_PACKAGES:
        sys.modules[package] = None  # type: ignore[assignment]  # makes `import package` fail

    import numpy as np
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    loaded = [tokenizer, model]
    # The class that was saved, with its heads: its loading refuses weights that do not fit exactly.
    for auto_class, reference in model.config.auto_map.items():
        if reference.rpartition(".")[2] in model.config.architectures and auto_class != "AutoModel":
            loaded.append(getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True))
    for thing in loaded:
        if not type(thing).__module__.startswith("transformers_modules."):
            msg = (
                f"{type(thing).__name__} came from {type(thing).__module__} and not from the exported folder."
            )
            raise RuntimeError(msg)

    with np.load(cells_path) as cells:
        inputs = tokenizer(cells["counts"], gene_ids=cells["gene_ids"])
    with torch.inference_mode():
        states = model(**inputs).last_hidden_state
    np.save(embedding_path, states[:, 0].float().numpy())


if __name__ == "__main__":
    embed_without_packages(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
