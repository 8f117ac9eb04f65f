"""Which kernels do the loops over genes: compiled ones where numba is installed, else plain NumPy.

Both give the same bytes; the compiled ones are several times faster. numba is a dependency of the package, so
NumPy's turn comes only where the tokenizer was loaded from a checkpoint's own code, or where somebody asks
for it by the environment variable ``SCDIVA_COMPILED=0``.
"""

import logging
import os
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)


@cache
def compiled_kernels() -> Any:
    """Load the compiled kernels, on first use: numba takes half a second to import.

    Returns:
        The functions of `compiled_scdiva`, or None where plain NumPy is to do it.
    """
    if os.environ.get("SCDIVA_COMPILED", "1") == "0":
        return None
    try:
        from .compiled_scdiva import KERNELS
    except ImportError:
        logger.warning("numba is not installed: cells are ranked by plain NumPy, several times slower.")
        return None
    return KERNELS
