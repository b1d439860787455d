"""Which keys a query sees: what every kernel of attention must follow."""

import jax

Array = jax.Array


def visible(
    positions, segment_ids, kv_positions, kv_segment_ids, causal=True, window=None, chunk=None
) -> Array:
    """Which keys a query sees.  `[..., T]`, `[..., S]` -> `[..., T, S]` bool.

    Padding sees nothing where attention is causal, and every real token where it is not: heads of
    encoders read column 0, padding or not, as transformers has them.
    """
    of_queries = segment_ids[..., :, None]
    of_keys = kv_segment_ids[..., None, :]
    if not causal:
        return ((of_queries == of_keys) | (of_queries == 0)) & (of_keys != 0)
    distance = positions[..., :, None] - kv_positions[..., None, :]
    allowed = (of_queries == of_keys) & (of_queries != 0) & (distance >= 0)
    if window is not None:
        allowed = allowed & (distance < window)
    if chunk is not None:
        same = positions[..., :, None] // chunk == kv_positions[..., None, :] // chunk
        allowed = allowed & same
    return allowed
