"""Views: what each architecture sees of raw cells, as pure functions from a `CellBatch` to ragged arrays.

One module an architecture. `pretrain` hides what is to be predicted, every choice keyed by (seed, step, joinid, gene);
`embed` chooses nothing that another batch would choose otherwise. So a cell's view is the same alone, in any batch and
at any place in it. Nothing is padded: a matrix is the model's last step, if it wants one.
"""

import numpy as np

np.empty(2**24, np.uint8)
"""Freed at once, by which glibc learns to keep memory of arrays up to 16 MB instead of giving it back after each one:
taking it again costs several times what a view computes on it."""
