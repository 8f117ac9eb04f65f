"""Integration of technical batches: scDiVa, label-free and label-informed, beside baselines and controls.

Every method embeds the same cells and is scored by `integration_scores` on the same labelled ones.

Notable choices:
- The column ``labels_seen`` says which rows were given the labels they are scored on; such a row measures how
  well labels can be memorised, not integration. The permuted-label control trains the label-informed mode on
  shuffled labels and is scored on the true ones: what the labels gave must be gone there.
- Hyper-parameters come from the caller and are not chosen on the scores; early stopping never sees a label
  in label-free mode.
- A seed changes the training, the random weights, the controls' noise and the Leiden clustering; the cells
  stay the same.
- Unlabelled cells are integrated with the others and left out of every score, counted.

Dimensions: N cells, D width.
Source: METHOD.md sections 7 and 8.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modeling_scdiva.adapters import Trainable
from modeling_scdiva.evaluation.report import summarise
from modeling_scdiva.fresh_model import random_weights
from modeling_scdiva.metrics import integration_baselines as baselines
from modeling_scdiva.metrics.annotation import depth_features
from modeling_scdiva.metrics.integration import integration_scores, integration_settings
from modeling_scdiva.metrics.scvi_baselines import N_SCANVI_EPOCHS, has_scvi, scvi_embeddings
from modeling_scdiva.splits import stratified_subset
from modeling_scdiva.tasks.cells import CellTokenizer, encoder_of, obs_column, refuse_path, whole_counts
from modeling_scdiva.tasks.embedding import embed_cells
from modeling_scdiva.tasks.integration import integrate_batches
from modeling_scdiva.tasks.integration_network import IntegrationArguments

COLUMNS = [
    "data", "method", "labels_seen", "avg_bio", "avg_bio_resolution_1", "asw_label", "avg_batch", "asw_batch",
    "graph_connectivity", "bras", "ilisi", "kbet", "pcr_comparison", "n_seeds",
]  # fmt: skip
# Column of a copy of the cells that holds the labels a run may see.
SEEN_LABELS = "scdiva_seen_labels"


@dataclass(frozen=True)
class IntegrationProtocol:
    """What is compared, and on how many cells.

    Attributes:
        data_name: What the cells are called in the table.
        max_cells: More cells are subsampled, evenly over (batch, label), the same for every method.
        subsample_seed: Of that draw.
        unlabelled: Labels that mean "no label": integrated, not scored. A missing entry always is one.
        n_top_genes: Highly variable genes of PCA, Harmony, scVI and scANVI.
        n_components: Principal components.
        n_scvi_epochs: Epochs of scVI, from which scANVI starts; its authors take 400 for few cells. 0 leaves
            both out, as does their absence.
        trainable: As in `integrate_batches`.
        with_label_informed: Run the label-informed mode, its permuted-label control, and scANVI.
        with_kbet: As in `integration_scores`.
        batch_size: Cells in one forward pass of the frozen encoders.
        show_progress: Show progress bars.
        reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`.
    """

    data_name: str = "cells"
    max_cells: int = 3000
    subsample_seed: int = 0
    unlabelled: tuple[str, ...] = ("", "unassigned", "unspecified", "Unknown")
    n_top_genes: int = 2000
    n_components: int = 50
    n_scvi_epochs: int = 400
    trainable: Trainable = "lora"
    with_label_informed: bool = True
    with_kbet: bool = True
    batch_size: int = 64
    show_progress: bool = False
    reading: dict[str, Any] = field(default_factory=dict)


def evaluate_integration(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    batch_key: str,
    label_key: str,
    seeds: Sequence[int] = (0, 1, 2),
    arguments: IntegrationArguments | None = None,
    protocol: IntegrationProtocol | None = None,
) -> dict[str, Any]:
    """Integrate with every method, score and tabulate.

    Args:
        adata: AnnData with raw counts; it is not changed.
        model: `ScDivaForMaskedDiffusion` checkpoint.
        tokenizer: The tokenizer of this model.
        batch_key: Column of ``obs`` with the technical batch.
        label_key: Column of ``obs`` with cell types: for scoring, and for the rows that say so.
        seeds: One run of every method each.
        arguments: Numbers of scDiVa's runs; their seed gives way to ``seeds``.
        protocol: What is compared.

    Returns:
        A result as `modeling_scdiva.evaluation.report` describes it. ``details`` holds the settings of the
        scores, the counts of cells, and the embeddings of the first seed with labels and batches.

    Raises:
        ValueError: If there are no seeds.
    """
    arguments = IntegrationArguments() if arguments is None else arguments
    protocol = IntegrationProtocol() if protocol is None else protocol
    if not seeds:
        msg = "evaluate_integration needs at least one seed, got none."
        raise ValueError(msg)
    refuse_path(adata)
    batches = obs_column(adata, batch_key, what="technical batches")
    labels = _label_column(adata, label_key, protocol.unlabelled)
    rows = stratified_subset(batches, labels, n_cells=protocol.max_cells, seed=protocol.subsample_seed)
    chosen = adata[rows]
    cells = chosen.to_memory() if chosen.isbacked else chosen.copy()
    batches, labels = batches[rows], labels[rows]
    is_scored = labels != ""
    rivals = _Rivals(cells, batches, labels, model, tokenizer, batch_key, arguments, protocol)

    runs, first = _run_all(rivals, seeds, is_scored)
    n_scored = int(is_scored.sum())
    data = f"{protocol.data_name} ({n_scored} cells, {len(set(batches[is_scored]))} batches)"
    table = [{"data": data, "method": name, **summarise(of_method)} for name, of_method in runs.items()]
    is_own = [row["method"].startswith("scDiVa") for row in table]
    counts = {"in_file": adata.n_obs, "integrated": len(rows), "scored": n_scored}
    settings = integration_settings(n_scored)
    return {
        "title": "Integration of technical batches",
        "numbers": [row for row, own in zip(table, is_own, strict=True) if own],
        "baselines": [row for row, own in zip(table, is_own, strict=True) if not own],
        "columns": COLUMNS,
        "note": _note(settings, counts, protocol, has_scvi="scVI" in runs),
        "details": {
            "settings": settings,
            "n_cells": counts,
            "batch_key": batch_key,
            "label_key": label_key,
            "seeds": list(seeds),
            "n_genes_of_pca": int(rivals.is_chosen.sum()),
            "protocol": dataclasses.asdict(protocol),
            "arguments": dataclasses.asdict(arguments),
            "embeddings": first,
            "labels": labels[is_scored],
            "batches": batches[is_scored],
        },
    }


def _run_all(
    rivals: "_Rivals", seeds: Sequence[int], is_scored: np.ndarray
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, np.ndarray]]:
    """Score every method with every seed; also return the scored cells' embeddings of the first seed."""
    labels, batches = rivals.labels[is_scored], rivals.batches[is_scored]
    runs: dict[str, list[dict[str, Any]]] = {}
    first: dict[str, np.ndarray] = {}
    for seed in seeds:
        unintegrated = None  # of this seed, what the first method gives
        for name, labels_seen, embed in rivals.methods():
            embedding = embed(seed)[is_scored]
            unintegrated = embedding if unintegrated is None else unintegrated
            first.setdefault(name, embedding)
            scores = integration_scores(
                embedding, labels, batches, seed=seed, unintegrated=unintegrated,
                with_kbet=rivals.protocol.with_kbet,
            )  # fmt: skip
            runs.setdefault(name, []).append({"labels_seen": labels_seen, **scores})
    return runs, first


class _Rivals:
    """Every method as a function seed -> (N, D) of the same cells."""

    def __init__(
        self,
        cells: Any,
        batches: np.ndarray,
        labels: np.ndarray,
        model: Any,
        tokenizer: CellTokenizer,
        batch_key: str,
        arguments: IntegrationArguments,
        protocol: IntegrationProtocol,
    ) -> None:
        self.cells, self.batches, self.labels = cells, batches, labels
        if protocol.reading.get("expression_is_log1p"):
            msg = "The baselines (PCA, Harmony, scVI) need raw counts, and reading says expression_is_log1p."
            raise ValueError(msg)
        self.counts = whole_counts(cells, layer=protocol.reading.get("layer"))
        self.model, self.tokenizer, self.batch_key = model, tokenizer, batch_key
        self.arguments, self.protocol = arguments, protocol
        self.is_chosen = baselines.highly_variable_genes(
            self.counts, batches, n_top_genes=protocol.n_top_genes
        )
        self._kept: dict[str, np.ndarray] = {}
        self._scvi: dict[int, dict[str, np.ndarray]] = {}

    def methods(self) -> Iterator[tuple[str, str, Callable[[int], np.ndarray]]]:
        """Yield name, whether the labels are seen, and the function; no integration comes first."""
        yield f"PCA-{self.protocol.n_components}, not integrated", "no", self.pca
        yield "Harmony", "no", self.harmony
        with_scvi = self.protocol.n_scvi_epochs and has_scvi()
        if with_scvi:
            yield "scVI", "no", lambda seed: self.scvi(seed)["scVI"]
        yield "scDiVa, frozen", "no", self.frozen
        yield "random-weights scDiVa, frozen", "no", self.random_weights
        yield "scDiVa, label-free", "no", self.label_free
        if self.protocol.with_label_informed:
            if with_scvi:
                yield "scANVI", "yes", lambda seed: self.scvi(seed)["scANVI"]
            yield "scDiVa, label-informed", "yes", self.label_informed
            yield "control: label-informed scDiVa on permuted labels", "permuted", self.permuted_labels
        yield "control: random Gaussian", "no", self.random
        yield "control: sequencing depth only", "no", lambda _: depth_features(self.counts)
        yield "control: label one-hot", "yes", lambda seed: baselines.label_one_hot(self.labels, seed=seed)

    def pca(self, seed: int) -> np.ndarray:
        n_components = self.protocol.n_components
        return baselines.pca_embedding(self.counts, self.is_chosen, n_components=n_components, seed=seed)

    def harmony(self, seed: int) -> np.ndarray:
        return baselines.harmony_embedding(self.pca(seed), self.batches, seed=seed)

    def scvi(self, seed: int) -> dict[str, np.ndarray]:
        if seed not in self._scvi:  # scANVI starts from scVI: one run gives both
            self._scvi = {
                seed: scvi_embeddings(
                    self.counts[:, np.flatnonzero(self.is_chosen)],
                    self.batches,
                    labels=self.labels if self.protocol.with_label_informed else None,
                    n_epochs=self.protocol.n_scvi_epochs,
                    seed=seed,
                )
            }
        return self._scvi[seed]

    def random(self, seed: int) -> np.ndarray:
        n_components = self.protocol.n_components
        return baselines.random_embedding(len(self.labels), n_components=n_components, seed=seed)

    def frozen(self, _: int) -> np.ndarray:
        if "frozen" not in self._kept:  # no seed changes it
            self._kept["frozen"] = self._embed(self.model)
        return self._kept["frozen"]

    def random_weights(self, seed: int) -> np.ndarray:
        return self._embed(random_weights(encoder_of(self.model), seed=seed))

    def label_free(self, seed: int) -> np.ndarray:
        return self._integrate(seed)

    def label_informed(self, seed: int) -> np.ndarray:
        return self._integrate(seed, self.labels)

    def permuted_labels(self, seed: int) -> np.ndarray:
        is_labelled = self.labels != ""
        shuffled = self.labels.copy()
        shuffled[is_labelled] = np.random.default_rng(seed).permutation(shuffled[is_labelled])
        return self._integrate(seed, shuffled)

    def _embed(self, encoder: Any) -> np.ndarray:
        return embed_cells(
            self.cells, model=encoder, tokenizer=self.tokenizer, batch_size=self.protocol.batch_size,
            max_genes=self.arguments.max_genes, pooling=self.arguments.pooling,
            show_progress=self.protocol.show_progress, **self.protocol.reading,
        )  # fmt: skip

    def _integrate(self, seed: int, seen: np.ndarray | None = None) -> np.ndarray:
        cells = self.cells.copy()
        if seen is not None:
            cells.obs[SEEN_LABELS] = np.where(seen == "", self.arguments.unlabeled_category, seen)
        return integrate_batches(
            cells,
            model=self.model,
            tokenizer=self.tokenizer,
            batch_key=self.batch_key,
            label_key=None if seen is None else SEEN_LABELS,
            mode="label_free" if seen is None else "label_informed",
            trainable=self.protocol.trainable,
            arguments=dataclasses.replace(self.arguments, seed=seed),
            show_progress=self.protocol.show_progress,
            **self.protocol.reading,
        ).embeddings


def _label_column(adata: Any, label_key: str, unlabelled: Sequence[str]) -> np.ndarray:
    """Return labels (N,) as text, "" where there is none."""
    if label_key not in adata.obs:
        return obs_column(adata, label_key, what="cell types")  # says what there is
    column = adata.obs[label_key].astype(object)
    labels = column.where(column.notna(), "").map(str).to_numpy(dtype=object)
    labels[np.isin(labels.astype(str), list(unlabelled))] = ""
    if (labels == "").all():
        msg = f"obs[{label_key!r}] labels no cell: all entries are missing or among {sorted(unlabelled)}."
        raise ValueError(msg)
    return labels


def _note(
    settings: dict[str, Any], counts: dict[str, int], protocol: IntegrationProtocol, *, has_scvi: bool
) -> str:
    neighbors = settings["neighbors"]
    parts = [
        f"Of {counts['in_file']} cells {counts['integrated']} were integrated and, of these, the "
        f"{counts['scored']} labelled ones scored. Avg-Bio: mean of NMI, ARI and type "
        "silhouette, NMI and ARI at the best of ten Leiden resolutions by the labels, which is an oracle; "
        "`avg_bio_resolution_1` takes resolution 1.0. "
        "Avg-Batch: mean of batch silhouette and graph connectivity; it hardly tells good from no "
        "integration, see BRAS, iLISI and kBET.",
        f"Neighbours: {neighbors['clustering']} (clusters, connectivity), {neighbors['kbet']} (kBET), "
        f"{neighbors['lisi']} (iLISI), {settings['neighbor_search']}. Euclidean, BRAS cosine; float32, not "
        f"normalised. scib-metrics {settings['versions']['scib-metrics']}.",
        f"PCA and Harmony: {protocol.n_top_genes} variable genes chosen within batches, without labels.",
    ]
    if has_scvi:
        parts.append(
            f"scVI: {protocol.n_scvi_epochs} epochs on the same genes; scANVI: {N_SCANVI_EPOCHS} more, with "
            "labels."
        )
    else:
        parts.append("scVI and scANVI: left out.")
    parts.append(
        "Rows with labels seen were given the labels they are scored on and say nothing about integration; "
        "the one-hot control shows how far that alone carries."
    )
    return " ".join(parts)
