"""cellmill: pretrain single-cell foundation models on one corpus and weigh them against strong baselines.

Data flows one way through the rooms of this package::

    census -> qc -> vocabulary -> shards -> views -> models -> pretrain -> embed -> tasks -> scores -> report

Importing ``cellmill`` imports none of them: each room imports what it needs where it needs it, so that a GPU node
needs only torch, numpy, pyarrow and safetensors.
"""

__version__ = "0.1.0"
