"""Scores of cells: how likely each is under the model, gene by gene if wanted, and under which label.

A likelihood falls with depth: a deep cell has more genes and more molecules to be surprised by. Compare nats
per token, or cells of one depth, and put a depth-only detector beside every claim.

Dimensions: N cells, S positions, V vocabulary, C labels.
Source: METHOD.md section 6.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from scipy.special import log_softmax

from modeling_scdiva.conditions_scdiva import encode_conditions
from modeling_scdiva.configuration_scdiva import LIBRARY_SIZE
from modeling_scdiva.tasks.cells import (
    CellTokenizer,
    TokenizedCells,
    check_vocabulary,
    read_cells,
    refuse_path,
)
from modeling_scdiva.tasks.reconstruction import check_diffusion_model

# Options that say how to estimate; the others say how to read the AnnData.
ESTIMATION = ("seed", "show_progress", "rank_consistent")


def score_cells(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    conditions: dict[str, Any] | None = None,
    n_draws: int = 128,
    batch_size: int = 32,
    genes_only: bool = False,
    **options: Any,
) -> pd.DataFrame:
    """Estimate the negative log-likelihood of each cell.

    Args:
        adata: AnnData with N cells of raw counts.
        model: A `ScDivaForMaskedDiffusion`; runs where it is.
        tokenizer: The tokenizer of this model.
        conditions: Name -> category of all cells or (N,) categories that the likelihood is conditioned on.
            Depth follows the library size where the network knows it.
        n_draws: Network calls per cell; 128 give about 0.02 nats per token.
        batch_size: Masked cells in one call.
        genes_only: Leave the counts out; needed for values that are no counts.
        **options: ``seed``, ``show_progress`` and ``rank_consistent`` of `compute_nll` (True unless genes
            have a random order), and how to read the AnnData, as in `ScDivaTokenizer.iter_cells`.

    Returns:
        DataFrame on ``adata.obs_names``: ``scdiva_nll`` (nats per cell), ``scdiva_nll_per_token``,
        ``scdiva_nll_standard_error`` (nats per cell), the parts ``scdiva_gene_nll``, ``scdiva_value_nll`` and
        ``scdiva_length_nll`` (NaN where left out), ``scdiva_n_tokens``, ``scdiva_n_genes_detected``,
        ``scdiva_library_size`` and ``scdiva_is_truncated``. Assign it: ``adata.obs = adata.obs.join(...)``.
    """
    estimation = {name: options.pop(name) for name in ESTIMATION if name in options}
    cells, detected = _read(adata, model, tokenizer, options)
    scored = _score(
        cells,
        model,
        tokenizer,
        conditions or {},
        n_genes_detected=torch.from_numpy(detected),
        n_draws=n_draws,
        batch_size=batch_size,
        genes_only=genes_only,
        **estimation,
    )
    nothing = np.full(cells.n_cells, np.nan)
    n_tokens = scored.n_tokens.cpu().numpy()
    columns = {
        "nll": scored.nll.cpu().numpy(),
        "nll_per_token": scored.nll.cpu().numpy() / np.maximum(n_tokens, 1),
        "nll_standard_error": scored.standard_error.cpu().numpy(),
        "gene_nll": scored.gene_nll.cpu().numpy(),
        "value_nll": nothing if scored.value_nll is None else scored.value_nll.cpu().numpy(),
        "length_nll": nothing if scored.length_nll is None else scored.length_nll.cpu().numpy(),
        "n_tokens": n_tokens,
        "n_genes_detected": detected,
        "library_size": nothing if cells.library_size is None else cells.library_size,
        "is_truncated": scored.is_truncated.cpu().numpy(),
    }
    return pd.DataFrame(
        {f"scdiva_{name}": column for name, column in columns.items()}, index=adata.obs_names.copy()
    )


def gene_surprisal(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    n_draws: int = 128,
    batch_size: int = 32,
    **options: Any,
) -> csr_matrix:
    """Say how surprising each gene of each cell is, given random parts of the rest of the cell.

    Args:
        adata: AnnData with N cells and G genes.
        model: A `ScDivaForMaskedDiffusion`; runs where it is.
        tokenizer: The tokenizer of this model.
        n_draws: Network calls per cell.
        batch_size: Masked cells in one call.
        **options: As in `score_cells`.

    Returns:
        (N, V - special tokens) CSR float32 mean nats, in the order of ``tokenizer.vocabulary.gene_ids``
        behind the special ones; stored for the gene tokens of each cell only, NaN where so few draws never
        hid the gene.
    """
    estimation = {name: options.pop(name) for name in ESTIMATION if name in options}
    cells, _ = _read(adata, model, tokenizer, options)
    scored = _score(
        cells,
        model,
        tokenizer,
        {},
        n_draws=n_draws,
        batch_size=batch_size,
        genes_only=True,
        per_gene=True,
        **estimation,
    )
    nats = scored.gene_surprisal.numpy()[:, 1:]
    width = nats.shape[1]
    is_gene = np.arange(width) < cells.n_genes[:, None]
    n_special = tokenizer.vocabulary.n_special_tokens
    shape = (cells.n_cells, tokenizer.vocab_size - n_special)
    entries = nats[is_gene].astype(np.float32)
    return csr_matrix((entries, cells.token_ids - n_special, cells.offsets), shape=shape)


def score_labels(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    condition: str,
    labels: list[str] | None = None,
    n_draws: int = 16,
    batch_size: int = 32,
    **options: Any,
) -> pd.DataFrame:
    """Ask under which label each cell is most likely: Bayes' rule with equal shares of the labels.

    All labels are scored on the same hidden genes, so their differences vary far less than the scores.

    Args:
        adata: AnnData with N cells of raw counts.
        model: A `ScDivaForMaskedDiffusion` with conditions; runs where it is.
        tokenizer: The tokenizer of this model.
        condition: Which condition of the network, such as "cell_type".
        labels: Categories to compare; default all that the network knows.
        n_draws: Network calls per cell and label.
        batch_size: Masked cells in one call.
        **options: As in `score_cells`.

    Returns:
        (N, C) DataFrame on ``adata.obs_names``, a column per label: log-probability of the label in nats.

    Raises:
        KeyError: If the network has no such condition.
    """
    known = model.config.conditions or {}
    if condition not in known or condition == LIBRARY_SIZE:
        names = ", ".join(repr(name) for name in known if name != LIBRARY_SIZE) or "none"
        msg = f"The network has no labels of the condition {condition!r}. Conditions with labels: {names}."
        raise KeyError(msg)
    estimation = {name: options.pop(name) for name in ESTIMATION if name in options}
    cells, _ = _read(adata, model, tokenizer, options)
    labels = list(known[condition]) if labels is None else list(labels)
    nats = []
    for label in labels:
        scored = _score(
            cells,
            model,
            tokenizer,
            {condition: label},
            n_draws=n_draws,
            batch_size=batch_size,
            genes_only=cells.library_size is None,
            **estimation,
        )
        nats.append(scored.nll.cpu().numpy())
    log_posterior = log_softmax(-np.stack(nats, axis=1), axis=1)
    return pd.DataFrame(log_posterior, index=adata.obs_names.copy(), columns=labels)


def _read(
    adata: Any, model: Any, tokenizer: CellTokenizer, reading: dict[str, Any]
) -> tuple[TokenizedCells, np.ndarray]:
    """Tokenize cells; the second part is how many vocabulary genes each expresses before the cut."""
    refuse_path(adata)
    check_diffusion_model(model)
    check_vocabulary(model, tokenizer)
    limit = reading.pop("max_genes", None)
    whole = read_cells(adata, tokenizer=tokenizer, max_genes=tokenizer.vocab_size, **reading)
    return whole.cut(tokenizer.max_genes if limit is None else limit), whole.n_genes


def _score(
    cells: TokenizedCells,
    model: Any,
    tokenizer: CellTokenizer,
    conditions: dict[str, Any],
    **estimation: Any,
) -> Any:
    """Lay cells out and score them; depth follows the library sizes."""
    known, ids = model.config.conditions, None
    sizes = cells.library_size
    if known:
        depth = {LIBRARY_SIZE: sizes} if LIBRARY_SIZE in known and sizes is not None else {}
        ids = encode_conditions(depth | conditions, cells.n_cells, known)
    elif conditions:
        msg = f"Conditions came ({', '.join(conditions)}), and this checkpoint was trained without any."
        raise ValueError(msg)
    factors = None if sizes is None else torch.from_numpy(sizes / tokenizer.target_sum)
    estimation.setdefault("rank_consistent", tokenizer.gene_order != "random")
    return model.compute_nll(
        **cells.batch(np.arange(cells.n_cells)),
        size_factors=factors,
        condition_ids=ids,
        ranking_weights=tokenizer.ranking_weights,
        **estimation,
    )
