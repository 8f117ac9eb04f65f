"""Imputation: values of hidden genes, dense profiles of any genes, and whether a silent gene is truly off.

Notable choices:
- A gene that was not measured is missing, not zero: it never enters the network, its observed value is NaN,
  and what is predicted for it comes from the cell embedding alone.
- A gene that was measured and is silent gets the probability that it would be detected in a cell like this;
  so does a gene that was not measured. Where it was seen, the probability is 1.
- The imputed value is an expectation, probability times value if detected, in log1p units. It is meant for
  means and plots: differential tests on imputed cells find differences that are not there.
- Where values are hidden at known slots, a value head that uses the gene is given it, and the encoder is not:
  in training, gene and value are hidden together. A scalar head needs the gene in sight of the encoder.
- Everything is a posterior mean of one forward pass; nothing is drawn.

Dimensions: N cells and G genes in a file, Q genes asked for, B cells of a batch, D width, S positions.
Source: METHOD.md sections 3 and 5.
"""

import logging
from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix, issparse
from scipy.special import expit

from modeling_scdiva.outputs_scdiva import pooled_positions
from modeling_scdiva.pretrained_scdiva import evaluation_mode
from modeling_scdiva.tasks.cells import (
    CellTokenizer,
    TokenizedCells,
    check_vocabulary,
    length_batches,
    read_cells,
    refuse_path,
    shown,
)
from modeling_scdiva.tasks.genes import asked_tokens, find_genes
from modeling_scdiva.tasks.reconstruction import IGNORED_LABEL, check_diffusion_model

logger = logging.getLogger(__name__)

IMPUTED, PROBABILITY, VALUE, OBSERVED = (
    "scdiva_imputed", "scdiva_probability", "scdiva_value", "scdiva_observed",
)  # fmt: skip
GENES_PER_QUERY = 512


def impute_expression(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    genes: Sequence[str] | None = None,
    measured_genes: Sequence[str] | None = None,
    hidden_entries: Any = None,
    keep_observed: bool = True,
    batch_size: int = 32,
    **reading: Any,
) -> anndata.AnnData:
    """Predict expression that was not measured, was lost, or is hidden.

    With ``hidden_entries``, the values of hidden genes are predicted at their slots: the gene and its rank
    stay known, its value does not. The rank alone tells most of a value (METHOD.md section 8).

    Without, the gene-query decoder is asked for every gene in ``genes``, whether the cell shows it or not: a
    panel of a few hundred genes in, any named genes out.

    Args:
        adata: AnnData with N cells and G genes.
        model: A `ScDivaForMaskedDiffusion`; runs where it is, in evaluation mode.
        tokenizer: The tokenizer of this model.
        genes: Gene ids or symbols to predict; default the genes of the file.
        measured_genes: Gene ids or symbols that were measured, where the file holds columns for more (joined
            panels); the others are missing, whatever stands there. Default all genes of the file. Values are
            normalised by the molecules of the file; pass ``library_size`` where that is not right.
        hidden_entries: (N, G) bool, dense or sparse, values to hide and predict at their slots.
        keep_observed: Keep the observed value, and a probability of 1, where a gene was detected; else the
            prediction stands there, too (denoising).
        batch_size: Cells in one forward pass; no result depends on it beyond rounding.
        **reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`.

    Returns:
        AnnData with the cells of ``adata`` and the genes asked for (by default exactly ``adata.var``), no X,
        and float32 layers: ``scdiva_imputed``, expected log1p value; ``scdiva_observed``, log1p value, 0 for
        measured and silent, NaN for not measured or hidden; and from the decoder ``scdiva_probability`` that
        the gene is detected and ``scdiva_value``, its log1p value if it is. Genes that the vocabulary lacks
        are NaN. ``var["is_known"]`` and ``var["is_measured"]`` tell which are what, ``uns["scdiva"]`` how
        many. A model without decoder raises ``ValueError``.

    Raises:
        ValueError: If ``hidden_entries`` comes together with genes or without ``keep_observed``.
    """
    refuse_path(adata)
    check_diffusion_model(model)
    check_vocabulary(model, tokenizer)
    if hidden_entries is not None:
        if genes is not None or measured_genes is not None or not keep_observed:
            msg = (
                "hidden_entries predicts values at known slots of the file's own genes and keeps the others; "
                "leave genes, measured_genes and keep_observed out, or call again without hidden_entries."
            )
            raise ValueError(msg)
        return _impute_slots(
            adata, hidden_entries, model=model, tokenizer=tokenizer, batch_size=batch_size, **reading
        )
    _check_decoder(model)
    columns = _column_tokens(adata, tokenizer, reading)  # (G,)
    measured = _measured_tokens(columns, measured_genes, tokenizer)
    queries = columns  # (Q,)
    if genes is not None:
        queries = asked_tokens(genes, vocabulary=tokenizer.vocabulary, what="genes")
    var = adata.var.copy() if genes is None else pd.DataFrame(index=pd.Index(list(map(str, genes))))
    cells, network_cells = _read_measured(adata, tokenizer, measured, reading)
    is_known = queries >= 0
    n_known = int(is_known.sum())
    logits, values = decode_cells(
        network_cells, model=model, gene_ids=queries[is_known], batch_size=batch_size
    )  # (N, Q known) both
    layers = {name: np.full((adata.n_obs, len(queries)), np.nan, np.float32) for name in (PROBABILITY, VALUE)}
    layers[PROBABILITY][:, is_known] = expit(logits)
    layers[VALUE][:, is_known] = values
    layers[OBSERVED] = _observed(cells, queries, np.isin(queries, measured) & is_known)
    layers[IMPUTED] = layers[PROBABILITY] * layers[VALUE]
    if keep_observed:
        is_seen = layers[OBSERVED] > 0
        layers[PROBABILITY][is_seen] = 1.0
        layers[IMPUTED][is_seen] = layers[OBSERVED][is_seen]
    if n_known < len(queries):
        logger.warning(
            "%d of %d genes are not in the vocabulary and stay NaN.", len(queries) - n_known, len(queries)
        )
    var["is_known"], var["is_measured"] = is_known, np.isin(queries, measured) & is_known
    counted = {"n_genes_known": n_known, "n_genes_measured": int(var["is_measured"].sum())}
    done = counted | {"unit": _unit(tokenizer), "keep_observed": keep_observed}
    return _packed(adata, var, layers, model=model, counted=done)


def _measured_tokens(columns: np.ndarray, measured_genes: Sequence[str] | None, tokenizer: Any) -> np.ndarray:
    """Return the tokens of the genes that were measured: those of the file, or fewer by name."""
    measured = np.unique(columns[columns >= 0])
    if measured_genes is None:
        return measured
    named, _ = find_genes(measured_genes, tokenizer.vocabulary, what="measured_genes")
    absent = [name for token, name in named.items() if token not in measured]
    if absent:
        logger.warning("%d measured_genes are not in the file: %s.", len(absent), shown(absent))
    measured = np.intersect1d(measured, list(named))
    if not len(measured):
        msg = "None of measured_genes is a gene of the file. Name genes as the file or the vocabulary does."
        raise ValueError(msg)
    return measured


def decode_cells(
    cells: TokenizedCells, *, model: Any, gene_ids: np.ndarray, batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Ask the gene-query decoder for the same genes of every cell.

    Args:
        cells: What the network sees of N cells.
        model: A `ScDivaForMaskedDiffusion` with a gene-query decoder.
        gene_ids: (Q,) tokens.
        batch_size: Cells in one forward pass.

    Returns:
        (N, Q) float32 log-odds that the gene is detected and (N, Q) float32 log1p values if it is.
    """
    _check_decoder(model)
    logits = np.empty((cells.n_cells, len(gene_ids)), dtype=np.float32)
    values = np.empty_like(logits)
    queries = torch.as_tensor(gene_ids, dtype=torch.int64, device=model.device)
    with evaluation_mode(model), torch.inference_mode():
        for rows in length_batches(cells.n_genes, batch_size):
            inputs = {name: entry.to(model.device) for name, entry in cells.batch(rows).items()}
            states = model.model(**inputs, output_positions=pooled_positions("lat")).last_hidden_state
            embeddings = states[:, 0]  # (B, D)
            for start in range(0, len(gene_ids), GENES_PER_QUERY):
                part = slice(start, start + GENES_PER_QUERY)
                answers = model.decode_genes(embeddings, queries[part])
                logits[rows, part], values[rows, part] = (answer.float().cpu().numpy() for answer in answers)
    return logits, values


def _check_decoder(model: Any) -> None:
    if getattr(model, "query_decoder", None) is None:
        msg = (
            "This checkpoint has no gene-query decoder (it was trained with latent_loss_weight=0), so genes "
            "that a cell does not show cannot be predicted. Pretrain with latent_loss_weight > 0, or pass "
            "hidden_entries=... for values at known slots."
        )
        raise ValueError(msg)


def _column_tokens(adata: Any, tokenizer: Any, reading: dict[str, Any]) -> np.ndarray:
    """Return the (G,) token of each column of the file, -1 where the vocabulary lacks it.

    Raises:
        ValueError: If the counts are those of ``raw``, whose genes are others.
    """
    names = ("layer", "expression_is_log1p", "gene_id_key", "min_gene_overlap")
    known = {name: reading[name] for name in names if name in reading}
    tokens = np.asarray(tokenizer.match_genes(adata, **known).token_ids, dtype=np.int64)
    if len(tokens) != adata.n_vars:
        msg = (
            f"The counts are in adata.raw with {len(tokens)} genes, and adata.var has {adata.n_vars}. Pass "
            "adata.raw.to_adata(), so that the result has the same genes."
        )
        raise ValueError(msg)
    return tokens


def _read_measured(
    adata: Any, tokenizer: Any, measured: np.ndarray, reading: dict[str, Any]
) -> tuple[TokenizedCells, TokenizedCells]:
    """Read cells, leave out what was not measured, and cut only then.

    Returns:
        All measured genes of the cells, and those that the network sees.

    Raises:
        ValueError: If a cell expresses no measured gene and such cells are not let through.
    """
    max_genes = reading.get("max_genes") or tokenizer.max_genes
    everything = reading | {"max_genes": max(tokenizer.vocab_size, 1)}
    cells = read_cells(adata, tokenizer=tokenizer, **everything)
    cells = _selected(cells, np.isin(cells.token_ids, measured))
    empty = np.flatnonzero(cells.n_genes == 0)
    if len(empty) and not reading.get("keep_empty_cells"):
        first = str(adata.obs_names[int(empty[0])])
        msg = (
            f"{len(empty)} cells express none of the {len(measured)} measured genes, first {first!r}. Leave "
            "them out, or pass keep_empty_cells=True to predict from a bare <lat>."
        )
        raise ValueError(msg)
    places = np.arange(len(cells.token_ids)) - np.repeat(cells.offsets[:-1], cells.n_genes)
    return cells, _selected(cells, places < max_genes)


def _selected(cells: TokenizedCells, is_kept: np.ndarray) -> TokenizedCells:
    """Keep some gene tokens (T,) of all cells."""
    kept_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_kept)])
    return TokenizedCells(
        offsets=kept_before[cells.offsets],
        token_ids=cells.token_ids[is_kept],
        values=cells.values[is_kept],
        lat_token_id=cells.lat_token_id,
        pad_token_id=cells.pad_token_id,
    )


def _observed(cells: TokenizedCells, queries: np.ndarray, is_measured: np.ndarray) -> np.ndarray:
    """Lay out (N, Q) observed values: 0 where measured and silent, NaN where not measured."""
    observed = np.zeros((cells.n_cells, len(queries)), dtype=np.float32)
    column_of = np.full(int(max(cells.token_ids.max(initial=0), queries.max(initial=0))) + 1, -1)
    column_of[queries[queries >= 0]] = np.flatnonzero(queries >= 0)
    columns = column_of[cells.token_ids]
    rows = np.repeat(np.arange(cells.n_cells), cells.n_genes)
    observed[rows[columns >= 0], columns[columns >= 0]] = cells.values[columns >= 0]
    observed[:, ~is_measured] = np.nan
    return observed


def _impute_slots(
    adata: Any, hidden_entries: Any, *, model: Any, tokenizer: Any, batch_size: int, **reading: Any
) -> anndata.AnnData:
    """Predict hidden values (N, G) at their slots.

    Returns:
        As `impute_expression`, without what only the decoder gives.

    Raises:
        ValueError: If ``hidden_entries`` has another shape than the file, or is not bool.
    """
    hidden = hidden_entries if issparse(hidden_entries) else np.asarray(hidden_entries)
    if hidden.shape != adata.shape or hidden.dtype != bool:
        msg = (
            f"hidden_entries must be bool of shape {adata.shape}, got {hidden.dtype} of shape {hidden.shape}."
        )
        raise ValueError(msg)
    hidden = csr_matrix(hidden)
    columns = _column_tokens(adata, tokenizer, reading)
    everything = read_cells(
        adata, tokenizer=tokenizer, **(reading | {"max_genes": max(tokenizer.vocab_size, 1)})
    )
    cells = read_cells(adata, tokenizer=tokenizer, **reading)
    column_of = np.full(tokenizer.vocab_size, -1)
    column_of[columns[columns >= 0]] = np.flatnonzero(columns >= 0)
    observed = _observed(everything, columns, columns >= 0)
    imputed = observed.copy()
    n_predicted = 0
    hides_gene = model.value_head.is_gene_conditioned
    with evaluation_mode(model), torch.inference_mode():
        for rows in length_batches(cells.n_genes, batch_size):
            inputs = cells.batch(rows)
            token_columns = column_of[inputs["input_ids"].numpy()]  # (B, S)
            is_hidden = hidden[rows].toarray()[np.arange(len(rows))[:, None], token_columns]
            is_hidden &= token_columns >= 0
            inputs["is_masked"] = torch.from_numpy(is_hidden)
            inputs["expression_values"] = inputs["expression_values"].masked_fill(inputs["is_masked"], 0.0)
            if hides_gene:
                inputs["labels"] = inputs["input_ids"].masked_fill(~inputs["is_masked"], IGNORED_LABEL)
                inputs["input_ids"] = inputs["input_ids"].masked_fill(
                    inputs["is_masked"], model.config.mask_token_id
                )
            outputs = model(**{name: entry.to(model.device) for name, entry in inputs.items()})
            predicted = outputs.expression_predictions.float().cpu().numpy()
            places = is_hidden.nonzero()
            observed[rows[places[0]], token_columns[places]] = np.nan
            imputed[rows[places[0]], token_columns[places]] = predicted[places]
            n_predicted += len(places[0])
    without_slot = hidden.nnz - n_predicted
    if without_slot:
        # Their true value must not stay in sight either.
        is_lost = hidden.toarray() & np.isfinite(observed)
        observed[is_lost], imputed[is_lost] = np.nan, np.nan
        logger.warning(
            "%d of %d hidden entries have no slot in their cell (silent, not in the vocabulary, or ranked "
            "behind max_genes) and stay NaN.",
            without_slot,
            hidden.nnz,
        )
    var = adata.var.copy()
    var["is_known"] = var["is_measured"] = columns >= 0
    counted = {
        "n_hidden": int(hidden.nnz),
        "n_hidden_without_slot": int(without_slot),
        "unit": _unit(tokenizer),
    }
    return _packed(adata, var, {IMPUTED: imputed, OBSERVED: observed}, model=model, counted=counted)


def _unit(tokenizer: Any) -> str:
    return f"log1p of counts per {tokenizer.target_sum:,.0f}"


def _packed(
    adata: Any,
    var: pd.DataFrame,
    layers: dict[str, np.ndarray],
    *,
    model: Any,
    counted: dict[str, Any],
) -> anndata.AnnData:
    """Make the AnnData that is returned, with what was done in ``uns["scdiva"]``."""
    imputed = anndata.AnnData(obs=adata.obs.copy(), var=var)
    for name, layer in layers.items():
        imputed.layers[name] = layer.astype(np.float32)
    checkpoint = getattr(model.config, "_name_or_path", "") or ""
    imputed.uns["scdiva"] = {
        "task": "impute_expression",
        "checkpoint": checkpoint.rstrip("/").rsplit("/", 1)[-1],
    } | counted
    return imputed
