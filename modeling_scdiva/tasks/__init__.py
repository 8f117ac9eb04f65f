"""What one does with a trained model: one task a file."""

from modeling_scdiva.tasks.cells import CellTokenizer
from modeling_scdiva.tasks.embedding import embed_cells

__all__ = ["CellTokenizer", "embed_cells"]
