"""Generation for AnnData: new cells, cells edited by a chosen strength, cells completed from what is seen.

What comes back is an AnnData over all genes of the vocabulary with log1p values in X and, where library sizes
are known, whole counts in a layer; `obs["is_generated"]` marks its cells and `uns["scdiva"]` says how they
were made. A network generates the genes it kept in training: with a cut at `max_genes` the weakest are
missing.

Dimensions: N cells, S positions, V vocabulary, K conditions.
Source: METHOD.md section 5.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
import transformers

from modeling_scdiva.conditions_scdiva import encode_conditions
from modeling_scdiva.configuration_scdiva import LIBRARY_SIZE
from modeling_scdiva.size_law_scdiva import draw_sizes
from modeling_scdiva.tasks.cells import (
    CellTokenizer,
    TokenizedCells,
    check_vocabulary,
    read_cells,
    refuse_path,
)
from modeling_scdiva.tasks.genes import asked_tokens
from modeling_scdiva.tasks.reconstruction import check_diffusion_model

Conditions = Mapping[str, Any]


def generate_cells(
    n_cells: int,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    conditions: Conditions | None = None,
    library_size: Any = None,
    n_genes: Any = None,
    like: Any = None,
    **options: Any,
) -> anndata.AnnData:
    """Make new cells.

    Args:
        n_cells: Number of cells N.
        model: A `ScDivaForMaskedDiffusion`; runs where it is.
        tokenizer: The tokenizer of this model.
        conditions: Name -> category of all cells or (N,) categories, such as ``{"cell_type": "B cell"}``.
            Depth follows the library size of each cell; ``{"library_size": None}`` leaves it open.
        library_size: Molecules of each cell, one number or (N,); drawn if not given.
        n_genes: Gene tokens of each cell, one number or (N,); drawn to fit the library size if not given.
        like: AnnData of real cells; draw library size and number of genes from its cells, instead of the
            training cells'.
        **options: Settings of `ScDivaGenerationConfig` (``steps``, ``order``, ``guidance_scale``, ``seed``,
            ...), and ``steering`` and ``show_progress`` of `ScDivaForMaskedDiffusion.generate`.

    Returns:
        AnnData (N, genes of the vocabulary) as the module says; ``obs`` holds the conditions,
        ``library_size``, ``gene_log_prob`` (nats) and ``n_network_calls``.

    Raises:
        ValueError: If a part of the request contradicts another, or the model cannot meet it.
    """
    check_diffusion_model(model)
    check_vocabulary(model, tokenizer)
    settings = _settings(model, tokenizer, options)
    if like is not None:
        if library_size is not None or n_genes is not None:
            msg = (
                "like gives library sizes and numbers of genes. Leave library_size and n_genes out, or like."
            )
            raise ValueError(msg)
        library_size, n_genes = _sizes_like(like, n_cells, tokenizer, settings.seed)
    else:
        library_size, n_genes = _drawn_sizes(n_cells, library_size, n_genes, settings)
    columns = dict(conditions or {})
    made = model.generate(
        n_cells=n_cells,
        n_genes=torch.as_tensor(n_genes),
        size_factors=_size_factors(library_size, tokenizer),
        condition_ids=condition_ids_of(columns, n_cells, library_size, model),
        ranking_weights=tokenizer.ranking_weights,
        **options,
    )
    names = [f"generated_{row}" for row in range(n_cells)]
    return _as_anndata(
        made,
        tokenizer,
        names,
        library_size,
        columns,
        _provenance("generate_cells", model, tokenizer, settings, options),
    )


def denoise_cells(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    strength: float,
    conditions: Conditions | None = None,
    reading: Mapping[str, Any] | None = None,
    **options: Any,
) -> anndata.AnnData:
    """Make a share of the genes of real cells anew, for example under another condition.

    Args:
        adata: AnnData with N cells of raw counts.
        model: A `ScDivaForMaskedDiffusion`; runs where it is.
        tokenizer: The tokenizer of this model.
        strength: Share of the gene tokens of each cell that is made anew, in [0, 1]; the others stay.
        conditions: As in `generate_cells`.
        reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`.
        **options: As in `generate_cells`.

    Returns:
        As `generate_cells`, with ``obs`` of the cells; ``layers["is_generated"]`` marks what was drawn.
    """
    cells, inputs = _read(adata, model, tokenizer, reading)
    settings = _settings(model, tokenizer, options)
    columns = dict(conditions or {})
    made = model.denoise(
        **inputs,
        strength=strength,
        size_factors=_size_factors(cells.library_size, tokenizer),
        condition_ids=condition_ids_of(columns, cells.n_cells, cells.library_size, model),
        ranking_weights=tokenizer.ranking_weights,
        **options,
    )
    provenance = _provenance("denoise_cells", model, tokenizer, settings, options) | {"strength": strength}
    return _as_anndata(made, tokenizer, adata.obs, cells.library_size, columns, provenance)


def complete_cells(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    n_genes: Any = None,
    conditions: Conditions | None = None,
    reading: Mapping[str, Any] | None = None,
    **options: Any,
) -> anndata.AnnData:
    """Add the genes that real cells could show behind those they do.

    Args:
        adata: AnnData with N cells of raw counts. ``reading={"library_size": ...}`` gives the depth of the
            finished cells, where the file holds a part of their genes.
        model: A `ScDivaForMaskedDiffusion`; runs where it is.
        tokenizer: The tokenizer of this model.
        n_genes: Gene tokens of each finished cell, one number or (N,); drawn to fit the library size, and at
            least those given, if not given.
        conditions: As in `generate_cells`.
        reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`.
        **options: As in `generate_cells`.

    Returns:
        As `denoise_cells`.
    """
    cells, inputs = _read(adata, model, tokenizer, reading)
    settings = _settings(model, tokenizer, options)
    if n_genes is None:
        n_genes = _drawn_sizes(cells.n_cells, cells.library_size, None, settings)[1]
        n_genes = np.maximum(n_genes, cells.n_genes)
    columns = dict(conditions or {})
    made = model.complete(
        **inputs,
        n_genes=torch.as_tensor(n_genes),
        size_factors=_size_factors(cells.library_size, tokenizer),
        condition_ids=condition_ids_of(columns, cells.n_cells, cells.library_size, model),
        ranking_weights=tokenizer.ranking_weights,
        **options,
    )
    provenance = _provenance("complete_cells", model, tokenizer, settings, options)
    return _as_anndata(made, tokenizer, adata.obs, cells.library_size, columns, provenance)


def marker_reward(
    genes: Sequence[str], *, tokenizer: CellTokenizer, weight: float = 1.0
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Make a reward of a marker programme, for `Steering`.

    Args:
        genes: Ids or symbols of the markers, all of them known.
        tokenizer: The tokenizer of the model.
        weight: Nats per log1p unit of the markers' mean expression; negative ones suppress the programme.

    Returns:
        Function of (B, S) tokens, (B, S) values and (B, S) attention mask that gives (B,) nats.
    """
    markers = torch.from_numpy(asked_tokens(genes, vocabulary=tokenizer.vocabulary, what="markers"))

    def reward(
        input_ids: torch.Tensor, expression_values: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        is_marker = torch.isin(input_ids, markers.to(input_ids.device)) & attention_mask.bool()
        return weight * (expression_values * is_marker).sum(dim=1).double() / len(markers)

    reward.__name__ = f"marker_reward({', '.join(genes)}; weight={weight:g})"  # for uns["scdiva"]
    return reward


def conditions_from_obs(adata: Any, model: Any) -> dict[str, Any]:
    """Read the conditions of a network from the columns of real cells.

    Args:
        adata: AnnData with N cells.
        model: A network with conditions.

    Returns:
        Name -> (N,) categories, for those columns that are there; None, the condition left open, where a cell
        has no entry or one that the network does not know.
    """
    known = model.config.conditions or {}
    found = {}
    for name in known:
        if name != LIBRARY_SIZE and name in adata.obs:
            column = adata.obs[name].astype(object)
            found[name] = [str(entry) if str(entry) in known[name] else None for entry in column]
    return found


def _read(
    adata: Any, model: Any, tokenizer: CellTokenizer, reading: Mapping[str, Any] | None
) -> tuple[TokenizedCells, dict[str, torch.Tensor]]:
    """Tokenize cells that come in, and lay them out."""
    refuse_path(adata)
    check_diffusion_model(model)
    check_vocabulary(model, tokenizer)
    cells = read_cells(adata, tokenizer=tokenizer, **(reading or {}))
    return cells, cells.batch(np.arange(cells.n_cells))


def _settings(model: Any, tokenizer: CellTokenizer, options: dict[str, Any]) -> Any:
    """Merge the settings that came, refuse unknown ones, and leave cells without an order as drawn."""
    if tokenizer.gene_order == "random":
        options.setdefault("canonicalize", False)
        options.setdefault("rank_consistent", False)
    given = {name: value for name, value in options.items() if name not in ("steering", "show_progress")}
    return model.generation_config.updated(**given)


def _size_factors(library_size: Any, tokenizer: CellTokenizer) -> torch.Tensor | None:
    if library_size is None:
        return None
    return torch.as_tensor(np.asarray(library_size, dtype=np.float64) / tokenizer.target_sum)


def _sizes_like(
    like: Any, n_cells: int, tokenizer: CellTokenizer, seed: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """Draw library size and number of genes of real cells, together, with replacement."""
    cells = read_cells(like, tokenizer=tokenizer)
    rows = np.random.default_rng(seed).integers(cells.n_cells, size=n_cells)
    return None if cells.library_size is None else cells.library_size[rows], cells.n_genes[rows]


def _drawn_sizes(
    n_cells: int, library_size: Any, n_genes: Any, settings: Any
) -> tuple[np.ndarray | None, np.ndarray]:
    """Complete sizes by the law of the training cells.

    Returns:
        (N,) library sizes, None where nothing knows them, and (N,) numbers of genes.

    Raises:
        ValueError: If there is no law and no number of genes.
    """
    sizes = _per_cell("library_size", library_size, n_cells, np.float64)
    lengths = _per_cell("n_genes", n_genes, n_cells, np.int64)
    if settings.size_law is None:
        if lengths is None:
            msg = (
                "This checkpoint has no law of cell sizes. Pass n_genes; for new cells library_size (for "
                "counts), or like=AnnData of real cells to take both from."
            )
            raise ValueError(msg)
        return sizes, lengths
    if lengths is not None and sizes is not None:
        return sizes, lengths
    uniforms = np.random.default_rng(settings.seed).random((n_cells, 3))
    drawn, depths = draw_sizes(settings.size_law, uniforms, n_genes=lengths, library_sizes=sizes)
    return depths, drawn


def _per_cell(name: str, given: Any, n_cells: int, dtype: Any) -> np.ndarray | None:
    """Give every cell its number.

    Returns:
        (N,) numbers, or None.

    Raises:
        ValueError: If it is neither one number nor (N,).
    """
    if given is None:
        return None
    numbers = np.asarray(given, dtype)
    if numbers.shape not in ((), (n_cells,)):
        msg = f"{name} must be one number, or one for each of {n_cells} cells, got shape {numbers.shape}."
        raise ValueError(msg)
    return np.array(np.broadcast_to(numbers, (n_cells,)))


def condition_ids_of(
    columns: dict[str, Any], n_cells: int, library_size: Any, model: Any
) -> torch.Tensor | None:
    """Encode conditions; depth follows the library sizes unless it was named.

    Args:
        columns: Name -> category of all cells, or (N,) categories.
        n_cells: Number of cells N.
        library_size: (N,) molecules per cell, or None.
        model: A diffusion model.

    Returns:
        (N, K) ids, or None for a network without conditions.

    Raises:
        ValueError: If a depth that was named is not that of the library sizes, or there are no conditions.
    """
    known = model.config.conditions
    if not known:
        if columns:
            msg = f"Conditions came ({', '.join(columns)}), and this checkpoint was trained without any."
            raise ValueError(msg)
        return None
    depth = {} if LIBRARY_SIZE not in known or library_size is None else {LIBRARY_SIZE: library_size}
    ids = encode_conditions(depth | columns, n_cells, known)
    if depth and columns.get(LIBRARY_SIZE) is not None:
        place = list(known).index(LIBRARY_SIZE)
        follows = encode_conditions(depth, n_cells, known)[:, place]
        if not torch.equal(ids[:, place], follows):
            cell = int((ids[:, place] != follows).nonzero()[0])
            msg = (
                f"The condition library_size and the library size of cell {cell} "
                f"({np.asarray(library_size, float).flat[cell]:g} molecules) contradict each other. Give one."
            )
            raise ValueError(msg)
    return ids


def _as_anndata(
    made: Any,
    tokenizer: CellTokenizer,
    obs: Any,
    library_size: Any,
    columns: Mapping[str, Any],
    provenance: dict[str, Any],
) -> anndata.AnnData:
    """Turn generated tokens into an AnnData and say how they came about."""
    names = obs.index if hasattr(obs, "index") and hasattr(obs, "columns") else obs
    adata = tokenizer.decode_anndata(made, obs_names=names, library_size=library_size)
    if names is not obs:
        adata.obs = obs.copy()
        flags = {"input_ids": made.input_ids, "expression_values": made.is_generated.float()}
        drawn = tokenizer.decode_anndata(flags).X.astype(np.uint8)
        drawn.eliminate_zeros()
        adata.layers["is_generated"] = drawn
    adata.obs["is_generated"] = True
    for name, entries in columns.items():
        if not np.all(pd.isna(entries)):  # a condition that no cell has is no column
            adata.obs[name] = entries if np.ndim(entries) == 0 else list(entries)
    if library_size is not None:
        adata.obs["library_size"] = np.asarray(library_size, dtype=np.float64)
    adata.obs["gene_log_prob"] = made.gene_log_prob.cpu().numpy()
    adata.obs["n_network_calls"] = made.n_network_calls.cpu().numpy()
    adata.uns["scdiva"] = provenance
    return adata


def _provenance(
    task: str, model: Any, tokenizer: CellTokenizer, settings: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Say what made cells: task, checkpoint, vocabulary, versions and all settings but the size law."""
    checkpoint = getattr(model.config, "_name_or_path", "") or ""
    chosen = {name: value for name, value in settings.to_dict().items() if value is not None}
    chosen.pop("size_law", None)
    steering = options.get("steering")
    return {
        "task": task,
        "checkpoint": checkpoint.rstrip("/").rsplit("/", 1)[-1],
        "vocabulary_hash": tokenizer.vocabulary.content_hash,
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
        "settings": chosen,
    } | ({} if steering is None else {"steering": steering.describe()})
