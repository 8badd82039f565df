"""Names that stand beside the models in the scores: plain constants, for the workflow, the config and the tasks."""

CONTROLS = ("labels", "shuffled", "batches")
"""The controls, each an embedder of `cellmill.tasks.controls`."""

GROUPS = ("baselines", "controls")
"""Methods that one job scores together."""
