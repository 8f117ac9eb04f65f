"""Reconstruction of cells: predictions of hidden genes and values; and a copy test, kept for the record.

Notable choices:
- Headline numbers are taken at hidden positions only, first averaged within a cell, then over cells.
- `copy_test` is the protocol of GeneMamba: clean input, arg-max at every position, ten cells joined into one
  sequence. It measures copying: a rule that repeats the next input gene gets an edit distance of 11 and a
  BLEU of 0.998, and a cell with the right genes in slightly other order scores like noise. It is computed
  for comparison with published tables and is no evidence of anything learned.
- Genes that a law gives equal probability count as ranked at random among each other.

Dimensions: n hidden positions of one cell, V vocabulary, L genes of a cell.
Source: METHOD.md section 8. GeneMamba: Qi et al. 2025, arXiv 2504.16956, its public reconstruction script.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, pearsonr, spearmanr

N_TOP = 10
FEWEST_FOR_CORRELATION = 3
LEAST_BLEU = 1e-50  # nltk gives about 1e-78 where a precision is zero


def score_gene_laws(log_laws: np.ndarray, true_genes: np.ndarray) -> dict[str, np.ndarray]:
    """Score the laws that a method gives to the hidden genes of one cell.

    Args:
        log_laws: (n, V) natural log probabilities, rows in the order of the positions; -inf is impossible.
        true_genes: (n,) tokens, each once.

    Returns:
        Per hidden gene, (n,) each: ``gene_loss`` in nats; ``top_1`` and ``top_10``, the probability that the
        true gene is among the first under random breaking of ties; ``predicted_genes``, the likeliest token;
        ``expected_place``, the mean place among the hidden positions at which the law sees the gene.

    Raises:
        ValueError: If the shapes do not fit, a gene comes twice, or a true gene has probability zero.
    """
    log_laws, true_genes = np.asarray(log_laws), np.asarray(true_genes)
    if log_laws.ndim != 2 or true_genes.shape != log_laws.shape[:1]:
        msg = f"log_laws must be (n, V) and true_genes (n,), got {log_laws.shape} and {true_genes.shape}."
        raise ValueError(msg)
    if len(np.unique(true_genes)) < len(true_genes):
        msg = "A gene occurs twice among the true genes; pass the hidden genes of one cell."
        raise ValueError(msg)
    true_log = log_laws[np.arange(len(true_genes)), true_genes].astype(np.float64)
    if not np.isfinite(true_log).all():
        first = int(true_genes[~np.isfinite(true_log)][0])
        msg = f"{int((~np.isfinite(true_log)).sum())} true genes have probability zero, the first is {first}."
        raise ValueError(msg)
    n_better = (log_laws > true_log[:, None].astype(log_laws.dtype)).sum(axis=1)
    n_equal = (log_laws == true_log[:, None].astype(log_laws.dtype)).sum(axis=1)
    among_true = log_laws[:, true_genes].astype(np.float64)  # (places, genes)
    of_place = np.exp(among_true - among_true.max(axis=0))
    places = np.arange(len(true_genes), dtype=np.float64)
    return {
        "gene_loss": -true_log,
        "top_1": np.clip((1 - n_better) / n_equal, 0.0, 1.0),
        f"top_{N_TOP}": np.clip((N_TOP - n_better) / n_equal, 0.0, 1.0),
        "predicted_genes": log_laws.argmax(axis=1),
        "expected_place": places @ of_place / of_place.sum(axis=0),
    }


def cell_gene_scores(of_genes: Mapping[str, np.ndarray], true_genes: np.ndarray) -> dict[str, float]:
    """Reduce the scores of the hidden genes of one cell.

    Args:
        of_genes: What `score_gene_laws` returned.
        true_genes: (n,) tokens in the order of the positions.

    Returns:
        ``gene_loss`` (nats per hidden gene), ``top_1_accuracy``, ``top_10_accuracy``; ``gene_set_precision``,
        ``gene_set_recall`` and ``gene_set_f1`` of the set of likeliest genes, whatever their places;
        ``order_spearman`` and ``order_kendall`` of true and expected places, absent below three genes;
        ``edit_distance``, Levenshtein over the number of hidden genes, 0 is best and 1 worst.
    """
    predicted = of_genes["predicted_genes"]
    n_found = len(np.intersect1d(predicted, true_genes))
    precision, recall = n_found / len(np.unique(predicted)), n_found / len(true_genes)
    scores = {
        "gene_loss": float(of_genes["gene_loss"].mean()),
        "top_1_accuracy": float(of_genes["top_1"].mean()),
        f"top_{N_TOP}_accuracy": float(of_genes[f"top_{N_TOP}"].mean()),
        "gene_set_precision": precision,
        "gene_set_recall": recall,
        "gene_set_f1": 2.0 * precision * recall / (precision + recall) if n_found else 0.0,
        "edit_distance": edit_distance(true_genes, predicted) / len(true_genes),
    }
    places, expected = np.arange(len(true_genes)), of_genes["expected_place"]
    if len(places) >= FEWEST_FOR_CORRELATION:
        varies = np.ptp(expected) > 0
        scores["order_spearman"] = float(spearmanr(places, expected).statistic) if varies else 0.0
        scores["order_kendall"] = float(kendalltau(places, expected).statistic) if varies else 0.0
    return scores


def cell_value_scores(true_values: np.ndarray, predicted_values: np.ndarray) -> dict[str, float]:
    """Score the hidden values of one cell.

    Args:
        true_values: (n,) log1p of normalised counts.
        predicted_values: (n,) predictions, same unit.

    Returns:
        ``value_mae`` and ``value_rmse``; from three values on also ``value_pearson``, ``value_spearman`` and
        ``value_slope`` of true on predicted values, 1 for a calibrated prediction. A constant prediction has
        correlations and slope 0; where the truth is constant the three are absent.

    Raises:
        ValueError: If shapes differ, or there is no value, or one is not finite.
    """
    true, predicted = (np.asarray(array, dtype=np.float64) for array in (true_values, predicted_values))
    if true.shape != predicted.shape or true.ndim != 1 or not len(true):
        msg = (
            f"true_values and predicted_values must be (n,) with n > 0, got {true.shape}, {predicted.shape}."
        )
        raise ValueError(msg)
    if not (np.isfinite(true).all() and np.isfinite(predicted).all()):
        msg = "true_values and predicted_values must be finite."
        raise ValueError(msg)
    errors = predicted - true
    scores = {"value_mae": float(np.abs(errors).mean()), "value_rmse": float(np.sqrt((errors**2).mean()))}
    if len(true) >= FEWEST_FOR_CORRELATION and np.ptp(true) > 0:
        varies = np.ptp(predicted) > 0
        scores["value_pearson"] = float(pearsonr(true, predicted).statistic) if varies else 0.0
        scores["value_spearman"] = float(spearmanr(true, predicted).statistic) if varies else 0.0
        scores["value_slope"] = float(np.polyfit(predicted, true, 1)[0]) if varies else 0.0
    return scores


def mean_over_cells(of_cells: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the scores of cells; a cell that has not a score is left out of that score.

    Args:
        of_cells: Scores of each cell.

    Returns:
        Name -> mean, and ``n_cells``.

    Raises:
        ValueError: If there is no cell.
    """
    if not of_cells:
        msg = "There is no cell to score: every cell is empty, or none was given."
        raise ValueError(msg)
    names = dict.fromkeys(name for scores in of_cells for name in scores)
    means = {name: float(np.mean([scores[name] for scores in of_cells if name in scores])) for name in names}
    return means | {"n_cells": len(of_cells)}


def copy_test(inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> dict[str, float]:
    """Compute the three numbers of the legacy copy test, as GeneMamba's script does.

    Args:
        inputs: Gene tokens of each cell, clean.
        outputs: Arg-max token at each of these positions.

    Returns:
        ``copy_edit_distance``, Levenshtein of all cells joined, a total and no mean (0 best); ``copy_bleu``,
        BLEU-4 of the joined sequences, no smoothing, the input as candidate; ``copy_spearman`` and
        ``copy_pearson`` of rank values from 1 to 0 over the pooled rows of all cells, output duplicates
        averaged, missing genes 0.

    Raises:
        ValueError: If there is no cell, or lengths differ.
    """
    lengths = [(len(tokens), len(copied)) for tokens, copied in zip(inputs, outputs, strict=True)]
    if not lengths or any(before != after or before < 1 for before, after in lengths):
        msg = f"Each cell needs as many output tokens as input tokens, at least one; got lengths {lengths}."
        raise ValueError(msg)
    joined, copied = (np.concatenate([np.asarray(cell) for cell in cells]) for cells in (inputs, outputs))
    tables = []
    for sequences in (inputs, outputs):
        ranks = [
            np.linspace(1.0, 0.0, len(tokens)) if len(tokens) > 1 else np.ones(1) for tokens in sequences
        ]
        cells = np.repeat(np.arange(len(sequences)), [len(tokens) for tokens in sequences])
        flat = np.concatenate([np.asarray(tokens) for tokens in sequences])
        tables.append(pd.DataFrame({"token": flat, "cell": cells, "rank": np.concatenate(ranks)}))
    averaged = tables[1].groupby(["token", "cell"], as_index=False)["rank"].mean()
    # Input duplicates stay as they are and meet one averaged output row.
    merged = (
        tables[0].merge(averaged, on=["token", "cell"], how="outer", suffixes=("_in", "_out")).fillna(0.0)
    )
    before, after = merged["rank_in"].to_numpy(), merged["rank_out"].to_numpy()
    varies = np.ptp(before) > 0 and np.ptp(after) > 0
    return {
        "copy_edit_distance": float(edit_distance(joined, copied)),
        "copy_bleu": bleu(joined, copied),
        "copy_spearman": float(spearmanr(before, after).statistic) if varies else 0.0,
        "copy_pearson": float(pearsonr(before, after).statistic) if varies else 0.0,
    }


def edit_distance(first: Sequence[Any] | np.ndarray, second: Sequence[Any] | np.ndarray) -> int:
    """Count the insertions, deletions and substitutions that turn one sequence of tokens into another.

    Args:
        first: Tokens.
        second: Tokens.

    Returns:
        Levenshtein distance.

    Raises:
        ImportError: If rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        msg = 'Edit distances need the package rapidfuzz: pip install "scdiva[eval]"'
        raise ImportError(msg) from error
    return int(Levenshtein.distance(list(map(int, first)), list(map(int, second))))


def bleu(candidate: Sequence[Any] | np.ndarray, reference: Sequence[Any] | np.ndarray) -> float:
    """Compute BLEU-4 of token ids, uniform weights, no smoothing.

    Args:
        candidate: Tokens.
        reference: Tokens.

    Returns:
        BLEU in [0, 1]; 0 where no four tokens in a row agree.

    Raises:
        ImportError: If nltk is not installed.
    """
    try:
        from nltk.translate.bleu_score import sentence_bleu
    except ImportError as error:
        msg = 'BLEU needs the package nltk: pip install "scdiva[eval]"'
        raise ImportError(msg) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # its advice to smooth
        score = float(sentence_bleu([list(map(int, reference))], list(map(int, candidate))))
    return score if score > LEAST_BLEU else 0.0
