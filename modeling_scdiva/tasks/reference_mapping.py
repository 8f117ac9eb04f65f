"""Cell types by similarity: the nearest labelled cells in embedding space vote. Nothing is trained.

Notable choices:
- Neighbours vote by closeness: a vote weighs exp(-d^2 / 2 s^2), s the median distance of reference cells to
  their own neighbours. Confidence is the share of the votes that the winner has.
- That share says nothing of cells unlike the whole reference: all their far neighbours may agree. So every
  cell also gets the share of reference cells that are nearer to their own neighbours than it is to its own;
  near 1 means new. Both can make a cell `Unknown`.
- Exact neighbours (scikit-learn) for small references, the approximate index of pynndescent for large ones.
- Only the embedding of the frozen encoder is compared; technical batches are not corrected for.

Dimensions: N cells of the query, M of the reference, D width, K neighbours, C classes.
Source: METHOD.md section 7; the published label transfer of scArches weighs by distance likewise.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from modeling_scdiva.tasks.annotation import UNKNOWN
from modeling_scdiva.tasks.cells import CellTokenizer, obs_column, refuse_path, shown
from modeling_scdiva.tasks.embedding import embed_cells

Metric = Literal["cosine", "euclidean"]
# References up to this size are searched exactly.
MAX_EXACT_CELLS = 20_000
# Reference cells whose own neighbourhoods say what is near.
MAX_CALIBRATION_CELLS = 2_000


@dataclass(frozen=True)
class ReferenceMapping:
    """What the reference says of N query cells.

    Attributes:
        predicted_cell_types: (N,) type with most votes, `Unknown` below the threshold or beyond the distance.
        likeliest_cell_types: (N,) type with most votes in any case.
        confidence: (N,) float32 its share of the votes, in (0, 1].
        votes: (N, C) float32 share of every type.
        label_names: The C types of the reference.
        distance_percentile: (N,) float32 share of reference cells nearer to their own neighbours than the
            cell is to its neighbours, in [0, 1]; near 1 for cells unlike the reference.
        neighbor_rows: (N, K) int64 rows of the reference, nearest first.
        distances: (N, K) float32.
    """

    predicted_cell_types: np.ndarray
    likeliest_cell_types: np.ndarray
    confidence: np.ndarray
    votes: np.ndarray
    label_names: list[str]
    distance_percentile: np.ndarray
    neighbor_rows: np.ndarray
    distances: np.ndarray


@dataclass(frozen=True)
class MappingSettings:
    """How neighbours are found and believed.

    Attributes:
        n_neighbors: Neighbours K that vote.
        metric: "cosine" or "euclidean".
        threshold: Least confidence of a type, in [0, 1]; 0 names every cell.
        max_distance_percentile: Largest ``distance_percentile`` of a named cell, in [0, 1]; 1 names every
            cell.
        embedding_key: Entry of ``obsm`` that holds the embeddings of both, computed before; None computes
            them.
        seed: Of the approximate index, and of the reference cells that calibrate distances.
    """

    n_neighbors: int = 15
    metric: Metric = "cosine"
    threshold: float = 0.0
    max_distance_percentile: float = 1.0
    embedding_key: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_neighbors < 1:
            msg = f"n_neighbors must be at least 1, got {self.n_neighbors}."
            raise ValueError(msg)
        if self.metric not in ("cosine", "euclidean"):
            msg = f'metric must be "cosine" or "euclidean", got {self.metric!r}.'
            raise ValueError(msg)
        for name in ("threshold", "max_distance_percentile"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                msg = f"{name} must lie in [0, 1], got {getattr(self, name)}."
                raise ValueError(msg)


def map_to_reference(
    query: Any,
    *,
    reference: Any,
    label_key: str,
    model: Any = None,
    tokenizer: CellTokenizer | None = None,
    settings: MappingSettings | None = None,
    show_progress: bool = True,
    **embedding: Any,
) -> ReferenceMapping:
    """Take over the types of the nearest reference cells.

    Args:
        query: AnnData with N cells.
        reference: AnnData with M labelled cells.
        label_key: Column of the reference's ``obs`` with the cell types.
        model: Pretrained encoder; not needed with ``settings.embedding_key``.
        tokenizer: Its tokenizer.
        settings: How neighbours are found and believed.
        show_progress: Show progress bars.
        **embedding: Further arguments of `embed_cells`, for query and reference alike: ``batch_size``,
            ``pooling``, ``max_genes``, ``layer`` and so on.

    Returns:
        Types, confidences and neighbours, rows in the order of ``query.obs_names``.

    Raises:
        ValueError: If neither embeddings nor a model with its tokenizer came.
    """
    settings = settings or MappingSettings()
    for adata in (query, reference):
        refuse_path(adata)
    labels = obs_column(reference, label_key, what="cell types of the reference")
    if settings.embedding_key is not None:
        of_query, of_reference = (_stored(adata, settings.embedding_key) for adata in (query, reference))
    else:
        if model is None or tokenizer is None:
            msg = (
                "map_to_reference needs model and tokenizer, or embedding_key, an obsm entry of both AnnData."
            )
            raise ValueError(msg)
        arguments = embedding | {"model": model, "tokenizer": tokenizer, "show_progress": show_progress}
        of_query, of_reference = (embed_cells(adata, **arguments) for adata in (query, reference))
    return transfer_labels(of_query, of_reference, labels, settings=settings)


def transfer_labels(
    query: np.ndarray,
    reference: np.ndarray,
    labels: np.ndarray,
    *,
    settings: MappingSettings | None = None,
) -> ReferenceMapping:
    """Let the nearest reference vectors vote.

    Args:
        query: (N, D) embeddings of the query cells.
        reference: (M, D) embeddings of the reference cells.
        labels: (M,) their types.
        settings: How neighbours are found and believed.

    Returns:
        Types, confidences and neighbours.

    Raises:
        ValueError: If shapes do not fit, a number is not finite, or the reference has too few cells or types.
    """
    settings = settings or MappingSettings()
    query, reference = (np.ascontiguousarray(part, dtype=np.float32) for part in (query, reference))
    labels = np.asarray(labels).astype(str)
    is_table = query.ndim == reference.ndim == 2
    if not is_table or query.shape[1] != reference.shape[1] or labels.shape != reference.shape[:1]:
        msg = (
            "query (N, D), reference (M, D) and labels (M,) do not fit, got "
            f"{query.shape}, {reference.shape} and {labels.shape}."
        )
        raise ValueError(msg)
    if not (np.isfinite(query).all() and np.isfinite(reference).all()):
        msg = "Embeddings must be finite. Compute them in float32."
        raise ValueError(msg)
    if len(reference) <= settings.n_neighbors:
        msg = f"n_neighbors={settings.n_neighbors} needs a larger reference than {len(reference)} cells."
        raise ValueError(msg)
    names, codes = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        msg = (
            f"The reference has one type only ({str(names[0])!r}), which would be every cell's with "
            "confidence 1; at least two are needed."
        )
        raise ValueError(msg)

    sample = np.random.default_rng(settings.seed).permutation(len(reference))[:MAX_CALIBRATION_CELLS]
    searched = np.concatenate([query, reference[sample]])
    rows, distances = _nearest(searched, reference, settings, n_neighbors=settings.n_neighbors + 1)
    own = _without_self(rows[len(query) :], distances[len(query) :], sample)  # (m, K)
    rows, distances = rows[: len(query), :-1], distances[: len(query), :-1]  # (N, K)

    scale = max(float(np.median(own)), float(np.finfo(np.float32).tiny) ** 0.5)
    # Shifted so that the nearest neighbour weighs 1: the shares are the same, and none is 0 / 0.
    exponents = -(distances.astype(np.float64) ** 2) / (2 * scale**2)
    weights = np.exp(exponents - exponents.max(axis=1, keepdims=True))
    votes = np.zeros((len(query), len(names)))
    for neighbor in range(settings.n_neighbors):
        votes[np.arange(len(query)), codes[rows[:, neighbor]]] += weights[:, neighbor]
    votes /= votes.sum(axis=1, keepdims=True)
    percentile = np.searchsorted(np.sort(own.mean(axis=1)), distances.mean(axis=1)) / len(own)
    likeliest, confidence = names[votes.argmax(axis=1)].astype(object), votes.max(axis=1)
    is_known = (confidence >= settings.threshold) & (percentile <= settings.max_distance_percentile)
    return ReferenceMapping(
        predicted_cell_types=np.where(is_known, likeliest, UNKNOWN).astype(object),
        likeliest_cell_types=likeliest,
        confidence=confidence.astype(np.float32),
        votes=votes.astype(np.float32),
        label_names=names.tolist(),
        distance_percentile=percentile.astype(np.float32),
        neighbor_rows=rows,
        distances=distances,
    )


def _stored(adata: Any, key: str) -> np.ndarray:
    """Take embeddings that were computed before.

    Returns:
        (N, D) float32.

    Raises:
        KeyError: If there are none of this name.
    """
    if key not in adata.obsm:
        msg = f"obsm has no entry {key!r}. Entries: {shown(adata.obsm.keys())}."
        raise KeyError(msg)
    return np.asarray(adata.obsm[key], dtype=np.float32)


def _nearest(
    vectors: np.ndarray, reference: np.ndarray, settings: MappingSettings, *, n_neighbors: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find reference rows (n, K) int64 and their distances (n, K) float32, nearest first.

    Returns:
        Rows and distances.

    Raises:
        ImportError: If a large reference needs the approximate index and it is not installed.
    """
    if len(reference) <= MAX_EXACT_CELLS:
        from sklearn.neighbors import NearestNeighbors

        exact = NearestNeighbors(n_neighbors=n_neighbors, metric=settings.metric, algorithm="brute")
        distances, rows = exact.fit(reference).kneighbors(vectors)
    else:
        try:
            from pynndescent import NNDescent
        except ImportError as error:
            msg = 'References this large need pynndescent: pip install "scdiva[eval]"'
            raise ImportError(msg) from error
        index = NNDescent(
            reference, metric=settings.metric, n_neighbors=max(30, n_neighbors), random_state=settings.seed
        )
        rows, distances = index.query(vectors, k=n_neighbors, epsilon=0.2)
    return rows.astype(np.int64), np.maximum(distances, 0.0).astype(np.float32)


def _without_self(rows: np.ndarray, distances: np.ndarray, own_rows: np.ndarray) -> np.ndarray:
    """Take each cell itself out of its neighbours, or the farthest where an equal cell stands in its place.

    Returns:
        (m, K) distances.
    """
    is_self = rows == own_rows[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    return distances[~is_self].reshape(len(rows), -1)
