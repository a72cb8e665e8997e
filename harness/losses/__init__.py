"""Losses as pure tensor functions: from a teacher's next-token distributions, and of preference.

chunks.py   the passes over chunks of tokens, which every loss shares: no tensor of tokens x vocabulary, gradient in the forward
sparse.py   from a teacher that was written down: K entries per token and what is left of the mass
dense.py    from a teacher that is resident: its hidden states and its head
preference.py    of preference, from log-probabilities of whole answers: DPO and its kin, KTO

N tokens, H hidden, V vocabulary, K kept entries, m draws. Results are sums over tokens: divide them by the tokens of the global batch.
"""

from harness.losses.chunks import DivergenceLoss, Head
from harness.losses.dense import dense_divergence
from harness.losses.sparse import SparseTargets, sparse_divergence

__all__ = ["DivergenceLoss", "Head", "SparseTargets", "dense_divergence", "sparse_divergence"]
