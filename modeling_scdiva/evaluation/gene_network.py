"""Gene networks of a model against a table of known edges, beside co-expression and popularity.

Notable choices:
- The table of edges is the user's: TF, target and, if known, confidence and sign.
- Universe: TFs with an edge, TF and target in vocabulary and file and expressed in a share of all cells, no
  self loops; the same for every method.
- A run draws cells; every method gets the same. The spread is that over draws.
- Pairs that the model cannot score, because hardly a cell shows both among its first genes, rank last. The
  same numbers over the pairs that it does score stand in rows of their own.
- Nothing is fitted and no edge is looked at before scoring, except by the row that says so.
- TFs are the unit of the intervals: pairs of one TF are not independent.

Dimensions: N cells, V vocabulary, T TFs, K targets.
Source: Pratapa et al. 2020, Nature Methods 17:147 (BEELINE).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from modeling_scdiva.evaluation.figures import draw_paired_scores
from modeling_scdiva.evaluation.report import summarise
from modeling_scdiva.fresh_model import random_weights
from modeling_scdiva.metrics.intervals import paired_bootstrap_difference
from modeling_scdiva.metrics.network import (
    MIN_EXPRESSED_FRACTION,
    NetworkUniverse,
    network_metrics,
    network_universe,
    sign_agreement,
    tf_metrics,
)
from modeling_scdiva.metrics.network_baselines import (
    coexpression_network,
    degree_network,
    mean_expression_network,
    random_network,
)
from modeling_scdiva.tasks.cells import CellTokenizer, read_cells, refuse_path, shown
from modeling_scdiva.tasks.gene_network import METHODS, NetworkSettings, infer_gene_network
from modeling_scdiva.tasks.genes import gene_name

TF_NAMES, TARGET_NAMES = ("tf", "source", "regulator"), ("target", "target_gene", "gene")
SIGN_NAMES = ("sign", "mor", "mode", "effect")
SIGN_OF_WORD = {"activation": 1, "repression": -1, "unknown": 0, "none": 0, "<na>": 0}
PEARSON, MODEL = "|Pearson|", "scDiVa"
MIN_TFS_FOR_INTERVAL = 3
COLUMNS = (
    "data", "method", "auprc", "auprc_ratio", "auroc", "early_precision_ratio", "tf_auprc", "tf_auroc",
    "balanced_sign_accuracy", "n_unscored", "n_seeds",
)  # fmt: skip


@dataclass(frozen=True)
class NetworkProtocol:
    """What is measured.

    Attributes:
        n_cells: Cells drawn for a run; all where there are fewer.
        methods: Ways of asking the model, see `infer_gene_network`.
        random_methods: Ways of asking the model with random weights.
        min_expressed_fraction: Share of all cells that must express TF and target.
        settings: Cells per pair, batches, groups.
    """

    n_cells: int = 300
    methods: Sequence[str] = METHODS
    random_methods: Sequence[str] = ("attention",)
    min_expressed_fraction: float = MIN_EXPRESSED_FRACTION
    settings: NetworkSettings = field(default_factory=lambda: NetworkSettings(show_progress=False))


def read_reference_network(path: str | Path, *, confidences: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a table of known edges.

    Args:
        path: Parquet, CSV or TSV file with a column ``tf`` (or ``source``, ``regulator``), a column
            ``target`` (or ``target_gene``, ``gene``), and perhaps ``confidence`` and ``sign`` (or ``mor``).
        confidences: Classes of confidence to keep, such as A, B and C of DoRothEA; default all.

    Returns:
        Columns ``tf``, ``target`` and ``sign`` (+1, -1, 0 unknown), one row per edge of the file; the words
        Activation and Repression are read as signs.

    Raises:
        KeyError: If a column is missing.
        ValueError: If the file is of another kind, or no edge has the confidence asked for.
    """
    path = Path(path)
    endings = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if endings == "parquet":
        table = pd.read_parquet(path)
    elif endings in ("csv", "tsv", "txt"):
        table = pd.read_csv(path, sep="," if endings == "csv" else "\t")
    else:
        msg = f"{path.name}: a table of edges is a .parquet, .csv, .tsv or .txt file (.gz of the last three)."
        raise ValueError(msg)
    names = {str(name).lower(): name for name in table.columns}
    chosen: dict[str, Any] = {}
    for wanted, others in (("tf", TF_NAMES), ("target", TARGET_NAMES), ("sign", SIGN_NAMES)):
        found = next((names[name] for name in others if name in names), None)
        if found is None and wanted != "sign":
            msg = f"{path.name} has no column {wanted!r}. Columns: {shown(table.columns)}."
            raise KeyError(msg)
        chosen[wanted] = 0 if found is None else table[found]
    edges = pd.DataFrame(chosen)
    edges["sign"] = [_sign(entry, path.name) for entry in edges["sign"]]
    if confidences is not None:
        if "confidence" not in names:
            msg = f"{path.name} has no column 'confidence'. Columns: {shown(table.columns)}."
            raise KeyError(msg)
        kinds = table[names["confidence"]].astype(str)
        edges = edges[kinds.isin([str(kind) for kind in confidences])]
        if edges.empty:
            found = shown(sorted(set(kinds)))
            msg = f"{path.name} has no edge of confidence {list(confidences)}, only {found}."
            raise ValueError(msg)
    return edges.dropna().reset_index(drop=True)


def _sign(entry: Any, file_name: str) -> int:
    """Read one sign: a number, a word of TRRUST, or nothing; any other word is a ``ValueError``."""
    word = str(entry).strip().lower()
    if word in SIGN_OF_WORD:
        return SIGN_OF_WORD[word]
    try:
        number = float(word)
    except ValueError:
        msg = f"{file_name}: a sign is a number or one of {', '.join(SIGN_OF_WORD)}, got {entry!r}."
        raise ValueError(msg) from None
    return 0 if np.isnan(number) else int(np.sign(number))


def evaluate_gene_network(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    reference: pd.DataFrame,
    data_name: str,
    seeds: Sequence[int] = (0, 1, 2),
    protocol: NetworkProtocol | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """Score the networks of a model and of everything simpler against known edges.

    Args:
        adata: AnnData with N cells.
        model: A `ScDivaForMaskedDiffusion`, or any scDiVa model if ``protocol.methods`` is ("attention",).
        tokenizer: The tokenizer of this model.
        reference: Columns ``tf``, ``target`` and perhaps ``sign``, from `read_reference_network`; symbols.
        data_name: What cells and reference are called in the table.
        seeds: One run each: its cells, its random weights, its random scores.
        protocol: Cells per run, methods, universe.
        **reading: How to read the AnnData, as in `read_cells`.

    Returns:
        A result as `modeling_scdiva.evaluation.report` describes it. ``details``: ``universe``, counts of
        what is in it and what is not; ``tfs`` and ``tf_auroc``, method -> AUROC of each TF, mean over runs;
        ``differences``, of each scDiVa row from |Pearson|, with intervals over TFs.

    Raises:
        KeyError: If the reference lacks a column.
    """
    refuse_path(adata)
    missing = {"tf", "target"} - set(reference.columns)
    if missing:
        msg = f"The reference has no column {sorted(missing)[0]!r}. Columns: {shown(reference.columns)}."
        raise KeyError(msg)
    protocol = NetworkProtocol() if protocol is None else protocol
    task = _Task(model, tokenizer, reading, protocol)
    expression = task.expression(adata)  # (N, V)
    universe, token_ids = _universe(expression, tokenizer, reference, protocol.min_expressed_fraction)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    tf_auroc: dict[str, list[np.ndarray]] = {}
    for seed in seeds:
        drawn = np.sort(np.random.default_rng(seed).permutation(adata.n_obs)[: protocol.n_cells])
        scored = task.model_scores(adata[drawn], universe, seed=seed)
        is_reached = np.logical_and.reduce([np.isfinite(scores) for scores in scored.values()])
        scored |= task.random_model_scores(adata[drawn], universe, seed=seed)
        scored |= _baseline_scores(expression[drawn], universe, token_ids, seed=seed)
        for part, is_candidate in _parts(universe, is_reached):
            for method, scores in scored.items():
                numbers = _numbers(scores, universe, is_candidate, is_signed=_is_signed(method))
                runs.setdefault((part, method), []).append(numbers)
        for method, scores in scored.items():
            of_tfs = tf_metrics(np.abs(scores), universe.is_edge, is_candidate=universe.is_candidate)
            tf_auroc.setdefault(method, []).append(of_tfs["auroc"])
    means = {method: np.mean(values, axis=0) for method, values in tf_auroc.items()}
    return _result(runs, means, universe, data_name=data_name, n_cells=min(protocol.n_cells, adata.n_obs))


@dataclass(frozen=True)
class _Task:
    """The model, and how cells reach it."""

    model: Any
    tokenizer: CellTokenizer
    reading: Mapping[str, Any]
    protocol: NetworkProtocol

    def expression(self, adata: Any) -> csr_matrix:
        """Return (N, V) log1p values of all vocabulary genes, not cut to the network's length."""
        uncut = {**self.reading, "max_genes": self.tokenizer.vocab_size}
        cells = read_cells(adata, tokenizer=self.tokenizer, **uncut)
        shape = (cells.n_cells, self.tokenizer.vocab_size)
        return csr_matrix((cells.values.astype(np.float64), cells.token_ids, cells.offsets), shape=shape)

    def model_scores(self, adata: Any, universe: NetworkUniverse, *, seed: int) -> dict[str, np.ndarray]:
        """Score all pairs (T, K) by the model."""
        methods = self.protocol.methods
        return {f"{MODEL}, {name}": self._infer(adata, self.model, name, universe, seed) for name in methods}

    def random_model_scores(
        self, adata: Any, universe: NetworkUniverse, *, seed: int
    ) -> dict[str, np.ndarray]:
        """Score all pairs (T, K) by a model of the same shape that has learned nothing."""
        fresh = random_weights(self.model, seed=seed)
        methods = self.protocol.random_methods
        return {
            f"random weights, {name}": self._infer(adata, fresh, name, universe, seed) for name in methods
        }

    def _infer(self, adata: Any, model: Any, method: str, universe: NetworkUniverse, seed: int) -> np.ndarray:
        network = infer_gene_network(
            adata,
            model=model,
            tokenizer=self.tokenizer,
            tfs=universe.tfs,
            targets=universe.targets,
            method=method,
            settings=replace(self.protocol.settings, seed=seed),
            **self.reading,
        )
        return network.reindex(index=universe.tfs, columns=universe.targets).to_numpy()


def _universe(
    expression: csr_matrix, tokenizer: CellTokenizer, reference: pd.DataFrame, min_expressed_fraction: float
) -> tuple[NetworkUniverse, dict[str, int]]:
    """Return the pairs to score, and the token of each gene of the file."""
    shares = np.asarray((expression > 0).mean(axis=0)).ravel()
    token_ids = {
        gene_name(int(token), tokenizer.vocabulary): int(token) for token in np.flatnonzero(shares > 0)
    }
    signs = reference["sign"] if "sign" in reference else pd.Series(0, index=reference.index)
    edges = list(
        zip(reference["tf"].astype(str), reference["target"].astype(str), signs.astype(int), strict=True)
    )
    universe = network_universe(
        edges,
        expressed_fraction={name: float(shares[token]) for name, token in token_ids.items()},
        min_expressed_fraction=min_expressed_fraction,
    )
    return universe, token_ids


def _baseline_scores(
    expression: csr_matrix, universe: NetworkUniverse, token_ids: Mapping[str, int], *, seed: int
) -> dict[str, np.ndarray]:
    """Score all pairs (T, K) without a network."""
    tfs, targets = ([token_ids[name] for name in names] for names in (universe.tfs, universe.targets))
    return {
        PEARSON: coexpression_network(expression, tfs, targets),
        "|Spearman|": coexpression_network(expression, tfs, targets, correlation="spearman"),
        "mean expression of the target": mean_expression_network(expression, len(tfs), targets),
        "other TFs of the target in the reference": degree_network(universe.is_edge),
        "random": random_network(len(tfs), len(targets), seed=seed),
    }


def _is_signed(method: str) -> bool:
    return method.startswith("|") or method.endswith("conditional")


def _parts(universe: NetworkUniverse, is_reached: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return the sets of pairs that are scored by themselves: all, and those that the model gives a score."""
    parts = [("all pairs", universe.is_candidate)]
    is_both = universe.is_candidate & is_reached
    edges = universe.is_edge[is_both]
    if edges.any() and not edges.all():
        parts.append(("pairs scDiVa scores", is_both))
    return parts


def _numbers(
    scores: np.ndarray, universe: NetworkUniverse, is_candidate: np.ndarray, *, is_signed: bool
) -> dict[str, Any]:
    numbers = network_metrics(np.abs(scores), universe.is_edge, is_candidate=is_candidate)
    signs = {"balanced_sign_accuracy": None, "n_signed_edges": 0}
    if is_signed:
        found = sign_agreement(scores, np.where(is_candidate, universe.signs, 0))
        signs = {name: found[name] for name in signs}
    return numbers | signs


def _result(
    runs: Mapping[tuple[str, str], list[dict[str, Any]]],
    tf_auroc: Mapping[str, np.ndarray],
    universe: NetworkUniverse,
    *,
    data_name: str,
    n_cells: int,
) -> dict[str, Any]:
    numbers: list[dict[str, Any]] = []
    baselines: list[dict[str, Any]] = []
    for (part, method), of_seeds in runs.items():
        row = {"data": f"{data_name}, {part}", "method": method} | summarise(of_seeds)
        (numbers if method.startswith(MODEL) else baselines).append(row)
    differences = {}
    for method in tf_auroc:
        pair = np.stack([tf_auroc[method], tf_auroc[PEARSON]])
        pair = pair[:, np.isfinite(pair).all(axis=0)]
        if method.startswith(MODEL) and pair.shape[1] >= MIN_TFS_FOR_INTERVAL:
            differences[method] = paired_bootstrap_difference(pair[0], pair[1])
    compared = "".join(
        f" {method} minus {PEARSON}, AUROC per TF: {found['difference']:+.4f}"
        f" [{found['difference_low']:+.4f}, {found['difference_high']:+.4f}] over {found['n_units']} TFs."
        for method, found in differences.items()
    )
    n_pairs, n_edges = int(universe.is_candidate.sum()), int(universe.is_edge.sum())
    return {
        "title": "Gene networks against known edges",
        "numbers": numbers,
        "baselines": baselines,
        "columns": list(COLUMNS),
        "note": f"{len(universe.tfs)} TFs x {len(universe.targets)} targets, {n_edges:,} known edges among "
        f"{n_pairs:,} pairs (prevalence {n_edges / n_pairs:.4f}); {n_cells} cells a run, spread over draws "
        "of cells. Ratios are to the prevalence, chance 1; pairs without a score rank last. The row with "
        f"other TFs looks into the reference.{compared} Networks are hypotheses.",
        "details": {
            "universe": {
                "n_tfs": len(universe.tfs),
                "n_targets": len(universe.targets),
                "n_edges": n_edges,
                "n_pairs": n_pairs,
                "left_out_edges": universe.left_out,
            },
            "tfs": universe.tfs,
            "tf_auroc": {method: values.tolist() for method, values in tf_auroc.items()},
            "differences": differences,
        },
    }


def network_figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Draw each scDiVa method against |Pearson|, a point per TF.

    Args:
        result: From `evaluate_gene_network`.

    Returns:
        Name -> Matplotlib figure.
    """
    auroc, tfs = result["details"]["tf_auroc"], result["details"]["tfs"]
    return {
        method.removeprefix(f"{MODEL}, "): draw_paired_scores(
            auroc[PEARSON], values, f"AUROC per TF, {PEARSON}", f"AUROC per TF, {method}", tfs
        )
        for method, values in auroc.items()
        if method.startswith(MODEL)
    }
