"""Reconstruction: hide genes of real cells, let the model predict them, and keep every single prediction.

Notable choices:
- Which genes are hidden is a function of the seed and the cell's row alone, never of batches; a larger share
  hides the same genes and more of them.
- Exactly ``round(share * genes)`` genes of a cell are hidden, at least one.
- `repeat_cells` gives the model the clean cell and takes the arg-max at every position, which is no task at
  all (see `metrics.reconstruction.copy_test`); visible genes are not excluded there.

Dimensions: N cells, B cells of a batch, S positions, V vocabulary, n hidden genes of all cells.
Source: METHOD.md sections 2 and 8.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modeling_scdiva.metrics.reconstruction import cell_gene_scores, cell_value_scores, score_gene_laws
from modeling_scdiva.pretrained_scdiva import evaluation_mode
from modeling_scdiva.tasks.cells import (
    CellTokenizer,
    TokenizedCells,
    check_vocabulary,
    length_batches,
    read_cells,
)

IGNORED_LABEL = -100
MASKING_TARGETS = ("joint", "expression")


@dataclass(frozen=True)
class ReconstructedCells:
    """What became of every hidden gene, cell after cell; cell ``i`` owns ``offsets[i]:offsets[i + 1]``.

    Attributes:
        offsets: (N + 1,) int64.
        positions: (n,) place of the gene in its cell, from 1; 0 is the anchor.
        true_genes: (n,) tokens.
        predicted_genes: (n,) likeliest tokens; equal to the true ones where only values were hidden.
        gene_loss: (n,) nats; 0 where only values were hidden.
        true_values: (n,) log1p of normalised counts.
        predicted_values: (n,) predictions for the true gene, where the value head uses the gene.
        cell_scores: N dicts of scores; empty for a cell without a gene.
    """

    offsets: np.ndarray
    positions: np.ndarray
    true_genes: np.ndarray
    predicted_genes: np.ndarray
    gene_loss: np.ndarray
    true_values: np.ndarray
    predicted_values: np.ndarray
    cell_scores: tuple[dict[str, float], ...]


def reconstruct_cells(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    mask_ratio: float = 0.5,
    masking_target: str = "joint",
    seed: int = 0,
    batch_size: int = 32,
    **reading: Any,
) -> ReconstructedCells:
    """Hide a share of the genes of each cell and predict them.

    Args:
        adata: AnnData with N cells.
        model: A `ScDivaForMaskedDiffusion`; runs where it is, in evaluation mode.
        tokenizer: The tokenizer of this model.
        mask_ratio: Share of a cell's genes that is hidden, in (0, 1].
        masking_target: "joint" hides gene and value, "expression" the value of a gene that stays in sight.
        seed: Another seed, other genes.
        batch_size: Cells in one forward pass; no result depends on it beyond rounding.
        **reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`.

    Returns:
        Predictions at the hidden places, and scores of each cell. A model without a gene head raises
        ``TypeError``.
    """
    check_diffusion_model(model)
    check_vocabulary(model, tokenizer)
    cells = read_cells(adata, tokenizer=tokenizer, **reading)
    found: list[dict[str, np.ndarray]] = [{} for _ in range(cells.n_cells)]
    scores: list[dict[str, float]] = [{} for _ in range(cells.n_cells)]
    batches = masked_batches(
        cells,
        mask_ratio=mask_ratio,
        masking_target=masking_target,
        seed=seed,
        batch_size=batch_size,
        mask_token_id=model.config.mask_token_id,
    )
    for rows, batch in batches:
        for row, entry in zip(rows.tolist(), predict_hidden(model, batch), strict=True):
            found[row], scores[row] = entry, entry_scores(entry)
    lengths = [len(entry["positions"]) for entry in found]
    return ReconstructedCells(
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        **{name: np.concatenate([entry[name] for entry in found]) for name in FLAT_FIELDS},
        cell_scores=tuple(scores),
    )


FLAT_FIELDS = (
    "positions", "true_genes", "predicted_genes", "gene_loss", "true_values", "predicted_values",
)  # fmt: skip


def check_diffusion_model(model: Any) -> None:
    """Refuse a model that predicts no genes.

    Args:
        model: What came.

    Raises:
        TypeError: If it has no gene head.
    """
    if not hasattr(model, "predict_expression"):
        msg = (
            f"Hidden genes are predicted by a ScDivaForMaskedDiffusion, got {type(model).__name__}, which "
            "has no gene head. Load the checkpoint with ScDivaForMaskedDiffusion.from_pretrained."
        )
        raise TypeError(msg)


def hidden_places(n_genes: int, mask_ratio: float, *, seed: int, row: int) -> np.ndarray:
    """Draw the genes of one cell that are hidden.

    Args:
        n_genes: Genes of the cell.
        mask_ratio: Share that is hidden, in (0, 1].
        seed: Of all draws.
        row: Of the cell in its file.

    Returns:
        (n_genes,) bool, True at ``round(mask_ratio * n_genes)`` genes, at least one. With a larger share, the
        same genes are hidden and more.

    Raises:
        ValueError: If ``mask_ratio`` lies outside (0, 1].
    """
    if not 0.0 < mask_ratio <= 1.0:
        msg = f"mask_ratio must lie in (0, 1], got {mask_ratio}. It is the share of a cell's genes to hide."
        raise ValueError(msg)
    n_hidden = min(n_genes, max(1, round(mask_ratio * n_genes)))
    is_hidden = np.zeros(n_genes, dtype=bool)
    is_hidden[np.random.default_rng([seed, row]).permutation(n_genes)[:n_hidden]] = True
    return is_hidden


def masked_batches(
    cells: TokenizedCells,
    *,
    mask_ratio: float,
    mask_token_id: int,
    masking_target: str = "joint",
    seed: int = 0,
    batch_size: int = 32,
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """Hide genes of all cells, batch by batch.

    Args:
        cells: Tokenized cells.
        mask_ratio: Share of a cell's genes that is hidden, in (0, 1].
        mask_token_id: Token of a hidden gene.
        masking_target: "joint" hides gene and value, "expression" the value only.
        seed: Of the draws.
        batch_size: Cells in a batch.

    Yields:
        Rows (B,) and the inputs of `ScDivaForMaskedDiffusion`, as the collator of the training makes them.

    Raises:
        ValueError: If ``masking_target`` is neither.
    """
    if masking_target not in MASKING_TARGETS:
        msg = f"masking_target must be one of {', '.join(MASKING_TARGETS)}, got {masking_target!r}."
        raise ValueError(msg)
    for rows in length_batches(cells.n_genes, batch_size):
        inputs = cells.batch(rows)
        is_masked = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
        for place, (row, length) in enumerate(zip(rows.tolist(), cells.n_genes[rows].tolist(), strict=True)):
            is_hidden = hidden_places(length, mask_ratio, seed=seed, row=row)
            is_masked[place, 1 : length + 1] = torch.from_numpy(is_hidden)
        genes, values = inputs["input_ids"], inputs["expression_values"]
        hides_gene = masking_target == "joint"
        batch = {
            "input_ids": genes.masked_fill(is_masked, mask_token_id) if hides_gene else genes,
            "expression_values": values.masked_fill(is_masked, 0.0),
            "attention_mask": inputs["attention_mask"],
            "is_masked": is_masked,
            "labels": genes.masked_fill(~is_masked, IGNORED_LABEL)
            if hides_gene
            else torch.full_like(genes, IGNORED_LABEL),
            "expression_labels": values,
        }
        yield rows, batch


def predict_hidden(model: Any, batch: Mapping[str, torch.Tensor]) -> Iterator[dict[str, np.ndarray]]:
    """Predict what one batch hides.

    Args:
        model: A `ScDivaForMaskedDiffusion`.
        batch: As `masked_batches` yields it.

    Yields:
        For each cell its `FLAT_FIELDS`, (n,) each, and what `score_gene_laws` gives.
    """
    with evaluation_mode(model), torch.inference_mode():
        outputs = model(**{name: entry.to(model.device) for name, entry in batch.items()})
        log_laws = None
        if (batch["labels"] != IGNORED_LABEL).any():
            logits = outputs.logits
            if logits.dim() == 3:  # a model that gives logits everywhere
                logits = logits[(batch["labels"] != IGNORED_LABEL).to(logits.device)]
            log_laws = logits.float().log_softmax(dim=-1).cpu()
        predicted = outputs.expression_predictions.float().cpu().numpy()
    start = 0
    for row in range(len(predicted)):
        positions = batch["is_masked"][row].nonzero().squeeze(1).numpy()
        stop = start + len(positions)
        labels, ids = batch["labels"][row].numpy(), batch["input_ids"][row].numpy()
        entry = {
            "positions": positions,
            "true_values": batch["expression_labels"][row].numpy()[positions],
            "predicted_values": predicted[row][positions],
        }
        if log_laws is None or not len(positions):
            genes = ids[positions]
            yield entry | {
                "true_genes": genes,
                "predicted_genes": genes,
                "gene_loss": np.zeros(len(positions)),
            }
            continue
        genes = labels[positions]
        yield entry | {"true_genes": genes} | score_gene_laws(log_laws[start:stop].numpy(), genes)
        start = stop


def entry_scores(entry: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Score one cell of `predict_hidden`.

    Args:
        entry: Predictions at its hidden places.

    Returns:
        Scores of `cell_gene_scores` (where genes were hidden) and `cell_value_scores`, and
        ``value_mae_where_gene_correct`` where a hidden gene was predicted right; empty without hidden places.
    """
    if not len(entry["positions"]):
        return {}
    scores = cell_value_scores(entry["true_values"], entry["predicted_values"])
    if "expected_place" in entry:
        scores |= cell_gene_scores(entry, entry["true_genes"])
        is_correct = entry["predicted_genes"] == entry["true_genes"]
        if is_correct.any():
            errors = np.abs(entry["true_values"] - entry["predicted_values"])[is_correct]
            scores["value_mae_where_gene_correct"] = float(errors.mean())
    return scores


def copy_accuracy(model: Any, batch: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Say how often the gene head repeats a gene that it sees, the leak that masked scores must not contain.

    Args:
        model: A `ScDivaForMaskedDiffusion`.
        batch: As `masked_batches` yields it.

    Returns:
        (B,) share of the visible genes of each cell that are the arg-max at their own place, visible genes
        not excluded; NaN for a cell without a visible gene.
    """
    predicted = _argmax_genes(model, batch)
    genes = batch["input_ids"]
    is_visible = (genes >= model.config.n_special_tokens) & batch["attention_mask"].bool()
    hits = ((predicted == genes) & is_visible).sum(dim=1).double()
    return (hits / is_visible.sum(dim=1)).numpy()


def repeat_cells(
    cells: TokenizedCells, *, model: Any, rows: np.ndarray, batch_size: int = 32
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Give the model clean cells and take the arg-max gene at every position: the legacy copy test.

    Args:
        cells: Tokenized cells.
        model: A `ScDivaForMaskedDiffusion`.
        rows: Cells to take.
        batch_size: Cells in one forward pass.

    Returns:
        Input tokens and output tokens of each row, in the order of ``rows``.
    """
    inputs: list[np.ndarray] = []
    outputs: list[np.ndarray] = []
    for start in range(0, len(rows), batch_size):
        batch = cells.batch(rows[start : start + batch_size])
        predicted = _argmax_genes(model, batch)
        for ids, genes, length in zip(
            batch["input_ids"], predicted, batch["attention_mask"].sum(dim=1).tolist(), strict=True
        ):
            inputs.append(ids[1:length].numpy())
            outputs.append(genes[1:length].numpy())
    return inputs, outputs


def _argmax_genes(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(B, S) likeliest gene at every position, special tokens excluded and visible genes not."""
    names = ("input_ids", "expression_values", "attention_mask", "is_masked")
    inputs = {name: batch[name].to(model.device) for name in names if name in batch}
    with evaluation_mode(model), torch.inference_mode():
        states = model.model(**inputs).last_hidden_state  # (B, S, D)
        genes = []
        for cell_states in states:  # logits of one cell at a time: (S, V)
            logits = model.lm_head(model.gene_transform(cell_states))
            logits[:, : model.config.n_special_tokens] = -torch.inf
            genes.append(logits.argmax(dim=-1).cpu())
    return torch.stack(genes)
