"""Figures of the evaluation: arrays in, a Matplotlib figure out; nothing is shown, written or kept.

Notable choices:
- Figures are made without `pyplot`, so no window opens, no backend is chosen and nothing has to be closed.
- Matplotlib and umap-learn are imported when a figure is drawn.

Dimensions: N cells, D width, C classes, P perturbations, G genes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Numbers = Sequence[float] | np.ndarray

MAX_LEGEND_ENTRIES = 24
MAX_PANELS = 12
PANELS_PER_ROW = 4


def draw_umap(embedding: np.ndarray, colours: Mapping[str, Sequence[Any] | np.ndarray], seed: int = 0) -> Any:
    """Draw one UMAP of the cells per colouring.

    Args:
        embedding: (N, D) one vector per cell; 2 columns are drawn as they are.
        colours: Title of a panel -> (N,) classes, or numbers, which get a colour bar.
        seed: Of the layout and of the order in which cells are drawn over each other.

    Returns:
        A Matplotlib figure with one panel per colouring.

    Raises:
        ValueError: If the embedding is not finite or too small, or a colouring has another length.
    """
    embedding = np.asarray(embedding, dtype=np.float64)
    if embedding.ndim != 2 or not np.isfinite(embedding).all() or embedding.shape[0] < 4:
        msg = f"embedding must be finite and (N, D) with at least 4 cells, got shape {embedding.shape}."
        raise ValueError(msg)
    for name, entries in colours.items():
        if len(entries) != len(embedding):
            msg = f"The colouring {name!r} has {len(entries)} entries for {len(embedding)} cells."
            raise ValueError(msg)
    points = embedding if embedding.shape[1] == 2 else _umap(embedding, seed)
    order = np.random.default_rng(seed).permutation(len(points))  # no class lies on top of all others
    figure, panels = _panels(max(1, len(colours)), size=4.2)
    for panel, (name, entries) in zip(panels, colours.items(), strict=False):
        _scatter(figure, panel, points[order], np.asarray(entries)[order])
        panel.set(title=name, xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    return figure


def draw_confusion(labels: Sequence[Any] | np.ndarray, predicted: Sequence[Any] | np.ndarray) -> Any:
    """Draw which class is taken for which: rows are true classes and sum to 1.

    Args:
        labels: (N,) true class of each cell.
        predicted: (N,) predicted class of each cell.

    Returns:
        A Matplotlib figure; the number of cells stands behind each true class.

    Raises:
        ValueError: If there are no cells, or the lengths differ.
    """
    from sklearn.metrics import confusion_matrix

    truth, guess = np.asarray(labels).astype(str), np.asarray(predicted).astype(str)
    if not len(truth) or truth.shape != guess.shape:
        msg = f"labels and predicted must be equally long and not empty, got {len(truth)} and {len(guess)}."
        raise ValueError(msg)
    names = sorted(set(truth) | set(guess))
    counts = confusion_matrix(truth, guess, labels=names)  # (C, C)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(16.0, 3.0 + 0.32 * len(names))
    figure = _figure((side + 1.0, side))
    panel = figure.subplots()
    image = panel.imshow(shares, vmin=0.0, vmax=1.0, cmap="Blues")
    figure.colorbar(image, ax=panel, label="share of the true class", shrink=0.8)
    rows = [f"{name} ({n})" for name, n in zip(names, counts.sum(axis=1), strict=True)]
    panel.set_xticks(range(len(names)), names, rotation=90)
    panel.set_yticks(range(len(names)), rows)
    panel.set(xlabel="predicted", ylabel="true (cells)")
    if len(names) <= MAX_LEGEND_ENTRIES:
        for row, column in np.argwhere(shares >= 0.005):
            share = shares[row, column]
            colour = "white" if share > 0.5 else "black"
            panel.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7, color=colour)
    return figure


def draw_calibration(curves: Mapping[str, tuple[Numbers, Numbers]]) -> Any:
    """Draw accuracy over confidence; on the diagonal a probability means what it says.

    Args:
        curves: Name -> confidences and accuracies of its bins, in [0, 1]; bins without cells may be NaN.

    Returns:
        A Matplotlib figure.
    """
    _check_curves({name: (curve[0], curve[1]) for name, curve in curves.items()})
    figure = _figure((5.0, 4.6))
    panel = figure.subplots()
    panel.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1, label="perfect")
    for name, (confidence, accuracy) in curves.items():
        x, y = np.asarray(confidence, dtype=float), np.asarray(accuracy, dtype=float)
        is_filled = np.isfinite(x) & np.isfinite(y)
        panel.plot(x[is_filled], y[is_filled], marker="o", label=name)
    panel.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panel.legend(fontsize=8)
    return figure


def draw_delta_scatter(
    true: np.ndarray, predicted: np.ndarray, names: Sequence[str] | str = ("all genes",)
) -> Any:
    """Draw predicted over true change of each gene, one panel per perturbation.

    Args:
        true: (P, G) or (G,) measured ``expression_delta``, mean minus control mean, log1p units.
        predicted: The same shape, predicted.
        names: (P,) perturbations. Of more than 12 those with the largest true change are drawn.

    Returns:
        A Matplotlib figure; the correlation stands in each title.

    Raises:
        ValueError: If the shapes differ, or there is not one name per perturbation.
    """
    truth, guess = (np.atleast_2d(np.asarray(matrix, dtype=float)) for matrix in (true, predicted))
    titles = [names] if isinstance(names, str) else list(names)
    if truth.shape != guess.shape or len(titles) != len(truth):
        msg = (
            f"true {truth.shape} and predicted {guess.shape} must have one shape (perturbations, genes), and "
            f"names one entry per perturbation, got {len(titles)}."
        )
        raise ValueError(msg)
    strongest = np.argsort(-np.linalg.norm(truth, axis=1), kind="stable")[:MAX_PANELS]
    figure, panels = _panels(len(strongest), size=3.2)
    for panel, row in zip(panels, np.sort(strongest), strict=False):
        x, y = truth[row], guess[row]
        is_measured = np.isfinite(x) & np.isfinite(y)
        x, y = x[is_measured], y[is_measured]
        limit = max(np.abs(x).max(initial=1e-9), np.abs(y).max(initial=1e-9)) * 1.05
        panel.plot([-limit, limit], [-limit, limit], color="gray", linestyle="--", linewidth=1)
        panel.axhline(0.0, color="lightgray", linewidth=0.8)
        panel.scatter(x, y, s=6, alpha=0.6, linewidths=0)
        panel.set_title(f"{titles[row]} (r = {_correlation(x, y)})", fontsize=9)
        panel.set(xlim=(-limit, limit), ylim=(-limit, limit), xlabel="true change", ylabel="predicted change")
    return figure


def draw_mask_curve(
    x: Numbers, curves: Mapping[str, Sequence[float | None] | np.ndarray], xlabel: str, ylabel: str
) -> Any:
    """Draw a number over the share of genes hidden, or over anything else that is increased step by step.

    Args:
        x: (n,) steps.
        curves: Name -> (n,) numbers, NaN or None where one is undefined. Names that begin with "scDiVa" are
            drawn in full lines, baselines dashed.
        xlabel: What the steps are.
        ylabel: What the numbers are.

    Returns:
        A Matplotlib figure.
    """
    _check_curves({name: (x, curve) for name, curve in curves.items()})
    figure = _figure((6.5, 4.2))
    panel = figure.subplots()
    for number, (name, curve) in enumerate(curves.items()):
        y = np.array([np.nan if value is None else value for value in curve], dtype=float)
        style = {"linewidth": 2.2} if name.lower().startswith("scdiva") else {"linestyle": "--"}
        marker = "osD^"[number // 10 % 4]  # there are ten colours
        panel.plot(np.asarray(x, dtype=float), y, marker=marker, markersize=5, label=name, **style)
    panel.set(xlabel=xlabel, ylabel=ylabel)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw_paired_scores(
    first: Numbers,
    second: Numbers,
    xlabel: str,
    ylabel: str,
    names: Sequence[str] = (),
) -> Any:
    """Draw the scores of two methods on the same units against each other.

    Args:
        first: (n,) scores on the horizontal axis; NaN is left out.
        second: (n,) scores on the vertical axis, of the same units.
        xlabel: First method and score.
        ylabel: Second method and score.
        names: (n,) units; the five where the second is most ahead are named.

    Returns:
        A Matplotlib figure; above the diagonal the second is better.

    Raises:
        ValueError: If the lengths differ.
    """
    x, y = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or (len(names) and len(names) != len(x)):
        msg = f"first {x.shape}, second {y.shape} and {len(names)} names must be of the same units."
        raise ValueError(msg)
    is_scored = np.isfinite(x) & np.isfinite(y)
    figure = _figure((5.0, 4.8))
    panel = figure.subplots()
    shown = np.concatenate([x[is_scored], y[is_scored]])
    ends = [shown.min(), shown.max()] if len(shown) else [0.0, 1.0]
    panel.plot(ends, ends, color="gray", linestyle="--", linewidth=1)
    panel.scatter(x[is_scored], y[is_scored], s=16, alpha=0.7, linewidths=0)
    for unit in np.argsort(np.where(is_scored, x - y, np.inf), kind="stable")[:5] if len(names) else ():
        if is_scored[unit]:
            panel.annotate(str(names[unit]), (x[unit], y[unit]), fontsize=7)
    panel.set(xlabel=xlabel, ylabel=ylabel, title=f"{int(is_scored.sum())} units")
    return figure


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = 'Figures are drawn with Matplotlib: pip install "scdiva[eval]"'
        raise ImportError(msg) from error
    return Figure(figsize=size, layout="constrained")


def _panels(n_panels: int, *, size: float) -> tuple[Any, list[Any]]:
    """Return a figure and its panels; those that stay empty are switched off."""
    n_columns = min(n_panels, PANELS_PER_ROW)
    n_rows = -(-n_panels // n_columns)
    figure = _figure((size * n_columns + 1.0, size * n_rows))
    panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel().tolist()
    for panel in panels[n_panels:]:
        panel.set_axis_off()
    return figure, panels


def _umap(embedding: np.ndarray, seed: int) -> np.ndarray:
    try:
        import umap
    except ImportError as error:
        msg = 'A UMAP needs umap-learn: pip install "scdiva[eval]"'
        raise ImportError(msg) from error
    n_neighbors = min(15, len(embedding) - 1)
    # Spectral initialisation needs more cells than a handful; a seed makes it one thread anyway.
    start = "spectral" if len(embedding) > n_neighbors + 2 else "random"
    layout = umap.UMAP(n_neighbors=n_neighbors, init=start, random_state=seed, n_jobs=1)
    return np.asarray(layout.fit_transform(embedding.astype(np.float32)))


def _scatter(figure: Any, panel: Any, points: np.ndarray, entries: np.ndarray) -> None:
    from matplotlib import color_sequences

    style = {"s": float(np.clip(20_000 / len(points), 1.0, 20.0)), "linewidths": 0}
    if np.issubdtype(entries.dtype, np.number):
        image = panel.scatter(points[:, 0], points[:, 1], c=entries, cmap="viridis", **style)
        figure.colorbar(image, ax=panel, shrink=0.8)
        return
    texts = entries.astype(str)
    names = sorted(set(texts))
    tones = color_sequences["tab20"]  # strong and light in turn
    palette = [*tones[0::2], *tones[1::2]]
    colour_of = {name: palette[index % len(palette)] for index, name in enumerate(names)}
    panel.scatter(points[:, 0], points[:, 1], c=[colour_of[name] for name in texts], **style)
    if len(names) <= MAX_LEGEND_ENTRIES:
        for name in names:
            panel.scatter([], [], color=[colour_of[name]], label=name, s=20)
        panel.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _check_curves(curves: Mapping[str, tuple[Any, Any]]) -> None:
    if not curves:
        msg = "There is no curve to draw."
        raise ValueError(msg)
    for name, (x, y) in curves.items():
        if len(x) != len(y):
            msg = f"The curve {name!r} has {len(y)} points for {len(x)} places on the axis."
            raise ValueError(msg)


def _correlation(x: np.ndarray, y: np.ndarray) -> str:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return "undefined"
    return f"{np.corrcoef(x, y)[0, 1]:.2f}"
