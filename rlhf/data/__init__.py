"""Data on its way to the device: rows of tokens, pairs, and the order of batches."""

from rlhf.data.order import batch_indices as batch_indices
from rlhf.data.rows import encode_rows as encode_rows
from rlhf.data.rows import preference_pairs as preference_pairs
from rlhf.data.rows import read_lines as read_lines
