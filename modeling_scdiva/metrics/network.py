"""How well scored pairs of transcription factor (TF) and target agree with a table of known edges.

Notable choices:
- The universe of pairs is stated and the same for every method: TFs with at least one edge there, TF and
  target both expressed, no self loops. A pair that a method gives no score (NaN) ranks last, tied with its
  like, and is counted.
- Ties are ties: precision-recall and early precision treat equal scores alike, whatever their order.
- Ratios over prevalence, because the share of edges differs between tables and cells; 1 is chance.
- Means over TFs beside the pooled number, which a few TFs with hundreds of edges decide.
- Known edges are few of the true ones and follow the literature; even a perfect method would not reach 1.

Dimensions: T TFs, G targets, E edges in the universe.
Source: Pratapa et al. 2020, Nature Methods 17:147 (BEELINE), for early precision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

MIN_EXPRESSED_FRACTION = 0.01


@dataclass(frozen=True)
class NetworkUniverse:
    """Which pairs are scored, and which of them are edges.

    Attributes:
        tfs: (T,) names of the TFs.
        targets: (G,) names of the targets.
        is_edge: (T, G) bool, edges of the reference.
        is_candidate: (T, G) bool, False for self loops only.
        signs: (T, G) int8, +1 where the reference says activation, -1 for repression, 0 elsewhere.
        left_out: What of the reference is not in the universe, counted by reason.
    """

    tfs: list[str]
    targets: list[str]
    is_edge: np.ndarray
    is_candidate: np.ndarray
    signs: np.ndarray
    left_out: dict[str, int]


def network_universe(
    edges: Sequence[tuple[str, str]] | Sequence[tuple[str, str, int]],
    *,
    expressed_fraction: Mapping[str, float],
    min_expressed_fraction: float = MIN_EXPRESSED_FRACTION,
) -> NetworkUniverse:
    """Choose the pairs that a method is judged on, from the reference and the cells alone.

    Args:
        edges: (TF, target) or (TF, target, sign) of the reference; duplicates count once, and lose their sign
            where they disagree on it.
        expressed_fraction: Gene -> share of the cells that express it, for all genes that a method could
            score.
        min_expressed_fraction: Least share for TF and target.

    Returns:
        The universe, TFs and targets sorted by name.

    Raises:
        ValueError: If no edge lies in it, or no pair in it is not an edge.
    """
    expressed = {gene for gene, share in expressed_fraction.items() if share >= min_expressed_fraction}
    signs: dict[tuple[str, str], set[int]] = {}
    for tf, target, *sign in edges:
        signs.setdefault((tf, target), set()).add(int(np.sign(sign[0])) if sign else 0)
    n_self = sum(tf == target for tf, target in signs)
    pairs = [pair for pair in signs if pair[0] != pair[1]]
    kept = [pair for pair in pairs if pair[0] in expressed and pair[1] in expressed]
    n_unknown = sum(tf not in expressed_fraction or gene not in expressed_fraction for tf, gene in pairs)
    left_out = {
        "self_loops": n_self,
        "gene_not_scored": n_unknown,
        "gene_rarely_expressed": len(pairs) - len(kept) - n_unknown,
    }
    if not kept:
        msg = (
            f"None of the {len(signs)} edges joins two genes that {min_expressed_fraction:.0%} or more of "
            f"the cells express ({left_out}). Do reference and cells name genes alike, by symbol?"
        )
        raise ValueError(msg)
    tfs, targets = sorted({tf for tf, _ in kept}), sorted(expressed)
    row_of, column_of = ({name: i for i, name in enumerate(names)} for names in (tfs, targets))
    is_edge = np.zeros((len(tfs), len(targets)), dtype=bool)
    sign_of = np.zeros(is_edge.shape, dtype=np.int8)
    for pair in kept:
        place = row_of[pair[0]], column_of[pair[1]]
        is_edge[place] = True
        sign_of[place] = next(iter(signs[pair])) if len(signs[pair]) == 1 else 0
    is_candidate = np.array(tfs)[:, None] != np.array(targets)[None, :]
    if is_edge[is_candidate].all():
        msg = f"All {len(kept)} pairs of the universe are edges; there is nothing to tell apart."
        raise ValueError(msg)
    return NetworkUniverse(tfs, targets, is_edge, is_candidate, sign_of, left_out)


def network_metrics(
    scores: np.ndarray, is_edge: np.ndarray, *, is_candidate: np.ndarray | None = None
) -> dict[str, Any]:
    """Score a ranking of pairs against known edges.

    Args:
        scores: (T, G) higher = rather an edge; take absolute values of signed scores first. NaN: no score.
        is_edge: (T, G) bool, known edges.
        is_candidate: (T, G) bool, pairs of the universe; default all.

    Returns:
        ``auprc`` (average precision) and ``auprc_ratio`` to the prevalence, chance 1; ``auroc``, chance 0.5;
        ``early_precision``, the share of edges among the E best pairs and all tied with the last of them,
        and ``early_precision_ratio`` to the prevalence, chance 1; ``tf_auprc`` and ``tf_auroc``, means over
        the TFs (chance of the latter 0.5; that of the former lies above the prevalence where a TF has few
        edges: compare with random scores); ``prevalence``; ``n_pairs``, ``n_edges``, ``n_tfs`` (those with
        edges and other pairs) and ``n_unscored``.

    Raises:
        ValueError: If shapes differ, a score is infinite, or the pairs are all edges or all others.
    """
    scores, is_edge, is_candidate = _checked(scores, is_edge, is_candidate)
    truth, ranked = is_edge[is_candidate], _with_last(scores[is_candidate])
    prevalence = float(truth.mean())
    if prevalence in (0.0, 1.0):
        msg = f"{int(truth.sum())} of {len(truth)} pairs are edges; some must be and some must not."
        raise ValueError(msg)
    auprc, early = float(average_precision_score(truth, ranked)), early_precision(ranked, truth)
    of_tfs = tf_metrics(scores, is_edge, is_candidate=is_candidate)
    is_scored = np.isfinite(of_tfs["auprc"])
    return {
        "auprc": auprc,
        "auprc_ratio": auprc / prevalence,
        "auroc": float(roc_auc_score(truth, ranked)),
        "early_precision": early,
        "early_precision_ratio": early / prevalence,
        "tf_auprc": float(of_tfs["auprc"][is_scored].mean()) if is_scored.any() else None,
        "tf_auroc": float(of_tfs["auroc"][is_scored].mean()) if is_scored.any() else None,
        "prevalence": prevalence,
        "n_pairs": len(truth),
        "n_edges": int(truth.sum()),
        "n_tfs": int(is_scored.sum()),
        "n_unscored": int(np.isnan(scores[is_candidate]).sum()),
    }


def tf_metrics(
    scores: np.ndarray, is_edge: np.ndarray, *, is_candidate: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Score the ranking of each TF's own pairs.

    Args:
        scores: (T, G) higher = rather an edge; NaN ranks last.
        is_edge: (T, G) bool, known edges.
        is_candidate: (T, G) bool, pairs of the universe; default all.

    Returns:
        ``auprc`` and ``auroc``, both (T,); NaN for a TF without edges or without other pairs.
    """
    scores, is_edge, is_candidate = _checked(scores, is_edge, is_candidate)
    auprc, auroc = np.full(len(scores), np.nan), np.full(len(scores), np.nan)
    for row, (of_tf, truth, is_wanted) in enumerate(zip(scores, is_edge, is_candidate, strict=True)):
        edges = truth[is_wanted]
        if edges.any() and not edges.all():
            ranked = _with_last(of_tf[is_wanted])
            auprc[row] = average_precision_score(edges, ranked)
            auroc[row] = roc_auc_score(edges, ranked)
    return {"auprc": auprc, "auroc": auroc}


def early_precision(scores: np.ndarray, is_edge: np.ndarray) -> float:
    """Compute the share of edges among as many best pairs as there are edges.

    Args:
        scores: (n,) higher = rather an edge.
        is_edge: (n,) bool.

    Returns:
        Share in [0, 1]; all pairs tied with the last one are in, and in the denominator.

    Raises:
        ValueError: If there is no edge.
    """
    scores, is_edge = np.asarray(scores), np.asarray(is_edge, dtype=bool)
    n_edges = int(is_edge.sum())
    if n_edges == 0:
        msg = "Early precision needs at least one edge, got none."
        raise ValueError(msg)
    threshold = np.partition(scores, len(scores) - n_edges)[len(scores) - n_edges]
    return float(is_edge[scores >= threshold].mean())


def sign_agreement(scores: np.ndarray, signs: np.ndarray) -> dict[str, Any]:
    """Compare the signs of scores with those of known edges.

    Args:
        scores: (T, G) signed scores, NaN where there is none.
        signs: (T, G) +1 activation, -1 repression, 0 no edge or unknown.

    Returns:
        ``sign_accuracy`` and ``balanced_sign_accuracy`` (mean over activations and repressions, chance 0.5)
        over the signed edges with a score that is not zero; None where a kind is missing.
        ``majority_sign_accuracy``, what saying the commoner sign gives; ``n_signed_edges``, of them.

    Raises:
        ValueError: If the shapes differ.
    """
    scores, signs = np.asarray(scores, dtype=np.float64), np.asarray(signs)
    if scores.shape != signs.shape:
        msg = f"scores {scores.shape} and signs {signs.shape} must have one shape."
        raise ValueError(msg)
    is_usable = (signs != 0) & np.isfinite(scores) & (scores != 0)
    is_right, truth = np.sign(scores[is_usable]) == signs[is_usable], signs[is_usable]
    kinds = [is_right[truth == sign] for sign in (1, -1)]
    has_both = all(len(kind) for kind in kinds)
    return {
        "sign_accuracy": float(is_right.mean()) if len(truth) else None,
        "balanced_sign_accuracy": float(np.mean([kind.mean() for kind in kinds])) if has_both else None,
        "majority_sign_accuracy": max(len(kind) for kind in kinds) / len(truth) if len(truth) else None,
        "n_signed_edges": len(truth),
    }


def _checked(
    scores: np.ndarray, is_edge: np.ndarray, is_candidate: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, is_edge = np.asarray(scores, dtype=np.float64), np.asarray(is_edge, dtype=bool)
    is_candidate = np.ones(is_edge.shape, bool) if is_candidate is None else np.asarray(is_candidate, bool)
    if scores.ndim != 2 or scores.shape != is_edge.shape or scores.shape != is_candidate.shape:
        shapes = f"{scores.shape}, {is_edge.shape} and {is_candidate.shape}"
        msg = f"scores, is_edge and is_candidate must all be (TFs, targets), got {shapes}."
        raise ValueError(msg)
    if np.isinf(scores[is_candidate]).any():
        msg = "scores must be finite, or NaN where a method has none."
        raise ValueError(msg)
    return scores, is_edge, is_candidate


def _with_last(scores: np.ndarray) -> np.ndarray:
    """Put pairs without a score behind all others, tied."""
    is_missing = np.isnan(scores)
    if not is_missing.any():
        return scores
    last = scores[~is_missing].min() - 1.0 if not is_missing.all() else 0.0
    return np.where(is_missing, last, scores)
