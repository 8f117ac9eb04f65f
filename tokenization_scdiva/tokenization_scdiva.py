"""ScDivaTokenizer: counts in, gene tokens and expression values out.

A cell becomes `<lat> gene gene gene ...`, genes in ranking order, one expression value beside each. Unlike a
text tokenizer it reads matrices and AnnData; text (gene names separated by blanks) works too, so that
everything the transformers base class offers (`pad`, `decode`, saving, the Hub) keeps working. AnnData is
read by its attributes, so this file needs no AnnData to encode; only `decode_anndata`, which makes one, does.

Dimensions: N cells and G genes in a file, B cells in a block, S positions (`<lat>` and genes), V vocabulary.
Source: METHOD.md, "From counts to tokens".
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer

from .counts_scdiva import Counts, read_counts, refuse_path
from .genes_scdiva import GeneMatch, check_count_overlap, gene_name_columns, match_genes
from .ranking_scdiva import TARGET_SUM, FlatCells, iter_flat_cells, pad_cells, rank_cells
from .vocabulary_scdiva import SPECIAL_TOKENS, GeneVocabulary

logger = logging.getLogger(__name__)

VOCABULARY_FILE = "gene_vocabulary.json"
# What a pad holds in the columns that travel beside `input_ids`.
PAD_VALUES = {"expression_values": 0.0, "labels": -100, "expression_labels": 0.0, "is_masked": False}


class ScDivaTokenizer(PreTrainedTokenizer):
    """Rank-value tokenizer of single cells.

    Args:
        vocabulary_file: Path of a ``gene_vocabulary.json``; what ``from_pretrained`` passes.
        vocabulary: The same in memory; one of the two is needed.
        max_genes: Genes kept of a cell, the first in ranking order. ``model_max_length`` always follows it.
        target_sum: Molecules to which every cell is scaled before log1p.
        gene_order: ``entropy`` (s = v / (H_g + eps)), ``expression`` (s = v) or ``random``.
        entropy_epsilon: eps in nats; large values approach expression order.
        pad_token: Fills up short cells.
        mask_token: Stands for a gene hidden by diffusion.
        cls_token: The anchor ``<lat>``, first token of every cell.
        unk_token: A gene name outside the vocabulary, in text only; matrices count and report such genes.
        pert_token: Marks a perturbation.
        kwargs: Passed to the base class.

    Raises:
        ValueError: If there is no vocabulary, if a setting is out of range, if entropy order is asked of a
            vocabulary without entropies, or if a special token is not one of the vocabulary's.
    """

    vocab_files_names = {"vocabulary_file": VOCABULARY_FILE}  # noqa: RUF012 (the base class declares it so)
    model_input_names = ["input_ids", "expression_values", "attention_mask"]  # noqa: RUF012
    padding_side = "right"

    def __init__(  # noqa: PLR0913 (every argument is a saved setting of the tokenizer)
        self,
        vocabulary_file: str | Path | None = None,
        vocabulary: GeneVocabulary | None = None,
        *,
        max_genes: int = 1200,
        target_sum: float = TARGET_SUM,
        gene_order: str = "entropy",
        entropy_epsilon: float = 1.0,
        pad_token: str = "<pad>",
        mask_token: str = "<mask>",
        cls_token: str = "<lat>",
        unk_token: str = "<unk>",
        pert_token: str = "<pert>",
        **kwargs: Any,
    ) -> None:
        if vocabulary is None:
            if vocabulary_file is None:
                raise ValueError(_no_vocabulary(kwargs.get("name_or_path")))
            vocabulary = GeneVocabulary.load(vocabulary_file)
        _check_settings(max_genes, target_sum, gene_order, entropy_epsilon, vocabulary)
        self.vocabulary = vocabulary
        self.max_genes = max_genes
        self.target_sum = target_sum
        self.gene_order = gene_order
        self.entropy_epsilon = entropy_epsilon
        for name in ("is_local", "local_files_only"):  # from_pretrained's own, not settings to be saved
            kwargs.pop(name, None)
        kwargs["model_max_length"] = max_genes + 1  # a saved one would outlive a change of max_genes
        super().__init__(
            max_genes=max_genes,
            target_sum=target_sum,
            gene_order=gene_order,
            entropy_epsilon=entropy_epsilon,
            pad_token=pad_token,
            mask_token=mask_token,
            cls_token=cls_token,
            unk_token=unk_token,
            pert_token=pert_token,
            **kwargs,
        )
        specials = [self.pad_token, self.mask_token, self.cls_token, self.unk_token, self.pert_token]
        if not set(specials) <= set(SPECIAL_TOKENS):
            msg = (
                f"Special tokens {specials} must be among the vocabulary's own: {', '.join(SPECIAL_TOKENS)}."
            )
            raise ValueError(msg)

    # --- vocabulary, as the base class wants it ---

    @property
    def vocab_size(self) -> int:
        """Number of tokens V, specials included."""
        return len(self.vocabulary)

    @property
    def lat_token_id(self) -> int:
        """Id of the anchor token ``<lat>``."""
        return self.cls_token_id

    @property
    def ranking_weights(self) -> np.ndarray:
        """(V,) float64 divisor of the ranking score: H_g + eps in entropy order, else ones."""
        if self.gene_order == "entropy":
            return self.vocabulary.ranking_weights(self.entropy_epsilon)
        return np.ones(len(self.vocabulary))

    @property
    def ranking_settings(self) -> dict[str, Any]:
        """What decides tokens and their order; a corpus and a tokenizer must agree on all of it."""
        return {
            "vocabulary_hash": self.vocabulary.content_hash,
            "target_sum": self.target_sum,
            "gene_order": self.gene_order,
            "entropy_epsilon": self.entropy_epsilon,
        }

    def get_vocab(self) -> dict[str, int]:
        """Return token text -> token id: gene ids and special tokens."""
        return dict(self.vocabulary.token_ids) | self.added_tokens_encoder

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write ``gene_vocabulary.json`` into a folder and return its path in a tuple."""
        name = f"{filename_prefix}-{VOCABULARY_FILE}" if filename_prefix else VOCABULARY_FILE
        path = Path(save_directory) / name
        self.vocabulary.save(path)
        return (str(path),)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        vocabulary = self.vocabulary
        if token in vocabulary.token_ids:
            return vocabulary.token_ids[token]
        if token in vocabulary.symbol_token_ids:
            return vocabulary.symbol_token_ids[token]
        return vocabulary.token_ids[vocabulary.aliases.get(token, "<unk>")]

    def _convert_id_to_token(self, index: int) -> str:
        return self.vocabulary.gene_ids[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join gene names with blanks."""
        return " ".join(tokens)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put ``<lat>`` in front; a second sequence is simply appended, a cell has no segments."""
        return [self.cls_token_id, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,  # noqa: FBT001, FBT002 (signature of the base class)
    ) -> list[int]:
        """Return 1 for a special token, 0 for a gene."""
        ids = token_ids_0
        if not already_has_special_tokens:
            ids = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        special_ids = set(self.all_special_ids)
        return [int(token_id in special_ids) for token_id in ids]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return zeros; a cell has no segments."""
        return [0] * (1 + len(token_ids_0) + len(token_ids_1 or []))

    def _pad(self, encoded_inputs: Any, *, padding_side: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        padded = super()._pad(encoded_inputs, padding_side=padding_side, **kwargs)
        length = len(padded["input_ids"])
        for name, fill in PAD_VALUES.items():
            if name in padded:
                entries = list(padded[name])
                pads = [fill] * (length - len(entries))
                is_left = (padding_side or self.padding_side) == "left"
                padded[name] = pads + entries if is_left else entries + pads
        return padded

    # --- cells ---

    def __call__(self, cells: Any = None, *args: Any, gene_ids: Any = None, **kwargs: Any) -> BatchEncoding:
        """Tokenize counts, an AnnData, or text.

        Args:
            cells: (N, G) raw counts, dense, sparse or nested lists, or (G,) for one cell, with
                ``gene_ids=``; or an AnnData; or text, gene names separated by blanks.
            args: Further positional arguments of the base class, for text.
            gene_ids: (G,) Ensembl ids or symbols of the columns of a matrix.
            kwargs: Those of `encode_anndata`, or of the base class for text.

        Returns:
            As `encode_anndata`, or as the base class for text.

        Raises:
            ValueError: If a matrix comes without ``gene_ids`` or an AnnData with them, or if there are not as
                many as columns. A path raises a ``TypeError``.
        """
        refuse_path(cells, is_text_allowed=True)
        if hasattr(cells, "var_names"):
            if gene_ids is not None:
                msg = "An AnnData names its genes itself; choose a column of var with gene_id_key=..."
                raise ValueError(msg)
            return self.encode_anndata(cells, **kwargs)
        if gene_ids is not None:
            return self.encode_anndata(_as_adata(cells, gene_ids), **kwargs)
        if cells is None and _is_text(kwargs.get("text", "")):  # text under the base class' own names
            return super().__call__(**kwargs)
        if _is_text(cells):
            return super().__call__(cells, *args, **kwargs)
        msg = "A matrix of counts needs gene_ids=..., the Ensembl id or symbol of each column."
        raise ValueError(msg)

    def encode_anndata(
        self, adata: Any, *, return_tensors: str = "pt", library_size: Any = None, **kwargs: Any
    ) -> BatchEncoding:
        """Tokenize all cells of an AnnData at once; see `iter_cells` for files larger than memory.

        Args:
            adata: AnnData with raw counts, in memory or backed.
            return_tensors: ``pt`` or ``np``.
            library_size: (N,) molecules per cell, where the AnnData no longer holds all genes of the run.
            kwargs: Those of `iter_cells`.

        Returns:
            ``input_ids`` (N, S) int64, ``expression_values`` (N, S) float32 and ``attention_mask`` (N, S)
            int64.
        """
        blocks = list(self.iter_cells(adata, library_size=library_size, **kwargs))
        offsets = np.cumsum(np.concatenate([[0], *[cells.n_genes for cells in blocks]]))
        token_ids = np.concatenate([cells.token_ids for cells in blocks])
        values = np.concatenate([cells.values for cells in blocks])
        return self.pad_cells(
            FlatCells(offsets, token_ids, values, None, None), return_tensors=return_tensors
        )

    def pad_cells(self, cells: FlatCells, *, return_tensors: str = "pt") -> BatchEncoding:
        """Lay flat cells out as model inputs, with ``<lat>`` in front.

        Args:
            cells: Ranked cells, as `iter_cells` yields them.
            return_tensors: ``pt`` or ``np``.

        Returns:
            As `encode_anndata`.
        """
        token_ids = cells.token_ids.astype(np.int64)
        ones = np.ones(len(token_ids), dtype=np.int64)
        arrays = {
            "input_ids": pad_cells(cells.offsets, token_ids, first=self.cls_token_id, fill=self.pad_token_id),
            "expression_values": pad_cells(cells.offsets, cells.values, first=0.0, fill=0.0),
            "attention_mask": pad_cells(cells.offsets, ones, first=1, fill=0),
        }
        return BatchEncoding(arrays, tensor_type=return_tensors)

    def iter_cells(  # noqa: PLR0913 (the one door for cells)
        self,
        adata: Any,
        *,
        layer: str | None = None,
        expression_is_log1p: bool = False,
        gene_id_key: str | None = None,
        library_size: Any = None,
        max_genes: int | None = None,
        keep_empty_cells: bool = False,
        block_size: int = 1000,
        min_gene_overlap: float = 0.1,
        min_count_overlap: float = 0.5,
    ) -> Iterator[FlatCells]:
        """Tokenize an AnnData block by block, in the order of its cells.

        Values that are not what they are said to be, too few known genes, and empty cells are refused.

        Args:
            adata: AnnData with N cells, in memory or backed.
            layer: Layer that holds the counts; default see `read_counts`.
            expression_is_log1p: The values are log1p of normalised counts, not counts.
            gene_id_key: Column of ``var`` with gene ids; default: the names and every known id or symbol
                column.
            library_size: (N,) molecules per cell, where the AnnData no longer holds all genes of the run.
            max_genes: Genes kept of a cell, at least 1; default the tokenizer's.
            keep_empty_cells: Let a cell without any vocabulary gene through as a bare ``<lat>``.
            block_size: Cells per block; no result depends on it.
            min_gene_overlap: Least share of genes that must be known.
            min_count_overlap: Least share of molecules (or summed log1p values) in known genes.

        Yields:
            Ranked and cut cells of one block.
        """
        limit = self.max_genes if max_genes is None else max_genes
        _check_max_genes(limit)
        counts = read_counts(
            adata, layer=layer, expression_is_log1p=expression_is_log1p, block_size=block_size
        )
        match = self.match_genes(adata, counts, gene_id_key=gene_id_key, min_gene_overlap=min_gene_overlap)
        if library_size is not None:
            library_size = _checked_library_size(library_size, counts)
        weights, matched, total, n_cut = self.ranking_weights, 0.0, 0.0, 0
        for start, cells, block_total in iter_flat_cells(
            counts, match.token_ids, library_size=library_size, target_sum=self.target_sum
        ):
            amounts = cells.values if cells.counts is None else cells.counts
            matched, total = matched + float(amounts.sum(dtype=np.float64)), total + block_total
            n_cut += int((cells.n_genes > limit).sum())
            if not keep_empty_cells:
                _refuse_empty_cells(cells, start, adata)
            yield rank_cells(cells, gene_order=self.gene_order, ranking_weights=weights, max_genes=limit)
        check_count_overlap(match.report, matched, total, min_count_overlap=min_count_overlap)
        logger.info(
            "%d of %d cells express more than %d genes and were cut there.", n_cut, counts.n_cells, limit
        )

    def match_genes(
        self,
        adata: Any,
        counts: Counts | None = None,
        *,
        gene_id_key: str | None = None,
        min_gene_overlap: float = 0.1,
        **reading: Any,
    ) -> GeneMatch:
        """Match the genes of an AnnData with the vocabulary, entry by entry, and log the report.

        Args:
            adata: Where the names stand.
            counts: What `read_counts` returned for it; its totals decide between duplicates. Read here when
                not given.
            gene_id_key: Column of ``var`` with gene ids; default: the names and every known column.
            min_gene_overlap: Least share of genes that must be known.
            **reading: ``layer`` and ``expression_is_log1p``, when the counts are read here.

        Returns:
            Token id per column, -1 where unused, and the report.
        """
        counts = read_counts(adata, **reading) if counts is None else counts
        names = gene_name_columns(adata, use_raw=counts.use_raw, gene_id_key=gene_id_key)
        return match_genes(
            names,
            self.vocabulary,
            gene_totals=counts.gene_totals,
            min_gene_overlap=min_gene_overlap,
            cell_names=adata.obs_names,
        )

    def decode_anndata(self, encoding: Any, *, obs_names: Any = None, library_size: Any = None) -> Any:
        """Go back from tokens to an AnnData of expression values, and of counts where depths are given.

        Special tokens, ``<mask>`` among them, leave no trace.

        Args:
            encoding: Mapping with ``input_ids`` (N, S) and ``expression_values`` (N, S).
            obs_names: (N,) names of the cells.
            library_size: (N,) molecules per cell, as in encoding; adds ``layers["counts"]``.

        Returns:
            AnnData (N, V - specials): ``X`` CSR float32 log1p values, zero where a cell has no such token;
            ``var_names`` gene ids, ``var["gene_symbols"]``; ``layers["counts"]`` CSR whole molecules, those
            of the input for all genes that were not cut.

        Raises:
            ImportError: If anndata is not installed.
            ValueError: If a gene occurs twice in a cell.
        """
        try:
            import anndata
            from scipy.sparse import csr_matrix
        except ImportError as error:
            msg = "decode_anndata makes an AnnData and needs the package anndata: pip install anndata"
            raise ImportError(msg) from error
        input_ids, values = _as_array(encoding["input_ids"]), _as_array(encoding["expression_values"])
        n_special = self.vocabulary.n_special_tokens
        rows, places = np.nonzero(input_ids >= n_special)
        columns = input_ids[rows, places] - n_special
        if len(np.unique(rows * len(self.vocabulary) + columns)) < len(rows):
            msg = "A gene occurs twice in one cell of input_ids; each gene may hold one value."
            raise ValueError(msg)
        shape = (len(input_ids), len(self.vocabulary) - n_special)
        values = values[rows, places].astype(np.float32)
        adata = anndata.AnnData(csr_matrix((values, (rows, columns)), shape=shape))
        if library_size is not None:
            scale = np.asarray(library_size, dtype=np.float64)[rows] / self.target_sum
            counts = np.rint(np.expm1(values.astype(np.float64)) * scale).astype(np.float32)
            adata.layers["counts"] = csr_matrix((counts, (rows, columns)), shape=shape)
        adata.var_names = self.vocabulary.gene_ids[n_special:]
        adata.var["gene_symbols"] = self.vocabulary.gene_symbols[n_special:]
        if obs_names is not None:
            adata.obs_names = obs_names
        return adata


def _check_settings(
    max_genes: int, target_sum: float, gene_order: str, entropy_epsilon: float, vocabulary: GeneVocabulary
) -> None:
    _check_max_genes(max_genes)
    if not target_sum > 0:
        msg = f"target_sum must be positive (molecules per cell), got {target_sum}."
        raise ValueError(msg)
    if not entropy_epsilon > 0:
        msg = f"entropy_epsilon must be positive (nats), got {entropy_epsilon}."
        raise ValueError(msg)
    if gene_order not in ("entropy", "expression", "random"):
        msg = f"gene_order must be 'entropy', 'expression' or 'random', got {gene_order!r}."
        raise ValueError(msg)
    if gene_order == "entropy" and vocabulary.gene_entropy is None:
        msg = (
            "gene_order='entropy' needs a vocabulary with gene entropies, and this one has none. Build one "
            "with data/build_vocabulary.py, or choose gene_order='expression'."
        )
        raise ValueError(msg)


def _no_vocabulary(folder: str | None) -> str:
    if not folder:  # not `from_pretrained`
        return f"ScDivaTokenizer needs a gene vocabulary; pass vocabulary=... or a {VOCABULARY_FILE}."
    found = f"holds no {VOCABULARY_FILE}" if Path(folder).exists() else "does not exist"
    return (
        f"{folder!r} {found}; wanted is the folder of a saved ScDivaTokenizer, as data/build_vocabulary.py "
        "writes it."
    )


def _is_text(cells: Any) -> bool:
    """Tell gene names, alone or in lists, from numbers, which the base class would take for token ids."""
    while isinstance(cells, list | tuple) and len(cells):
        cells = cells[0]
    return isinstance(cells, str | list | tuple)


def _check_max_genes(max_genes: int) -> None:
    if max_genes < 1:
        msg = f"max_genes must be at least 1, got {max_genes}."
        raise ValueError(msg)


def _as_array(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().numpy() if hasattr(tensor, "detach") else np.asarray(tensor)


def _as_adata(matrix: Any, gene_ids: Any) -> SimpleNamespace:
    """Dress a bare matrix as the part of an AnnData that `read_counts` and `gene_name_columns` look at."""
    if not hasattr(matrix, "tocsr"):
        matrix = _as_array(matrix)
    if matrix.ndim == 1:
        matrix = matrix[None, :]
    names = [str(name) for name in gene_ids]
    if matrix.shape[1] != len(names):
        msg = (
            f"The matrix has {matrix.shape[1]} columns and gene_ids {len(names)} entries; they must be equal."
        )
        raise ValueError(msg)
    cell_names = [str(row) for row in range(matrix.shape[0])]
    var = SimpleNamespace(columns=(), index=np.array(names, dtype=object))
    return SimpleNamespace(
        X=matrix, layers={}, raw=None, uns={}, var=var, obs_names=cell_names, var_names=names
    )


def _checked_library_size(library_size: Any, counts: Counts) -> np.ndarray:
    if counts.kind == "log1p":
        msg = "library_size turns counts into expression; log1p expression needs none, leave it out."
        raise ValueError(msg)
    sizes = np.asarray(library_size, dtype=np.float64).reshape(-1)
    if len(sizes) != counts.n_cells:
        msg = f"library_size has {len(sizes)} entries for {counts.n_cells} cells; give one number per cell."
        raise ValueError(msg)
    return sizes


def _refuse_empty_cells(cells: FlatCells, start: int, adata: Any) -> None:
    empty = np.flatnonzero(cells.n_genes == 0)
    if len(empty):
        examples = ", ".join(repr(str(adata.obs_names[start + row])) for row in empty[:3])
        msg = (
            f"{len(empty)} cells express no gene of the vocabulary (first: {examples}). Filter them out "
            "(scanpy.pp.filter_cells), or pass keep_empty_cells=True to carry them as a bare <lat>."
        )
        raise ValueError(msg)
