"""Views: what each architecture sees of raw cells, as pure functions from a `CellBatch` to ragged arrays.

One module an architecture. `pretrain` hides what is to be predicted, every choice keyed by (seed, step, joinid, gene);
`embed` chooses nothing that another batch would choose otherwise. So a cell's view is the same alone, in any batch and
at any place in it. Nothing is padded: a matrix is the model's last step, if it wants one.
"""

from cellmill.memory import keep_freed_memory

keep_freed_memory()
