"""Perturbation response: fine-tune on a screen, then predict how any gene changes under any perturbation.

Notable choices:
- Predictions are means over control cells; a gene need neither be expressed nor be among a cell's tokens.

Dimensions: N cells in a file, B cells in a loader batch, G genes of a panel, P perturbations.
Source: METHOD.md section 7.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from modeling_scdiva.adapters import make_trainable
from modeling_scdiva.finetuning import FinetuningArguments, finetune
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
from modeling_scdiva.tasks.genes import asked_tokens
from modeling_scdiva.tasks.perturbation_data import (
    CONTROL,
    MATCHING_KEYS,
    PerturbedCells,
    cell_values,
    cut_cells,
    measure_effects,
    perturbation_name,
    read_perturbed_cells,
    split_perturbation,
    target_tokens,
)
from modeling_scdiva.tasks.perturbation_training import (
    PerturbationSettings,
    TrainingBatches,
    panel_genes,
    perturbation_inputs,
    validation_controls,
    validation_units,
)

# Genes decoded at once when predicting; bounds the memory for wide panels.
GENE_CHUNK = 2048


@dataclass(frozen=True)
class PerturbationFit:
    """A fine-tuned model and what it was fitted to.

    Attributes:
        model: The model, or the PEFT model around it.
        history: Losses and score of each epoch.
        gene_ids: (G,) tokens of the genes it learned to change.
        perturbations: Training perturbations.
        validation: Perturbations or groups that decided when to stop.
    """

    model: nn.Module
    history: list[dict[str, float]]
    gene_ids: np.ndarray
    perturbations: list[str]
    validation: list[str]


def finetune_perturbation(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    perturbation_key: str,
    control_label: str = CONTROL,
    settings: PerturbationSettings | None = None,
    arguments: FinetuningArguments | None = None,
    accelerator: Accelerator | None = None,
    **reading: Any,
) -> PerturbationFit:
    """Teach a model the changes of a screen. The model is changed in place.

    Missing columns, absent controls, groups without controls and targets outside the vocabulary are refused.

    Args:
        adata: AnnData of the training cells, perturbed and controls; nothing of the test perturbations.
        model: `ScDivaForPerturbation`, fresh from a pretrained checkpoint or already fine-tuned.
        tokenizer: The tokenizer of this model.
        perturbation_key: Column of ``obs`` that names the perturbation of each cell, pairs as "A+B".
        control_label: Entry of that column for controls.
        settings: What is learned.
        arguments: Numbers of the run; default those of METHOD.md section 7 for this task, batches of 64.
        accelerator: Where it runs.
        **reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`.

    Returns:
        The model with what it learned from.
    """
    refuse_path(adata)
    _check_model(model, tokenizer)
    settings = PerturbationSettings() if settings is None else settings
    if arguments is None:
        arguments = FinetuningArguments(n_epochs=40, batch_size=64, learning_rate=1e-4)
    cells = read_perturbed_cells(
        adata,
        tokenizer=tokenizer,
        perturbation_key=perturbation_key,
        control_label=control_label,
        match_keys=settings.match_keys,
        **reading,
    )
    return fit_cells(
        cells,
        np.arange(adata.n_obs),
        model=model,
        vocabulary=tokenizer.vocabulary,
        settings=settings,
        arguments=arguments,
        accelerator=accelerator,
    )


def fit_cells(
    cells: PerturbedCells,
    rows: np.ndarray,
    *,
    model: Any,
    vocabulary: Any,
    settings: PerturbationSettings,
    arguments: FinetuningArguments,
    accelerator: Accelerator | None = None,
    show_progress: bool = True,
) -> PerturbationFit:
    """Fine-tune on some cells of a screen that was read before, see `finetune_perturbation`.

    Args:
        cells: The screen.
        rows: Training cells, controls among them.
        model: `ScDivaForPerturbation`.
        vocabulary: `GeneVocabulary` of the tokenizer.
        settings: What is learned.
        arguments: Numbers of the run.
        accelerator: Where it runs.
        show_progress: Show a progress bar.

    Returns:
        The model with what it learned from.
    """
    held, kind = validation_units(cells, rows, settings, arguments.seed)
    units = cells.perturbations[rows] if kind == "perturbation" else cells.groups[rows]
    train_rows, validation_rows = rows[~np.isin(units, held)], rows[np.isin(units, held)]
    if kind == "perturbation":  # held-out perturbations are compared with the same controls
        validation_rows = np.concatenate([validation_rows, rows[cells.is_control[rows]]])
    gene_ids = panel_genes(cells, train_rows, vocabulary=vocabulary, settings=settings)
    effects = measure_effects(cells, train_rows, gene_ids)
    names = sorted(set(cells.perturbations[rows]) - {CONTROL})
    targets = target_tokens(names, vocabulary=vocabulary, perturbation_genes=settings.perturbation_genes)
    batches = TrainingBatches(
        cells,
        train_rows,
        effects,
        gene_ids=gene_ids,
        targets=targets,
        settings=settings,
        seed=arguments.seed,
    )
    if settings.with_mean:  # before an adapter copies the decoder
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        # What is left out counts as one: a group of few cells as much as one of many, if groups are.
        by_group = settings.validation_unit == "group"
        deltas = list(batches.deltas.values()) if by_group else effects.deltas
        base.set_mean_deltas(gene_ids, np.mean(deltas, axis=0))
    trained = make_trainable(model, settings.trainable, modules_to_save=("delta_decoder",))
    validate = None
    if held:
        truth = measure_effects(cells, validation_rows, gene_ids)
        controls = validation_controls(cells, validation_rows, arguments.seed)

        def validate() -> float:
            wanted = [targets[name] for name in truth.names]
            predicted = mean_deltas(trained, cells.inputs, controls, targets=wanted, gene_ids=gene_ids)
            errors = ((predicted - truth.deltas) ** 2) @ batches.weights
            return 1.0 - float(errors.sum() / ((truth.deltas**2) @ batches.weights).sum())

    history = finetune(
        trained,
        n_examples=batches.n_examples,
        make_batch=lambda chosen, epoch: batches.make(model.config, chosen, epoch),
        arguments=arguments,
        accelerator=accelerator,
        validate=validate,
        show_progress=show_progress,
    )
    return PerturbationFit(trained, history, gene_ids, effects.names, held)


def predict_perturbation(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    perturbations: Sequence[str],
    perturbation_genes: Mapping[str, Sequence[str]] | None = None,
    genes: Sequence[str] | None = None,
    batch_size: int = 64,
    show_progress: bool = True,
    **reading: Any,
) -> Any:
    """Predict how expression changes in these cells under perturbations, seen in training or not.

    Args:
        adata: AnnData of control cells alone, see `control_cells`; the prediction is their mean.
        model: Fine-tuned `ScDivaForPerturbation`, or the PEFT model around it.
        tokenizer: The tokenizer of this model.
        perturbations: Names such as "A" or "A+B"; targets are genes of the vocabulary, or are listed in
            ``perturbation_genes``.
        perturbation_genes: Part of a name -> its targeted genes, such as {"IFNb": ["IFNB1"]}.
        genes: Genes whose change is asked for, ids or symbols, measured here or not; default all genes of
            the AnnData that the vocabulary has.
        batch_size: Cells in one forward pass.
        show_progress: Show a progress bar.
        **reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`.

    Returns:
        AnnData (P, G): ``X`` the expression_delta, float32 change of mean log1p of normalised counts against
        these controls; ``obs_names`` the sorted names; ``obs["target_genes"]``, ``obs["n_control_cells"]``;
        ``var["gene_symbols"]``, ``var["is_measured"]``; ``layers["control_mean"]``, NaN where the gene is not
        measured.

    Raises:
        TypeError: If one text comes instead of a list of perturbations.
        ValueError: If no perturbation or one without targets is asked for, or one twice.
    """
    import anndata

    refuse_path(adata)
    _check_model(model, tokenizer)
    vocabulary = tokenizer.vocabulary
    if isinstance(perturbations, str):
        msg = f"perturbations must be a list of names, got the text {perturbations!r}."
        raise TypeError(msg)
    names = [perturbation_name(split_perturbation(name)) for name in perturbations]
    if not names or CONTROL in names or len(set(names)) < len(names):
        msg = (
            f"perturbations must name at least one perturbation, each once and none the control, got "
            f"{shown(perturbations)}."
        )
        raise ValueError(msg)
    targets = target_tokens(names, vocabulary=vocabulary, perturbation_genes=perturbation_genes)
    max_genes = reading.pop("max_genes", None) or tokenizer.max_genes
    everything = read_cells(adata, tokenizer=tokenizer, max_genes=tokenizer.vocab_size, **reading)
    matching = {key: reading[key] for key in MATCHING_KEYS if key in reading}
    matched = np.asarray(tokenizer.match_genes(adata, **matching).token_ids)
    if genes is None:
        gene_ids = matched[matched >= 0]  # in the order of the file
    else:
        gene_ids = asked_tokens(genes, vocabulary=vocabulary, what="genes")
    predicted = mean_deltas(
        model,
        cut_cells(everything, max_genes),
        np.arange(adata.n_obs),
        targets=[targets[name] for name in names],
        gene_ids=gene_ids,
        batch_size=batch_size,
        show_progress=show_progress,
    )
    result = anndata.AnnData(predicted.astype(np.float32))
    result.obs_names = names
    result.obs["target_genes"] = [
        "+".join(vocabulary.gene_symbols[token] for token in targets[name]) for name in names
    ]
    result.obs["n_control_cells"] = adata.n_obs
    result.var_names = [vocabulary.gene_ids[token] for token in gene_ids]
    result.var["gene_symbols"] = [vocabulary.gene_symbols[token] for token in gene_ids]
    is_measured = np.isin(gene_ids, matched)
    result.var["is_measured"] = is_measured
    means = np.asarray(cell_values(everything, tokenizer.vocab_size)[:, gene_ids].mean(axis=0)).ravel()
    means = np.where(is_measured, means, np.nan).astype(np.float32)
    result.layers["control_mean"] = np.tile(means, (len(names), 1))
    return result


def mean_deltas(
    model: Any,
    cells: TokenizedCells,
    rows: np.ndarray,
    *,
    targets: Sequence[np.ndarray],
    gene_ids: np.ndarray,
    batch_size: int = 64,
    show_progress: bool = False,
) -> np.ndarray:
    """Predict changes, averaged over control cells.

    Args:
        model: `ScDivaForPerturbation`.
        cells: Tokenised cells.
        rows: (n,) control cells.
        targets: P times the tokens of the targeted genes.
        gene_ids: (G,) tokens of the genes asked for.
        batch_size: Cells in one forward pass.
        show_progress: Show a progress bar.

    Returns:
        (P, G) float64 changes.
    """
    means = np.zeros((len(targets), len(gene_ids)))
    total = len(targets) * len(rows)
    with tqdm(total=total, unit=" cells", desc="Predicting", disable=not show_progress) as bar:
        for row, target in enumerate(targets):
            for found, deltas in cell_deltas(
                model, cells, rows, target=target, gene_ids=gene_ids, batch_size=batch_size
            ):
                means[row] += deltas.sum(axis=0, dtype=np.float64) / len(rows)
                bar.update(len(found))
    return means


def cell_deltas(
    model: Any,
    cells: TokenizedCells,
    rows: np.ndarray,
    *,
    target: np.ndarray,
    gene_ids: np.ndarray,
    batch_size: int = 64,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Predict changes cell by cell.

    Args:
        model: `ScDivaForPerturbation`.
        cells: Tokenised cells.
        rows: (n,) control cells.
        target: (T,) tokens of the targeted genes.
        gene_ids: (G,) tokens of the genes asked for.
        batch_size: Cells in one forward pass.

    Yields:
        Positions (B,) in ``rows`` and the changes (B, G) float32 there.

    Raises:
        ValueError: If there are no control cells.
        FloatingPointError: If a prediction is not finite.
    """
    rows = np.asarray(rows)
    if len(rows) == 0:
        msg = "There is no control cell to predict from. Check the selection of controls."
        raise ValueError(msg)
    device = next(model.parameters()).device
    queries = torch.from_numpy(np.asarray(gene_ids, dtype=np.int64)).to(device)
    with evaluation_mode(model), torch.inference_mode():
        for places in length_batches(cells.n_genes[rows], batch_size):
            inputs = perturbation_inputs(model.config, cells, rows[places], [target] * len(places))
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            parts = [
                model(**inputs, gene_ids=chunk).expression_deltas.float().cpu().numpy()
                for chunk in queries.split(GENE_CHUNK)
            ]
            deltas = np.concatenate(parts, axis=1)
            if not np.isfinite(deltas).all():
                msg = "Predicted changes are not finite. Load the model with dtype=torch.float32."
                raise FloatingPointError(msg)
            yield places, deltas


def _check_model(model: Any, tokenizer: CellTokenizer) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "delta_decoder"):
        msg = (
            f"Perturbations need ScDivaForPerturbation, got {type(base).__name__}. Load it from the "
            "pretrained checkpoint: ScDivaForPerturbation.from_pretrained(folder)."
        )
        raise TypeError(msg)
    check_vocabulary(model, tokenizer)
