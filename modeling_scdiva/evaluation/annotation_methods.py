"""The methods that an annotation protocol compares: the network in several uses, and its baselines.

Notable choices:
- Every method sees the same training, validation and test cells and returns probabilities for the latter two,
  so it is tuned, calibrated and scored like every other.
- Cells are tokenised once and embedded once per network, whatever the number of folds.
- Baselines see all genes of the file, not only those the network knows or keeps: that is what one would use
  without the network. Between two files they see the genes that both have.

Dimensions: N cells, G genes, D width, C classes.
Source: METHOD.md section 7.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, issparse, vstack
from scipy.special import softmax

from modeling_scdiva.fresh_model import random_weights
from modeling_scdiva.metrics.annotation import depth_features, log_normalise
from modeling_scdiva.metrics.annotation_baselines import (
    ClassProbabilities,
    LabelledParts,
    as_parts,
    celltypist_style,
    logistic_probe,
    majority_class,
    pca_logistic,
    pca_parts,
    variable_genes_logistic,
)
from modeling_scdiva.outputs_scdiva import pool_cells, pooled_positions
from modeling_scdiva.pretrained_scdiva import evaluation_mode
from modeling_scdiva.splits import CellSplit
from modeling_scdiva.tasks.annotation import (
    AnnotatorSettings,
    default_arguments,
    fit_annotator,
)
from modeling_scdiva.tasks.cells import (
    CellTokenizer,
    TokenizedCells,
    encoder_of,
    length_batches,
    read_cells,
    shown,
    whole_counts,
)
from modeling_scdiva.tasks.classifier import predict_logits
from modeling_scdiva.tasks.reference_mapping import MappingSettings, transfer_labels

MIN_COMMON_GENES = 50

# Method -> how it is called in tables. Those of the first group are scDiVa's own rows.
MODEL_METHODS = {
    "frozen": "scDiVa, frozen + logistic regression",
    "nearest": "scDiVa, frozen + nearest cells",
    "head": "scDiVa, frozen + trained head",
    "lora": "scDiVa, LoRA",
    "last_layers": "scDiVa, last layers",
    "full": "scDiVa, full fine-tuning",
}
RANDOM_METHODS = {
    "random_frozen": "random weights, frozen + logistic regression",
    "random_nearest": "random weights, frozen + nearest cells",
    "random_lora": "random weights, LoRA",
    "random_full": "random weights, full training",
}
EXPRESSION_METHODS: dict[str, tuple[str, Callable[..., ClassProbabilities]]] = {
    "pca": ("PCA-50 + logistic regression", pca_logistic),
    "variable_genes": ("2,000 variable genes + logistic regression", variable_genes_logistic),
    "celltypist": ("CellTypist-style", celltypist_style),
}
METHOD_NAMES = (
    MODEL_METHODS
    | RANDOM_METHODS
    | {method: name for method, (name, _) in EXPRESSION_METHODS.items()}
    | {"pca_nearest": "PCA-50 + nearest cells"}
    | {"depth": "depth only + logistic regression", "majority": "largest class"}
)


@dataclass(frozen=True)
class TrainingChoices:
    """How networks are trained and run in a protocol.

    Attributes:
        lora_rank: Rank of the adapters.
        n_last_layers: Layers that "last_layers" trains.
        validation_fraction: Share of the training cells that validate.
        arguments: Fields of `FinetuningArguments` to set for every network; ``seed`` is the protocol's.
        batch_size: Cells in a forward pass without training.
        pooling: Of the frozen embedding, "lat" or "mean".
    """

    lora_rank: int = 8
    n_last_layers: int = 4
    validation_fraction: float = 0.15
    arguments: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    pooling: str = "lat"


@dataclass(frozen=True)
class CellTable:
    """N labelled cells in every form that a method needs.

    Attributes:
        cells: Tokens and values.
        expression: (N, G) CSR log1p of normalised counts.
        depth: (N, n) features of sequencing depth.
        labels: (N,) classes.
        groups: (N,) donors or technical batches, or None.
        gene_names: (G,) columns of ``expression``.
    """

    cells: TokenizedCells
    expression: csr_matrix
    depth: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None
    gene_names: np.ndarray


def read_table(
    adata: Any,
    labels: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    tokenizer: CellTokenizer,
    max_genes: int | None = None,
    **reading: Any,
) -> CellTable:
    """Read cells in every form that a method needs.

    Args:
        adata: AnnData with N cells.
        labels: (N,) classes.
        groups: (N,) donors or technical batches, or None.
        tokenizer: Tokenizer of the model.
        max_genes: Genes of a cell that the network sees; default the tokenizer's.
        **reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`.

    Returns:
        The table; its baselines see the counts where the network does, see `whole_counts`.
    """
    cells = read_cells(adata, tokenizer=tokenizer, max_genes=max_genes, **reading)
    layer = reading.get("layer")
    if reading.get("expression_is_log1p"):
        expression = csr_matrix(adata.X if layer in (None, "X") else adata.layers[layer], dtype=np.float32)
        depth = np.log1p(expression.getnnz(axis=1).astype(np.float32))[:, None]
    else:
        counts = whole_counts(adata, layer=layer)
        expression, depth = log_normalise(counts), depth_features(counts)
    key = reading.get("gene_id_key")
    names = np.asarray(adata.var_names if key is None else adata.var[key]).astype(str)
    return CellTable(cells, expression, depth, np.asarray(labels).astype(str), groups, names)


def join_tables(first: CellTable, second: CellTable) -> CellTable:
    """Put the cells of two files below each other, with the genes that both have.

    Args:
        first: N1 cells.
        second: N2 cells.

    Returns:
        N1 + N2 cells without groups.

    Raises:
        ValueError: If the files have too few gene names in common.
    """
    second_columns = {name: column for column, name in enumerate(second.gene_names)}
    columns = [
        (column, second_columns[name])
        for column, name in enumerate(first.gene_names)
        if name in second_columns
    ]
    if len(columns) < MIN_COMMON_GENES:
        msg = (
            f"The two files share {len(columns)} gene names of {len(first.gene_names)} (such as "
            f"{shown(first.gene_names[:3])}) and {len(second.gene_names)} (such as "
            f"{shown(second.gene_names[:3])}). Name a column of var that both have as gene_id_key=..."
        )
        raise ValueError(msg)
    left, right = np.array(columns).T
    one, other = first.cells, second.cells
    return CellTable(
        cells=TokenizedCells(
            offsets=np.concatenate([one.offsets, one.offsets[-1] + other.offsets[1:]]),
            token_ids=np.concatenate([one.token_ids, other.token_ids]),
            values=np.concatenate([one.values, other.values]),
            lat_token_id=one.lat_token_id,
            pad_token_id=one.pad_token_id,
        ),
        expression=csr_matrix(vstack([first.expression[:, left], second.expression[:, right]])),
        depth=np.concatenate([first.depth, second.depth]),
        labels=np.concatenate([first.labels, second.labels]),
        groups=None,
        gene_names=first.gene_names[left],
    )


class MethodRunner:
    """Runs methods on splits of one table; keeps embeddings of networks between splits.

    Args:
        table: The cells.
        model: Pretrained scDiVa model of any class, on the device to use.
        choices: How networks are trained and run.
    """

    def __init__(self, table: CellTable, model: Any, choices: TrainingChoices) -> None:
        self.table, self.model, self.choices = table, model, choices
        self._embeddings: dict[str, np.ndarray] = {}
        self._random: dict[int, Any] = {}

    def run(self, method: str, split: CellSplit, seed: int) -> ClassProbabilities:
        """Train a method on a split and let it predict.

        Args:
            method: Key of `METHOD_NAMES`.
            split: Rows of the table.
            seed: Of whatever the method draws.

        Returns:
            Probabilities of the validation and the test cells.
        """
        model = self._random_model(seed) if method in RANDOM_METHODS else self.model
        use = method.removeprefix("random_")
        if use in ("frozen", "nearest"):
            key = f"random {seed}" if method in RANDOM_METHODS else "pretrained"
            if key not in self._embeddings:
                self._embeddings[key] = embed_tokens(model, self.table.cells, self.choices)
            parts = self._parts(self._embeddings[key], split)
            return logistic_probe(parts, seed=seed) if use == "frozen" else nearest_cells(parts, seed=seed)
        if method == "pca_nearest":
            components = pca_parts(self._parts(self.table.expression, split), seed=seed)
            return nearest_cells(components, seed=seed)
        if use in MODEL_METHODS:
            return self._finetuned(model, use, split, seed)
        if method in EXPRESSION_METHODS:
            return EXPRESSION_METHODS[method][1](self._parts(self.table.expression, split), seed=seed)
        parts = self._parts(self.table.depth, split)
        return majority_class(parts) if method == "majority" else logistic_probe(parts, seed=seed)

    def _parts(self, features: Any, split: CellSplit) -> LabelledParts:
        return as_parts(
            features if issparse(features) else np.asarray(features, dtype=np.float64),
            self.table.labels,
            split.train,
            split.validation,
            split.test,
        )

    def _random_model(self, seed: int) -> Any:
        if seed not in self._random:
            self._random = {seed: random_weights(encoder_of(self.model), seed=seed)}
        return self._random[seed]

    def _finetuned(self, model: Any, trainable: Any, split: CellSplit, seed: int) -> ClassProbabilities:
        choices = self.choices
        annotator = fit_annotator(
            self.table.cells,
            self.table.labels,
            rows=(split.train, split.validation),
            model=model,
            settings=AnnotatorSettings(
                trainable=trainable, lora_rank=choices.lora_rank, n_last_layers=choices.n_last_layers
            ),
            arguments=default_arguments(trainable, **dict(choices.arguments) | {"seed": seed}),
            show_progress=False,
        )
        validation, test = (
            softmax(
                predict_logits(annotator.model, self.table.cells, rows, batch_size=choices.batch_size).astype(
                    np.float64
                ),
                axis=1,
            )
            for rows in (split.validation, split.test)
        )
        notes = {"n_epochs": len(annotator.history)}
        return ClassProbabilities(np.array(annotator.label_names), validation, test, notes)


def nearest_cells(parts: LabelledParts, *, seed: int = 0) -> ClassProbabilities:
    """Let the nearest training cells vote, as `map_to_reference` does; nothing is trained.

    Args:
        parts: (n, D) embeddings or components.
        seed: Of the index.

    Returns:
        Shares of the votes.
    """
    n_neighbors = min(MappingSettings().n_neighbors, len(parts.train) - 1)
    settings = MappingSettings(n_neighbors=n_neighbors, seed=seed)
    found = [
        transfer_labels(part, parts.train, parts.train_labels, settings=settings)
        for part in (parts.validation, parts.test)
    ]
    validation, test = (mapping.votes.astype(np.float64) for mapping in found)
    return ClassProbabilities(np.array(found[0].label_names), validation, test, {"n_neighbors": n_neighbors})


def embed_tokens(model: Any, cells: TokenizedCells, choices: TrainingChoices) -> np.ndarray:
    """Embed tokenised cells with a frozen encoder.

    Args:
        model: Any scDiVa model.
        cells: N tokenised cells.
        choices: Gives ``batch_size`` and ``pooling``.

    Returns:
        (N, D) float32.
    """
    encoder = encoder_of(model)
    embeddings = np.empty((cells.n_cells, encoder.config.hidden_size), dtype=np.float32)
    with evaluation_mode(encoder), torch.inference_mode():
        for rows in length_batches(cells.n_genes, choices.batch_size):
            inputs = {name: tensor.to(encoder.device) for name, tensor in cells.batch(rows).items()}
            read = pooled_positions(choices.pooling)
            states = encoder(**inputs, output_positions=read).last_hidden_state.float()  # (B, P, D)
            embeddings[rows] = pool_cells(states, inputs["attention_mask"], choices.pooling).cpu().numpy()
    return embeddings
