"""Gene networks read out of a trained model: which genes a transcription factor (TF) seems to inform on.

What comes out are hypotheses: a model of which genes are seen together scores pairs, and nothing here tells
cause from company. Compare with co-expression on the same cells before believing a pair.

Notable choices:
- The rule for attention is fixed, never chosen by the result: mean over all layers and heads, special tokens
  dropped, ranks over all pairs of the cell's genes scaled to (0, 1], mean over the cells that show both. The
  score of TF -> target is the attention that the target pays to the TF.
- Conditional dependence is log p(target | TF in sight) - log p(target | TF hidden), in nats, mean over cells,
  with its sign: above 0, seeing the TF makes the target likelier at its rank. Targets are hidden group by
  group, every pair of a cell once. The TF itself is no candidate in either run; else it would lower every
  other gene by being one candidate more. Hidden is not absent: its rank stays known.
- A cell with T TFs costs n_groups x (1 + T) forward passes for this, and one for attention.
- Pairs seen together in too few cells have no score (NaN), not a low one.

Dimensions: N cells, G genes in a file, T TFs, K targets, V vocabulary, S positions, B cells of a batch, n
genes of a cell, R runs of a cell.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from scipy.stats import rankdata
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_scdiva.pretrained_scdiva import evaluation_mode
from modeling_scdiva.tasks.cells import (
    CellTokenizer,
    TokenizedCells,
    check_vocabulary,
    encoder_of,
    length_batches,
    read_cells,
    shown,
)
from modeling_scdiva.tasks.genes import find_genes, gene_name

logger = logging.getLogger(__name__)

METHODS = ("attention", "conditional")
NOTE = "Hypotheses from a model of co-occurrence, not measured regulation."
# A probability this close to 1 leaves the others none to share.
MAX_PROBABILITY = 1.0 - 1e-9


@dataclass(frozen=True)
class NetworkSettings:
    """How a network is inferred.

    Attributes:
        min_cells: Cells that must show both genes of a pair.
        batch_size: Cells, or runs of a cell, in one forward pass.
        n_groups: Parts in which the targets of a cell are hidden; "conditional" only.
        seed: Of these parts.
        show_progress: Show a progress bar.
    """

    min_cells: int = 10
    batch_size: int = 16
    n_groups: int = 4
    seed: int = 0
    show_progress: bool = True

    def __post_init__(self) -> None:
        for name in ("min_cells", "batch_size", "n_groups"):
            if getattr(self, name) < 1:
                msg = f"{name} must be at least 1, got {getattr(self, name)}."
                raise ValueError(msg)


def infer_gene_network(
    adata: Any,
    *,
    model: PreTrainedModel,
    tokenizer: CellTokenizer,
    tfs: Sequence[str],
    targets: Sequence[str] | None = None,
    method: str = "attention",
    settings: NetworkSettings | None = None,
    **reading: Any,
) -> pd.DataFrame:
    """Score pairs of TF and target from what the model does with the cells.

    Eager attention, which alone returns its weights, is switched on for "attention" and off again.

    Args:
        adata: AnnData with N cells; choose them, the network is of these cells.
        model: Any scDiVa model for "attention"; a `ScDivaForMaskedDiffusion` for "conditional".
        tokenizer: The tokenizer of this model.
        tfs: Gene ids, symbols or other names of the TFs. Unknown ones are left out and logged.
        targets: The same of the targets; default every gene that ``min_cells`` cells show.
        method: "attention" or "conditional"; see the module.
        settings: Cells per pair, batches, groups and seed.
        **reading: How to read the AnnData, as in `read_cells`.

    Returns:
        (T, K) float64, TFs as rows under the names given, targets as columns, by default under their symbols;
        NaN for self loops and for pairs seen together in fewer than ``min_cells`` cells. ``attrs`` holds
        ``method``, ``n_cells``, ``min_cells``, ``unknown_tfs``, ``unknown_targets`` and ``note``.

    Raises:
        ValueError: If the method is another, or no pair is seen together in enough cells.
        TypeError: If "conditional" gets a model without a gene head.
    """
    settings = NetworkSettings() if settings is None else settings
    if method not in METHODS:
        msg = f"method must be one of {METHODS}, got {method!r}."
        raise ValueError(msg)
    if method == "conditional" and not hasattr(model, "lm_head"):
        msg = f'"conditional" needs the gene head of ScDivaForMaskedDiffusion, not {type(model).__name__}.'
        raise TypeError(msg)
    check_vocabulary(model, tokenizer)
    cells = read_cells(adata, tokenizer=tokenizer, **reading)
    tf_names, unknown_tfs = find_genes(tfs, tokenizer.vocabulary, what="TFs")
    target_names, unknown_targets = _find_targets(targets, cells, tokenizer, settings.min_cells)
    pairs = _PairMeans(list(tf_names), list(target_names), tokenizer.vocab_size)
    score = _score_attention if method == "attention" else _score_conditional
    score(model, cells, pairs, settings)
    scores = pairs.means(settings.min_cells)
    if np.isnan(scores).all():
        msg = (
            f"No TF and target are both shown by min_cells={settings.min_cells} of {cells.n_cells} cells. "
            f"TFs: {shown(tf_names.values())}. A cell shows its first max_genes genes only."
        )
        raise ValueError(msg)
    network = pd.DataFrame(scores, index=list(tf_names.values()), columns=list(target_names.values()))
    network.attrs = {"method": method, "n_cells": cells.n_cells, "min_cells": settings.min_cells}
    network.attrs |= {"unknown_tfs": unknown_tfs, "unknown_targets": unknown_targets, "note": NOTE}
    return network


def _find_targets(
    targets: Sequence[str] | None, cells: TokenizedCells, tokenizer: CellTokenizer, min_cells: int
) -> tuple[dict[int, str], list[str]]:
    """Return token -> name of the targets, by default all genes that enough cells show, and the unknown."""
    if targets is not None:
        return find_genes(targets, tokenizer.vocabulary, what="targets")
    n_showing = np.bincount(cells.token_ids, minlength=tokenizer.vocab_size)
    often = np.flatnonzero(n_showing >= min_cells).tolist()
    return {token: gene_name(token, tokenizer.vocabulary) for token in often}, []


def regulon(network: pd.DataFrame, tf: str, *, n_targets: int | None = None) -> pd.DataFrame:
    """Rank the targets of one TF.

    Args:
        network: (T, K) from `infer_gene_network`.
        tf: One of its rows.
        n_targets: Best ones to return; default all that have a score.

    Returns:
        One row per target, strongest first: ``target``, ``score``, and ``sign``, -1, 0 or 1 ("conditional";
        attention is never negative). Ties stand in the order of the columns.

    Raises:
        KeyError: If the network has no such TF.
    """
    if tf not in network.index:
        msg = f"The network has no TF {tf!r}. TFs: {shown(network.index)}."
        raise KeyError(msg)
    scores = network.loc[tf].dropna()
    order = np.argsort(-scores.abs().to_numpy(), kind="stable")[:n_targets]
    ranked = scores.iloc[order]
    table = pd.DataFrame(
        {
            "target": ranked.index.to_numpy(),
            "score": ranked.to_numpy(),
            "sign": np.sign(ranked.to_numpy()).astype(int),
        }
    )
    table.attrs = dict(network.attrs)
    return table


def network_matrix(
    network: pd.DataFrame, adata: Any, *, tokenizer: CellTokenizer, **reading: Any
) -> csr_matrix:
    """Lay a network out over the genes of a file, for ``adata.varp["scdiva_network"]``.

    Args:
        network: (T, K) from `infer_gene_network` on this file.
        adata: AnnData with G genes.
        tokenizer: The tokenizer that was used.
        **reading: How to match the genes, as in `ScDivaTokenizer.match_genes`.

    Returns:
        (G, G) CSR float64, rows TFs, columns targets; nothing is stored where there is no score.

    Raises:
        ValueError: If the file lacks a gene that has a score.
    """
    token_ids = np.asarray(tokenizer.match_genes(adata, **reading).token_ids)
    column_of = np.full(tokenizer.vocab_size, -1)
    column_of[token_ids[token_ids >= 0]] = np.flatnonzero(token_ids >= 0)
    rows, columns = np.nonzero(network.notna().to_numpy())
    places = []
    for names, chosen in ((network.index, rows), (network.columns, columns)):
        found, _ = find_genes(names, tokenizer.vocabulary, what="genes")
        column_of_name = {name: column_of[token] for token, name in found.items()}
        places.append(np.array([column_of_name.get(name, -1) for name in names], dtype=np.int64)[chosen])
        is_missing = places[-1] < 0
        if is_missing.any():
            missing = sorted({names[i] for i in chosen[is_missing]})
            msg = f"{len(missing)} genes of the network are not in this AnnData: {shown(missing)}."
            raise ValueError(msg)
    values = network.to_numpy()[rows, columns]
    return csr_matrix((values, tuple(places)), shape=(adata.n_vars, adata.n_vars))


class _PairMeans:
    """Sums over cells of the scores of pairs, and how many cells they come from."""

    def __init__(self, tf_ids: Sequence[int], target_ids: Sequence[int], vocab_size: int) -> None:
        self.tf_rows = np.full(vocab_size, -1)
        self.tf_rows[tf_ids] = np.arange(len(tf_ids))
        self.target_columns = np.full(vocab_size, -1)
        self.target_columns[target_ids] = np.arange(len(target_ids))
        self.sums = np.zeros((len(tf_ids), len(target_ids)))
        self.n_cells = np.zeros(self.sums.shape, dtype=np.int32)

    def places(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of a cell's genes (n,) are TFs and which targets, as indices."""
        return np.flatnonzero(self.tf_rows[token_ids] >= 0), np.flatnonzero(
            self.target_columns[token_ids] >= 0
        )

    def add(self, token_ids: np.ndarray, scores: np.ndarray) -> None:
        """Add the scores (TFs of the cell, targets of the cell) of one cell; NaN counts as not seen."""
        tf_places, target_places = self.places(token_ids)
        pairs = np.ix_(self.tf_rows[token_ids[tf_places]], self.target_columns[token_ids[target_places]])
        is_seen = np.isfinite(scores)
        self.sums[pairs] += np.where(is_seen, scores, 0.0)
        self.n_cells[pairs] += is_seen

    def means(self, min_cells: int) -> np.ndarray:
        """Return the means (T, K), NaN for pairs of fewer cells."""
        is_enough = self.n_cells >= min_cells
        return np.divide(self.sums, self.n_cells, out=np.full(self.sums.shape, np.nan), where=is_enough)


# --- attention ---


def rank_pairs(weights: np.ndarray) -> np.ndarray:
    """Replace the attention between the genes of one cell by its rank among all pairs.

    Args:
        weights: (n, n) attention that the gene of the row pays to the gene of the column.

    Returns:
        (n, n) float64 in (0, 1], 1 for the strongest, ties at their mean rank; NaN on the diagonal.
    """
    ranks = np.full(weights.shape, np.nan)
    is_pair = ~np.eye(len(weights), dtype=bool)
    ranks[is_pair] = rankdata(weights[is_pair]) / max(1, int(is_pair.sum()))
    return ranks


@contextmanager
def eager_attention(encoder: PreTrainedModel) -> Iterator[None]:
    """Use the attention that returns its weights, and give the former one back, also after an error."""
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        encoder.set_attn_implementation(before)


def _score_attention(
    model: PreTrainedModel, cells: TokenizedCells, pairs: _PairMeans, settings: NetworkSettings
) -> None:
    encoder = encoder_of(model)
    bar = tqdm(total=cells.n_cells, unit=" cells", desc="Attention", disable=not settings.show_progress)
    with bar, eager_attention(encoder), evaluation_mode(encoder), torch.inference_mode():
        for rows in length_batches(cells.n_genes, settings.batch_size):
            weights = _mean_attention(encoder, cells.batch(rows))  # (B, S, S)
            for row, of_cell in zip(rows, weights, strict=True):
                token_ids = cells.token_ids[cells.offsets[row] : cells.offsets[row + 1]]  # (n,)
                inner = slice(1, 1 + len(token_ids))  # without <lat> and padding
                tf_places, target_places = pairs.places(token_ids)
                ranks = rank_pairs(of_cell[inner, inner])
                # The target looks at the TF: its row, the TF's column.
                pairs.add(token_ids, ranks[np.ix_(target_places, tf_places)].T)
            bar.update(len(rows))


def _mean_attention(encoder: PreTrainedModel, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """Average the attention (B, S, S) over all layers and heads; one layer at a time is in memory."""
    total = torch.zeros(())
    layers: Any = encoder.layers

    def keep(module: Any, inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        nonlocal total
        if outputs[1] is None:
            msg = 'The attention returned no weights. Load the model with attn_implementation="eager".'
            raise RuntimeError(msg)
        total = total.to(outputs[1].device) + outputs[1].float().mean(dim=1)  # (B, S, S)

    hooks = [layer.self_attn.register_forward_hook(keep) for layer in layers]
    try:
        encoder(**{name: tensor.to(encoder.device) for name, tensor in batch.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return (total / len(layers)).cpu().numpy()


# --- conditional dependence ---


def _score_conditional(
    model: PreTrainedModel, cells: TokenizedCells, pairs: _PairMeans, settings: NetworkSettings
) -> None:
    bar = tqdm(total=cells.n_cells, unit=" cells", desc="Hiding TFs", disable=not settings.show_progress)
    n_passes = 0
    with bar, evaluation_mode(model), torch.inference_mode():
        for row in range(cells.n_cells):
            token_ids = cells.token_ids[cells.offsets[row] : cells.offsets[row + 1]]  # (n,)
            tf_places, target_places = pairs.places(token_ids)
            if len(tf_places):
                rng = np.random.default_rng([settings.seed, row])
                groups = np.array_split(rng.permutation(target_places), settings.n_groups)
                cell = {
                    name: tensor.to(model.device) for name, tensor in cells.batch(np.array([row])).items()
                }
                effects = np.full((len(tf_places), len(token_ids)), np.nan)
                for group in groups:
                    if len(group):
                        effects[:, group] = _group_effects(model, cell, tf_places, group, settings.batch_size)
                        n_passes += 1 + len(tf_places)
                pairs.add(token_ids, effects[:, target_places])
            bar.update(1)
    logger.info("Conditional dependence took %d forward passes of single cells.", n_passes)


def _group_effects(
    model: PreTrainedModel,
    cell: dict[str, torch.Tensor],
    tf_places: np.ndarray,
    group: np.ndarray,
    batch_size: int,
) -> np.ndarray:
    """Compute log p(gene | TF in sight) - log p(gene | TF hidden) for a group of genes of one cell.

    The first run hides the group. One run per TF hides the TF too or, where the TF is in the group, shows it.

    Returns:
        (TFs, genes of the group) nats; NaN for self loops.
    """
    n_runs = 1 + len(tf_places)
    is_hidden = np.zeros((n_runs, cell["input_ids"].shape[1] - 1), dtype=bool)
    is_hidden[:, group] = True
    is_hidden[np.arange(1, n_runs), tf_places] ^= True
    is_tf_in_group = np.isin(tf_places, group)
    is_asked = np.tile(np.isin(np.arange(is_hidden.shape[1]), group), (n_runs, 1))
    is_asked[np.arange(1, n_runs), tf_places] = False
    log_p, log_p_tfs = [], []
    for start in range(0, n_runs, batch_size):
        part = slice(start, start + batch_size)
        answers = _log_probabilities(model, cell, is_hidden[part], is_asked[part], tf_places)
        log_p.append(answers[0])
        log_p_tfs.append(answers[1])
    # Without the TF among the candidates, p / (1 - p of the TF), in both runs that are compared.
    p_tfs = np.minimum(np.exp(np.concatenate(log_p_tfs)), MAX_PROBABILITY)  # (runs, n, TFs)
    without_tf = np.concatenate(log_p)[..., None] - np.log1p(-p_tfs)
    first, own = without_tf[0].T, without_tf[np.arange(1, n_runs), :, np.arange(len(tf_places))]  # (TFs, n)
    effects = np.where(is_tf_in_group[:, None], own - first, first - own)
    return effects[:, group]


def _log_probabilities(
    model: PreTrainedModel,
    cell: dict[str, torch.Tensor],
    is_hidden: np.ndarray,
    is_asked: np.ndarray,
    tf_places: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Run one cell with other genes hidden in each run.

    Returns:
        (runs, n) log-probability of the true gene where it is asked for, and (runs, n, TFs) that of each TF
        there; NaN elsewhere.
    """
    # False at <lat>, which is never hidden.
    hidden, asked = (
        torch.from_numpy(np.pad(mask, ((0, 0), (1, 0)))).to(model.device) for mask in (is_hidden, is_asked)
    )  # (B, S)
    batch = {name: tensor.expand(len(hidden), -1) for name, tensor in cell.items()}
    true_ids = batch["input_ids"]
    batch["input_ids"] = true_ids.masked_fill(hidden, model.config.mask_token_id)
    labels = true_ids.masked_fill(~asked, -100)
    logits = model(**batch, labels=labels, output_all_logits=False).logits.float()  # (asked, V)
    log_sum = logits.logsumexp(dim=1, keepdim=True)
    tf_ids = true_ids[0, torch.from_numpy(1 + tf_places).to(model.device)]
    log_p = np.full(is_asked.shape, np.nan)
    log_p[is_asked] = (logits.gather(1, labels[asked][:, None]) - log_sum)[:, 0].double().cpu().numpy()
    log_p_tfs = np.full((*is_asked.shape, len(tf_places)), np.nan)
    log_p_tfs[is_asked] = (logits[:, tf_ids] - log_sum).double().cpu().numpy()
    return log_p, log_p_tfs
