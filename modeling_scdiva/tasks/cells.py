"""Cells on their way into a task: tokenised once, kept flat, laid out as batches of any rows.

Notable choices:
- The tokenizer comes as an argument and is known here by a `Protocol` only.
- Cells stay ragged in memory and are padded to the longest of a batch, so a task may ask for any rows in any
  order at a few bytes per gene.
- A tokenizer of another vocabulary is refused: the tokens would be other genes, and nothing would show it.

Dimensions: N cells in a file, B cells in a loader batch, S positions, T gene tokens of all cells.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from scipy.sparse import csr_matrix
from transformers import PreTrainedModel

# Cells tokenised at once, roughly: enough for batches of nearly equal length, few enough for any memory.
BLOCK_SIZE = 1024
# Columns or labels that an error lists before it stops.
N_LISTED = 12


class CellTokenizer(Protocol):
    """What is needed of a tokenizer; `ScDivaTokenizer` has it."""

    vocabulary: Any  # with gene_ids, gene_symbols and a content_hash
    max_genes: int
    target_sum: float
    gene_order: str
    lat_token_id: int
    pad_token_id: int

    @property
    def ranking_weights(self) -> np.ndarray:
        """(V,) weights H_g + eps."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens V, specials included."""

    def iter_cells(
        self, adata: Any, *, max_genes: int | None, block_size: int, **kwargs: Any
    ) -> Iterator[Any]:
        """Tokenize an AnnData block by block, in the order of its cells."""

    def match_genes(self, adata: Any, *, gene_id_key: str | None = None, **kwargs: Any) -> Any:
        """Match the columns of an AnnData with the vocabulary; ``token_ids`` (G,), -1 where unused."""

    def decode_anndata(self, encoding: Any, *, obs_names: Any = None, library_size: Any = None) -> Any:
        """Go back from tokens to an AnnData of expression values and counts."""

    def pad_cells(self, cells: Any, *, return_tensors: str) -> Mapping[str, torch.Tensor]:
        """Lay the cells of one block out as model inputs."""


@dataclass(frozen=True)
class TokenizedCells:
    """Ranked and cut cells in flat arrays; cell ``i`` owns the entries ``offsets[i]:offsets[i + 1]``.

    Attributes:
        offsets: (N + 1,) int64.
        token_ids: (T,) int64 gene tokens in ranking order.
        values: (T,) float32 log1p of normalised counts.
        lat_token_id: Token put in front of each cell.
        pad_token_id: Token behind the shorter ones.
        library_size: (N,) float64 molecules per cell over all genes of the file; None for log1p values.
    """

    offsets: np.ndarray
    token_ids: np.ndarray
    values: np.ndarray
    lat_token_id: int
    pad_token_id: int
    library_size: np.ndarray | None = None

    @property
    def n_cells(self) -> int:
        """Number of cells N."""
        return len(self.offsets) - 1

    @property
    def n_genes(self) -> np.ndarray:
        """(N,) gene tokens of each cell."""
        return np.diff(self.offsets)

    def cut(self, max_genes: int) -> "TokenizedCells":
        """Keep the first genes of each cell.

        Args:
            max_genes: Genes kept, at least 1.

        Returns:
            All cells.

        Raises:
            ValueError: If none would be kept.
        """
        if max_genes < 1:
            msg = f"max_genes must be at least 1, got {max_genes}."
            raise ValueError(msg)
        lengths = self.n_genes
        places = np.arange(lengths.sum()) - np.repeat(self.offsets[:-1], lengths)
        is_kept = places < max_genes
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.minimum(lengths, max_genes))])
        return replace(self, offsets=offsets, token_ids=self.token_ids[is_kept], values=self.values[is_kept])

    def batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Lay some cells out as model inputs.

        Args:
            rows: (B,) indices of cells, in any order; a cell may come twice.

        Returns:
            ``input_ids`` int64, ``expression_values`` float32 and ``attention_mask`` int64, each (B, S),
            ``<lat>`` first, padded to the longest of the cells.
        """
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.n_genes[rows]
        width = 1 + int(lengths.max(initial=0))
        is_gene = np.arange(width - 1) < lengths[:, None]  # (B, S - 1)
        entries = (self.offsets[rows][:, None] + np.arange(width - 1))[is_gene]
        input_ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        input_ids[:, 0] = self.lat_token_id
        input_ids[:, 1:][is_gene] = self.token_ids[entries]
        values = np.zeros((len(rows), width), dtype=np.float32)
        values[:, 1:][is_gene] = self.values[entries]
        attention_mask = np.ones((len(rows), width), dtype=np.int64)
        attention_mask[:, 1:] = is_gene
        arrays = {"input_ids": input_ids, "expression_values": values, "attention_mask": attention_mask}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def read_cells(
    adata: Any, *, tokenizer: CellTokenizer, max_genes: int | None = None, **reading: Any
) -> TokenizedCells:
    """Tokenize all cells of an AnnData.

    Args:
        adata: AnnData with N cells, in memory or backed.
        tokenizer: Tokenizer of the model.
        max_genes: Genes kept of a cell; default the tokenizer's.
        **reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`.

    Returns:
        The cells in the order of ``adata.obs_names``.

    Raises:
        ValueError: If there are no cells.
    """
    refuse_path(adata)
    if adata.n_obs == 0:
        msg = "The AnnData has no cells. Check the selection of cells that made it."
        raise ValueError(msg)
    blocks = list(tokenizer.iter_cells(adata, max_genes=max_genes, block_size=BLOCK_SIZE, **reading))
    sizes = [block.library_size for block in blocks if block.library_size is not None]
    lengths = np.concatenate([np.diff(block.offsets) for block in blocks])
    return TokenizedCells(
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
        token_ids=np.concatenate([block.token_ids for block in blocks]).astype(np.int64),
        values=np.concatenate([block.values for block in blocks]),
        lat_token_id=tokenizer.lat_token_id,
        pad_token_id=tokenizer.pad_token_id,
        library_size=np.concatenate(sizes) if sizes else None,
    )


def length_batches(n_genes: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Group cells of nearly equal length, the longest first: a batch too large for memory fails at once.

    Args:
        n_genes: (N,) length of each cell.
        batch_size: Cells per batch, at least 1.

    Yields:
        (B,) rows; together each row once.

    Raises:
        ValueError: If ``batch_size`` is not positive.
    """
    if batch_size < 1:
        msg = f"batch_size must be at least 1 cell, got {batch_size}."
        raise ValueError(msg)
    order = np.argsort(-np.asarray(n_genes), kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def obs_column(adata: Any, key: str, *, what: str) -> np.ndarray:
    """Read a column of ``obs`` as text, and refuse one that is absent or has gaps.

    Args:
        adata: AnnData with N cells.
        key: Name of the column.
        what: What it holds, for the message ("cell types").

    Returns:
        (N,) text, as an object array.

    Raises:
        KeyError: If there is no such column.
        ValueError: If a cell has no entry.
    """
    if key not in adata.obs:
        msg = f"obs has no column {key!r} ({what}). Columns: {shown(adata.obs.columns)}."
        raise KeyError(msg)
    column = adata.obs[key].astype(object)
    is_missing = column.isna().to_numpy() | (column == "").to_numpy()
    if is_missing.any():
        first = str(adata.obs_names[int(np.flatnonzero(is_missing)[0])])
        msg = (
            f"obs[{key!r}] ({what}) is missing for {int(is_missing.sum())} of {adata.n_obs} cells, first "
            f"{first!r}. Leave these cells out, or fill the column."
        )
        raise ValueError(msg)
    return column.map(str).to_numpy(dtype=object)


def whole_counts(adata: Any, *, layer: str | None = None) -> csr_matrix:
    """Take the counts on which baselines work, from where a tokenizer takes them.

    Args:
        adata: AnnData with N cells and G genes, in memory.
        layer: Layer to take, "X" for ``X``; default ``layers["counts"]`` where there is one, else ``X``.

    Returns:
        (N, G) CSR.

    Raises:
        KeyError: If there is no such layer.
        ValueError: If the values are not whole counts.
    """
    layer = layer or ("counts" if "counts" in adata.layers else "X")
    if layer != "X" and layer not in adata.layers:
        msg = f"There is no layer {layer!r}. Layers: {shown(adata.layers)}, and X."
        raise KeyError(msg)
    matrix = csr_matrix(adata.X if layer == "X" else adata.layers[layer])
    if (matrix.data < 0).any() or (matrix.data != np.rint(matrix.data)).any():
        msg = f"{layer} does not hold whole counts, which the baselines need. Name them with layer=..."
        raise ValueError(msg)
    return matrix


def shown(names: Any) -> str:
    """List the first names for an error message, and say how many there are."""
    names = [str(name) for name in names]
    text = ", ".join(map(repr, names[:N_LISTED])) or "none"
    return text if len(names) <= N_LISTED else f"{text}, ... ({len(names)} in all)"


def refuse_path(adata: Any) -> None:
    """Refuse a path where cells are wanted.

    Args:
        adata: What came.

    Raises:
        TypeError: If it is a path.
    """
    if isinstance(adata, str | os.PathLike):
        msg = f"Cells are taken from an AnnData, got a path ({adata}); open it with anndata.read_h5ad."
        raise TypeError(msg)


def check_vocabulary(model: PreTrainedModel, tokenizer: CellTokenizer) -> None:
    """Refuse a tokenizer whose tokens are not those the model was trained with.

    Args:
        model: Any scDiVa model; without ``config.vocabulary_hash`` only the sizes can be compared.
        tokenizer: Tokenizer to go with it.

    Raises:
        ValueError: If the number of tokens or the content of the vocabularies differs.
    """
    config = model.config
    if tokenizer.vocab_size != config.vocab_size:
        msg = (
            f"The tokenizer has {tokenizer.vocab_size:,} tokens and the model {config.vocab_size:,}. "
            "Load the tokenizer from the folder of the model."
        )
        raise ValueError(msg)
    found = tokenizer.vocabulary.content_hash
    if config.vocabulary_hash is not None and found != config.vocabulary_hash:
        msg = (
            f"The model was trained with the vocabulary {config.vocabulary_hash[:12]} and the tokenizer has "
            f"{found[:12]}: the same token would be another gene. Load the tokenizer from the model's folder."
        )
        raise ValueError(msg)


def encoder_of(model: Any) -> Any:
    """Find the encoder in a model with a head, and in one with an adapter.

    Args:
        model: `ScDivaModel`, a model with a head, or a PEFT model around either.

    Returns:
        The `ScDivaModel`, with what an adapter has put into it.
    """
    if hasattr(model, "get_base_model"):  # a PEFT model, whose own `base_model` is the adapter
        model = model.get_base_model()
    return model.base_model
