"""What the papers say that their models can do without further training: one file an ability, batched."""
