"""One transformer for every decoder and encoder: a config says which."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf.fields import documented
from rlhf.from_flax import from_linen
from rlhf.lm import EXPERTS, LM
from rlhf.models.block import Block, Extra
from rlhf.models.config import REMAT, Heads, TransformerConfig
from rlhf.models.experts import Routed, Routing
from rlhf.models.layers import all_leaves, initial, leaves, nothing_lent, rank, runs
from rlhf.models.linear import linear, look_up, or_zero, rows
from rlhf.models.position_bias import alibi, relative
from rlhf.models.rotary import rotations
from rlhf.models.self_attention import Cached
from rlhf.models.weights import Weights
from rlhf.sharding import constrain, platform, ways
from rlhf.shared_prefix import NOT_SHARED, SharedPrefix

Array = jax.Array


@documented
class Cache(NamedTuple):
    """Keys and values of what was read so far.  Every leaf has the batch on axis 0.

    Attributes:
      written: [B] int32, columns written: the write index.
      positions: [B, S] int32.
      segment_ids: [B, S] int32, 0 = not written, or padding.
      layers: per layer keys and values [B, K, S, H], or the state of its mixer.
    """

    written: Array
    positions: Array
    segment_ids: Array
    layers: tuple[Any, ...]


def transformer(config: TransformerConfig) -> LM:
    """The `LM` of a config.

    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=2, num_heads=1, mlp_size=8, tied=True))
    >>> params = lm.init(jax.random.key(0))
    >>> tokens = jnp.ones((1, 3), jnp.int32)
    >>> h, _, _ = lm.hidden(params, tokens, positions=jnp.arange(3)[None], segment_ids=tokens)
    >>> lm.unembed(params, h).shape
    (1, 3, 8)
    """
    return from_linen(Transformer(config))


class Stack(Weights):
    """Positions, blocks, final norm: from embedded tokens to hidden states.

    `layers` holds the blocks' parameters stacked, `[num_layers, ...]`; those of MLPs and experts
    over the layers with them.
    """

    config: TransformerConfig

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.hidden_size**-0.5)
        self.layers = self._stacked()
        if c.final_norm:
            self.final_norm = self.norm_weights("final_norm", c.hidden_size)
        if c.embed_norm:
            self.embed_norm = self.norm_weights("embed_norm", c.hidden_size)
        if c.max_positions:
            rows = c.max_positions + c.position_offset
            self.position_embedding = self.weight(
                "position_embedding", (rows, c.hidden_size), (None, "embed"), init
            )
        if c.relative_buckets:
            self.relative = self.weight(
                "relative", (c.relative_buckets, c.num_heads), (None, "heads"), init
            )

    def _stacked(self):
        # One leaf for all layers: a scan over them compiles one block instead of `num_layers`.
        if not self.is_initializing():
            return self.get_variable("params", "layers")
        return self.param("layers", self._init_layers)

    def _init_layers(self, key):
        """Blocks of each kind there is; what several kinds have is taken from the first."""
        c = self.config
        out: dict[str, Any] = {}
        # Kinds that differ in a window alone have the same parameters.
        kinds = {leaves(c, c.kind(i)): c.kind(i) for i in reversed(range(c.num_layers))}
        for kind in reversed(kinds.values()):
            stacked = jax.vmap(partial(initial, c, kind))(jax.random.split(key, c.num_layers))
            for name, leaf in stacked.items():
                # All layers were initialised as if of this kind; as many are taken as have the
                # leaf.
                present = leaf.value[: rank(c, name, c.num_layers)]
                out.setdefault(name, leaf.replace(value=present, names=("layers", *leaf.names)))
        return out

    def run(
        self,
        x: Array,
        positions,
        segment_ids,
        cache=None,
        encoded=None,
        layer_inputs=None,
        chosen=None,
        shared: SharedPrefix = NOT_SHARED,
    ) -> tuple[Array, Cache | None, dict]:
        """Final hidden states of embedded tokens `[B, T, D]`, the cache with these tokens in it,
        and the routing of experts.

        Args:
          encoded: what `encode` of an encoder-decoder returned; None without an encoder.
          layer_inputs: `[B, T, layers, P]`, numbers of each token for each layer; None without.
          chosen: `[B, T, sparse layers, k]`, experts in place of the routers' choice; None: that.
          shared: what the rows of `positions` and `segment_ids` share stands once in `x` and in
            what is returned.
        """
        c = self.config
        if c.max_positions:
            places = or_zero(
                positions + c.position_offset, c.max_positions + c.position_offset, segment_ids
            )
            # The rows before the offset are for padding; a real token with a position below 0 must
            # give NaN rather than read one of them.
            places = jnp.where((segment_ids != 0) & (positions < 0), -1, places)
            x = x + look_up(self.position_embedding, shared.deduplicate(places)).astype(x.dtype)
        x = self.normalise(x, *self.embed_norm) if c.embed_norm else x
        x = constrain(x, *(("batch", "sequence") if cache is None else ("decoded", None)), None)
        # What each layer has of its own travels with its parameters, so that a scan cuts it too.
        of_layers: dict[str, Any] = {}
        cross = None
        if encoded is not None:
            of_layers["cross"] = {name: jnp.moveaxis(encoded[name], 1, 0) for name in ("k", "v")}
            where = dict(kv_positions=encoded["positions"], kv_segment_ids=encoded["segment_ids"])
            cross = dict(positions=positions, segment_ids=segment_ids, **where)
        if layer_inputs is not None:
            of_layers["layer_input"] = jnp.moveaxis(layer_inputs, 2, 0)
        if chosen is not None:
            of_layers["chosen"] = jnp.moveaxis(chosen, 2, 0)
        layers = self.layers
        if isinstance(layers, tuple):
            layers = tuple(
                {**layer, **{name: _at(c, name, x, i) for name, x in of_layers.items()}}
                for i, layer in enumerate(layers)
            )
        else:
            layers = {**layers, **of_layers}
        # Without a cache the model trains, or scores what is there already; with one it decodes.
        run = partial(self._scan, shared) if cache is None else self._unroll
        x, cache, routing, routes = run(x, layers, positions, segment_ids, cache, cross)
        x = self.normalise(x, *self.final_norm) if c.final_norm else x
        aux = {}
        if routes:
            aux = {"routing": routing, EXPERTS: shared.expand(jnp.stack(routes, axis=2))}
        return x, cache, aux

    def _scan(self, shared, x, layers, positions, segment_ids, cache, cross):
        """Training: of each run of layers whose kinds repeat one compiled pattern, scanned; layers
        that repeat nothing stand by themselves.

        A layer's weights are cut from the stack where they are used, and cut again in the backward
        pass: kept, they would be a second copy of the model.  A CPU runs four layers a turn of the
        loop, which spares it most of the loop's buffers; without a loop between them XLA would keep
        what is to be made again, so `prevent_cse`.
        """
        c = self.config
        attention_inputs, rotations = self._where(positions, segment_ids, None)
        layers_a_turn = 4 if platform() == "cpu" else 1

        def apply(carry, stack, repeat, run, place):
            x, routing, lent = carry
            layer = _layer(c, stack, run, repeat, place)
            kind = c.kind(run.start + place)
            x, kv, routed = _block(
                c, layer, x, kind, rotations, None, attention_inputs, cross, lent, shared
            )
            lent = lent if kind.lends is None else {**lent, kind.lends: kv}
            carry = constrain(x, "batch", "sequence", None), _add(routing, routed), lent
            return carry, None if routed is None else routed.chosen

        # The repeat is an array, the index of the scan; run and place are Python values, as which
        # leaves a layer has, and its window, are known when the program is compiled.
        def again(prevent_cse):
            return jax.checkpoint(
                apply, static_argnums=(3, 4), prevent_cse=prevent_cse, policy=REMAT[c.remat]
            )

        carry = x, self._no_routing(x), nothing_lent(c, *positions.shape)
        routes: list[Array] = []
        for first, number, stack in _stacks(layers, c):
            # Vectors of all layers at once: gathered one by one, each would cost a message.
            stack = {name: _replicated_if_vectors(leaf) for name, leaf in stack.items()}
            for run in _runs(c, first, number):
                unroll = max(1, layers_a_turn // run.length)
                step = again(prevent_cse=unroll > 1 or run.times == 1)

                # Defaults bind this round's values; a closure would see the last round's.
                def pattern(carry, repeat, stack=stack, run=run, step=step):
                    of_places = []
                    for place in range(run.length):
                        carry, chosen = step(carry, stack, repeat, run, place)
                        of_places += [] if chosen is None else [chosen]
                    return carry, of_places

                if run.times > 1:
                    repeats = jnp.arange(run.times)
                    carry, of_places = jax.lax.scan(pattern, carry, repeats, unroll=unroll)
                    routes += [x[i] for i in range(run.times) for x in of_places]
                else:
                    carry, of_places = pattern(carry, 0)
                    routes += of_places
        return carry[0], None, carry[1], routes

    def _unroll(self, x, layers, positions, segment_ids, cache, cross):
        """Prefill and decoding: each layer by itself over the same stacked parameters, with a cache
        of its own.
        """
        c = self.config
        routing = self._no_routing(x)
        room = cache.positions.shape[1]
        if x.shape[1] > room:
            raise ValueError(
                f"{x.shape[1]} columns but a cache of {room}; make it with init_cache(batch, "
                "length) of them all"
            )

        # Tokens that fill the cache are all that it holds: attention reads their own keys, by a
        # fused kernel too.  Not where angles depend on the length, which is the cache's.
        fills = x.shape[1] == room and not _by_length(c)

        # Each row has its own write index, since prompts may have been read to different lengths.
        def write_at(axis, old, new):
            if fills:
                return new.astype(old.dtype)

            def one(old, new, i):
                return jax.lax.dynamic_update_slice_in_dim(old, new, i, axis)

            return jax.vmap(one)(old, new, cache.written)

        write = partial(write_at, 1)
        cache_positions = write_at(0, cache.positions, positions)
        cache_segments = write_at(0, cache.segment_ids, segment_ids)
        attention_inputs, rotations = self._where(
            positions, segment_ids, None if fills else (cache_positions, cache_segments)
        )
        layer_caches: list[Any] = []
        routes: list[Array] = []
        lent = nothing_lent(c, *cache.positions.shape)
        for i, layer in enumerate(cut(layers, c)):
            x, kv, routed = _block(
                c,
                layer,
                x,
                c.kind(i),
                rotations,
                Cached(cache.layers[i], write, fills),
                attention_inputs,
                cross,
                lent,
            )
            lent = lent if c.kind(i).lends is None else {**lent, c.kind(i).lends: kv}
            # What a layer takes of another is in that one's cache.
            layer_caches.append(() if c.kind(i).borrows else kv)
            routing = _add(routing, routed)
            routes += [] if routed is None else [routed.chosen]
        # A device cannot raise.  Beyond the end `dynamic_update_slice` moves the start back and
        # writes over older tokens, which would be believed; NaN is not.
        written_over = cache.written + x.shape[1] > room
        x = jnp.where(written_over[:, None, None], jnp.nan, x)
        return (
            x,
            Cache(cache.written + x.shape[1], cache_positions, cache_segments, tuple(layer_caches)),
            routing,
            routes,
        )

    def _where(self, positions, segment_ids, cached):
        """What attention asks for of queries and keys, and the angles of rotary positions."""
        c = self.config
        kv_positions, kv_segment_ids = cached or (positions, segment_ids)
        bias = None
        if c.alibi:
            bias = alibi(c.num_heads, positions, kv_positions)
        if c.relative_buckets:
            bias = relative(
                self.relative,
                positions,
                kv_positions,
                causal=c.causal,
                max_distance=c.relative_distance,
            )
        attention_inputs = dict(
            positions=positions,
            segment_ids=segment_ids,
            kv_positions=kv_positions,
            kv_segment_ids=kv_segment_ids,
            bias=bias,
        )
        widths = [(kind.rope, kind.heads.width if kind.heads else c.width) for kind in c.kinds]
        ropes = [(rope, width) for rope, width in widths if rope and c.rotary]
        return attention_inputs, rotations(ropes, positions, segment_ids, *(cached or (None, None)))

    def _no_routing(self, x) -> Routing | None:
        c = self.config
        if c.experts is None or not any(kind.sparse for kind in c.kinds):
            return None
        # Zeros to add to: a scan's carry must have its final structure from the start.
        zeros = jnp.zeros((x.shape[0], c.experts.number), jnp.promote_types(x.dtype, jnp.float32))
        return Routing(zeros, zeros, zeros[:, 0])


class Transformer(Stack):
    """Embedding, stack, output matrix."""

    def setup(self):
        super().setup()
        c = self.config
        init = nn.initializers.normal(c.hidden_size**-0.5)
        self.embedding, self.unembedding, self.unembedding_bias = ends(self, c)
        if c.token_types:
            self.type_embedding = self.weight(
                "type_embedding", (c.token_types, c.hidden_size), (None, "embed"), init
            )
        if c.layer_input_size:
            size = c.num_layers * c.layer_input_size
            table = ("layer_input_embedding", (c.vocab_size, size), ("vocab", "embed"), init)
            self.layer_input_embedding = self.weight(*table)
            matrix = ("layer_input_projection", (c.hidden_size, size), ("embed", None), init)
            self.layer_input_projection = self.weight(*matrix)
            self.layer_input_norm = self.norm_weights("layer_input_norm", c.layer_input_size)
        if c.embed_size:
            self.project_in = self.weight(
                "project_in", (c.embed_size, c.hidden_size), (None, "embed"), init
            )
            self.project_out = self.weight(
                "project_out", (c.hidden_size, c.embed_size), ("embed", None), init
            )

    @property
    def shares(self) -> bool:
        """Whether a prefix can be read once for rows that share it: not where attention reads the
        full text, rotary angles depend on its length, or a layer has a mixer of its own.
        """
        c = self.config
        mixes = any(kind.mixer for kind in c.kinds)
        return c.causal and not _by_length(c) and not mixes

    def hidden(self, tokens, *, positions, segment_ids, cache=None, inputs=None, shared=NOT_SHARED):
        """Hidden states `[B, T, D]` of the embedding's size, the cache with these tokens, and of
        experts `{"routing": …, "experts": …}`.

        Args:
          inputs: `token_types` of models that have them; of experts, `experts` to take in place of
            the routers' choice.
          shared: the columns that rows share are read once; without a cache.
        """
        c = self.config
        inputs = inputs or {}
        known = {"token_types"} if c.token_types else set()
        known |= set() if c.experts is None else {EXPERTS}
        if unknown := sorted(inputs.keys() - known):
            raise ValueError(
                f"this model is conditioned on its tokens alone, but got inputs {unknown}"
            )
        chosen = inputs.get(EXPERTS)
        if chosen is not None:
            sparse = sum(c.kind(i).sparse for i in range(c.num_layers))
            wanted = (*tokens.shape, sparse, c.experts.per_token)
            if chosen.shape != wanted:
                raise ValueError(
                    f"inputs[{EXPERTS!r}] {list(chosen.shape)} but tokens {list(tokens.shape)} and "
                    f"{sparse} layers of experts, {c.experts.per_token} a token, need {list(wanted)}"
                )
        # Every device must have as many groups as the others: smaller ones, if need be.  Where
        # devices share the columns, those of a group are on one device no more.
        shared = shared.fitting(len(tokens), ways("batch")) if ways("sequence") == 1 else NOT_SHARED
        tokens = shared.deduplicate(or_zero(tokens, c.vocab_size, segment_ids))
        x = embed(c, self.embedding, tokens)
        x = _beside_table(x) if cache is None else x
        if c.token_types:
            types = or_zero(
                inputs.get("token_types", jnp.zeros_like(segment_ids)), c.token_types, segment_ids
            )
            x = x + look_up(self.type_embedding, shared.deduplicate(types)).astype(c.dtype)
        inputs_of_layers = self._layer_inputs(x, tokens)
        x = linear(x, self.project_in) if c.embed_size else x
        x, cache, aux = self.run(
            x,
            positions,
            segment_ids,
            cache,
            layer_inputs=inputs_of_layers,
            chosen=None if chosen is None else shared.deduplicate(chosen),
            shared=shared,
        )
        return shared.expand(linear(x, self.project_out) if c.embed_size else x), cache, aux

    def _layer_inputs(self, x: Array, tokens: Array) -> Array | None:
        """`[B, T, layers, P]`: of each token's table and of its embedding, half and half  (Gemma 4)."""
        c = self.config
        if not c.layer_input_size:
            return None
        size = c.layer_input_size
        shape = (*tokens.shape, c.num_layers, size)
        found = look_up(self.layer_input_embedding, tokens).astype(x.dtype).reshape(shape)
        found = found * jnp.asarray(size**0.5, x.dtype)
        context = linear(x, self.layer_input_projection) * jnp.asarray(c.hidden_size**-0.5, x.dtype)
        context = self.normalise(context.reshape(shape), *self.layer_input_norm)
        return (found + context) * jnp.asarray(2**-0.5, x.dtype)

    def unembed(self, hidden):
        """Logits `[..., V]` in at least float32."""
        c = self.config
        if not c.unembeds:
            raise ValueError(
                "this model has no output matrix (unembeds=False): its hidden states are for heads"
            )
        return logits(c, hidden, self.embedding, self.unembedding, self.unembedding_bias)

    def unstack(self, params):
        return unstacked(params, self.config)

    def init_cache(self, batch, length):
        if not self.config.causal:
            raise ValueError("an encoder sees whole texts and has no cache; it does not generate")
        return empty_cache(self.config, batch, length)


def _by_length(c: TransformerConfig) -> bool:
    """Whether rotary angles depend on how long a text is."""
    return any(kind.rope and kind.rope.scaling and kind.rope.scaling.by_length for kind in c.kinds)


def empty_cache(c: TransformerConfig, batch: int, length: int) -> Cache:
    zeros = jnp.zeros((batch, length), jnp.int32)

    def empty(kind):
        if kind.mixer is not None:
            return kind.mixer.empty(c, batch, length)
        if kind.borrows is not None:
            return ()
        heads = kind.heads or Heads(c.width, c.kv_heads)
        shape = batch, heads.kv_heads, length, heads.width
        return jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype)

    layers = tuple(empty(c.kind(i)) for i in range(c.num_layers))
    return Cache(written=zeros[:, 0], positions=zeros, segment_ids=zeros, layers=layers)


def ends(module: Weights, c: TransformerConfig) -> tuple[Any, Any, Any]:
    """Embedding, output matrix and its bias; None for what the config has not."""
    size = c.embed_size or c.hidden_size
    init = nn.initializers.normal(c.hidden_size**-0.5)
    embedding = module.weight("embedding", (c.vocab_size, size), ("vocab", "embed"), init)
    separate = c.unembeds and not c.tied
    unembedding = (
        module.weight("unembedding", (size, c.vocab_size), ("embed", "vocab"), init)
        if separate
        else None
    )
    return (
        embedding,
        unembedding,
        module.bias(c.unembeds and c.unembed_bias, "unembedding_bias", c.vocab_size, "vocab"),
    )


def embed(c: TransformerConfig, embedding, tokens) -> Array:
    """Embedded tokens; NaN for those that the vocabulary has not."""
    return look_up(embedding, tokens).astype(c.dtype) * jnp.asarray(c.embed_scale, c.dtype)


def _beside_table(x: Array) -> Array:
    """Embedded tokens `[B, T, D]`, each device with the columns that it has of the table: where
    their gradient is too, the table's is summed there, without those of other columns.
    """
    return x if x.shape[-1] % ways("embed") else constrain(x, "looked_up", "sequence", "embed")


def logits(c: TransformerConfig, hidden, embedding, unembedding, bias) -> Array:
    """`s (h W) + b` in at least float32, capped where the config says."""
    # In float32 (`wide`): small differences of logits matter, and half precision rounds them away.
    matrix = _divisible(embedding.T if c.tied else unembedding)
    y = linear(hidden, matrix, wide=True)[..., : c.vocab_size]
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32)) * c.logit_scale
    y = y if bias is None else y + rows(bias, y)
    return y if c.final_softcap is None else c.final_softcap * jnp.tanh(y / c.final_softcap)


def _divisible(matrix: Any) -> Any:
    """An output matrix `[D, V]` with as many columns of zeros as it takes for a mesh to split it by
    tokens; the state holds it as it is in the files, whole where the mesh does not divide V.
    """
    # An adapter's matrix is left as it is.
    more = 0 if hasattr(matrix, "matmul") else -matrix.shape[-1] % ways("vocab")
    if not more:
        return matrix
    return constrain(jnp.pad(matrix, ((0, 0), (0, more))), None, "vocab")


def _block(c, layer, x, kind, rotations, cached, attention_inputs, cross, lent, shared=NOT_SHARED):
    # What the layer has of its own travelled with its parameters.
    others = {"cross", "layer_input", "chosen"}
    params = {name: leaf for name, leaf in layer.items() if name not in others}
    cross = None if cross is None else {**cross, **layer["cross"]}
    extra = Extra(cross, lent, layer.get("layer_input"), layer.get("chosen"))
    return Block(c, shared, parent=None).apply(
        {"params": params}, x, kind, rotations, cached, attention_inputs, extra
    )


def cut(layers: dict[str, Any] | tuple, c: TransformerConfig) -> tuple[dict[str, Any], ...]:
    """The parameters of each layer by themselves."""
    if isinstance(layers, tuple):
        return layers
    out: list[dict[str, Any]] = []
    for first, number, stack in _stacks(layers, c):
        out += [_layer(c, stack, Run(first, first + i, 1, 1), 0, 0) for i in range(number)]
    return tuple(out)


def unstacked(params: dict[str, Any], c: TransformerConfig) -> dict[str, Any]:
    """Parameters for a loop of decoding steps: matrices in the dtype of the computation, and on CPU
    and GPU with the layers cut from the stack.
    """
    # Read again for every token: float32 masters would be cast each time.  The same numbers, since
    # `linear` and `look_up` cast them where they are used.
    params = jax.tree_util.tree_map_with_path(
        partial(_narrowed, c), params, is_leaf=lambda x: hasattr(x, "matmul")
    )
    # XLA on CPU and GPU copies each layer out of the stack at every step, so that a token reads and
    # writes its weights twice; on TPU a slice is read in place.
    if platform() != "tpu":
        return {**params, "layers": cut(params["layers"], c)}
    return params


def _narrowed(c: TransformerConfig, path: tuple, weight: Any) -> Any:
    """A matrix that activations are multiplied with, or a table of vectors, in `c.dtype`; all else
    as it is.
    """
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    # Vectors are used in float32, and so are the router and the table of relative positions; a
    # weight with a product of its own, such as an adapter, says itself how wide it is.
    if {"router", "relative"} & set(names) or hasattr(weight, "matmul"):
        return weight
    is_matrix = weight.ndim - ("layers" in names) >= 2
    is_wide = weight.dtype.itemsize > jnp.dtype(c.dtype).itemsize
    return weight.astype(c.dtype) if is_matrix and is_wide else weight


def _stacks(layers: dict[str, Any], c: TransformerConfig) -> list[tuple[int, int, dict[str, Any]]]:
    """`(first layer, number, parameters)`: one stack of all layers, or the two of `parted`."""
    of_all = next(name for name in layers if rank(c, name, c.num_layers) == c.num_layers)
    if not hasattr(layers[of_all], "bottom"):
        return [(0, c.num_layers, layers)]
    below = jax.tree.leaves(layers[of_all].bottom)[0].shape[0]

    def half(name, leaf):
        if hasattr(leaf, name):
            return getattr(leaf, name)
        return leaf[:below] if name == "bottom" else leaf[below:]

    bottom, top = (
        {key: half(name, leaf) for key, leaf in layers.items()} for name in ("bottom", "top")
    )
    return [(0, below, bottom), (below, c.num_layers - below, top)]


def _replicated_if_vectors(leaf: Any) -> Any:
    """Norms and biases `[layers, D]` on every device of the mesh that is set; all else as it is."""
    is_vectors = isinstance(leaf, jax.Array) and leaf.ndim == 2
    return constrain(leaf, None, None) if is_vectors else leaf


@documented
class Run(NamedTuple):
    """Layers of a stack that a scan takes: a pattern of kinds, so many times.

    Attributes:
      first: layer of the stack.
      start: layer of the run.
      length: of the pattern.
      times: it repeats.
    """

    first: int
    start: int
    length: int
    times: int


def _runs(c: TransformerConfig, first: int, number: int) -> list[Run]:
    out = []
    start = first
    for length, times in runs([c.kind(first + i) for i in range(number)]):
        out.append(Run(first, start, length, times))
        start += length * times
    return out


def _layer(
    c: TransformerConfig, stack: dict[str, Any], run: Run, repeat: Array | int, place: int
) -> dict[str, Any]:
    """The parameters of the layer at a place in a repeat of a run's pattern, of leaves stacked over
    the layers that have them.
    """
    absent = all_leaves(c) - leaves(c, c.kind(run.start + place))

    def cut(name, leaf):
        # The index counts the layers before this one that have the leaf.
        of_first, of_start, of_place, of_end = (
            rank(c, "router" if name == "chosen" else name, i)
            for i in (run.first, run.start, run.start + place, run.start + run.length)
        )
        i = of_place - of_first + repeat * (of_end - of_start)
        return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), leaf)

    return {name: cut(name, leaf) for name, leaf in stack.items() if name not in absent}


def _at(c: TransformerConfig, name: str, x: Any, i: int) -> Any:
    """What layer i has of its own, of arrays of all layers, or of those with experts."""
    place = rank(c, "router", i) if name == "chosen" else i
    # Of a layer that has none, any: it is not read.
    return jax.tree.map(lambda leaf: leaf[min(place, len(leaf) - 1)], x)


def _add(a: Routing | None, b: Routed | None) -> Routing | None:
    return a if b is None else jax.tree.map(jnp.add, a, b.routing)
