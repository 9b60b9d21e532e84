"""CPU kernels in C++, compiled on first use for this machine: packed weights, products, paged attention, and a whole step as one call.

`source/` holds the C++; `compiler.py` builds it into the cache; `library.py` is the C interface; `program.py` the records that a step is made of.
Where no compiler is found everything still runs on torch, and `unavailable()` says why.
"""

from tradespace.kernels.native.compiler import is_compiled
from tradespace.kernels.native.library import Library, load, unavailable

__all__ = ["Library", "is_compiled", "load", "unavailable"]
