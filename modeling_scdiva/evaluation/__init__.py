"""Protocols: data, splits, seeds, baselines and scDiVa together, one task a file, one result each."""

from modeling_scdiva.evaluation.report import (
    data_names,
    format_result,
    join_results,
    print_result,
    summarise,
    write_result,
)

__all__ = ["data_names", "format_result", "join_results", "print_result", "summarise", "write_result"]
