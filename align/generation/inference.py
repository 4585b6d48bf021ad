"""The policy's forward pass a token at a time, on the weights that it trains, with keys and values kept.

`InferenceModel` computes what the training modules compute, without what only training needs, which is most
of the time of a step with few tokens. Whether the two agree is what align/generation/audit.py looks at in
every run.

Sequences being decoded lie in slots 0, 1, 2, ..., each with its own position; nothing is padded.

On GPUs a step with few tokens is bound by memory, and by the time between kernels. There, attention is that
of align/kernels/decode_attention.py, and nothing waits for the device: align/generation/slots.py keeps a step
as a CUDA graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from align.kernels.matmul import linear, pack
from align.model.attention import attend, attend_to_cache, flash, uses_flash
from align.model.gpt import Policy
from align.model.huggingface import named_parameters
from align.model.layers import layer_norm, rms_norm, rotation, squared_relu, swiglu, turn

GROWTH = 32  # tokens by which the room for keys and values grows
GROWTH_GPU = 256  # there each time costs new CUDA graphs, and none of the room is read that is not used

# number of the layer; queries and key of each group [n, groups, queries + 1, d]; value [n, groups, d];
# cosines and sines [n, 1, 1, d/2] -> the heads' outputs [n, heads * d]
Attention = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Prefix:
    """A prompt that has been read: what sequences that continue it start from."""

    cache: Tensor  # [layers, 2, groups, n, d], rotated keys and values
    logits: Tensor | None  # [V] float32, of the token after it; on the last stage only


@dataclass(frozen=True)
class Layer:
    """This rank's weights of one layer."""

    input_norm: tuple[Tensor, ...]  # see `norm_weights`
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # [queries of a group + 1, d], the last row for the key
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: tuple[Tensor, ...]
    gate_up: Tensor  # without a gate: up
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class InferenceModel:
    """A policy's shard as it is now, and the keys and values of sequences in `slots` places."""

    def __init__(self, policy: Policy, slots: int):
        """`policy` may be training's own, or one in another layout: its process groups are what counts.

        On a CPU matrices are copied as `matmul.pack` does, so an update of the weights needs a new object.
        """
        arch, groups = policy.arch, policy.pg_collection
        self.arch, self.config, self.stages = arch, policy.config, Stages(groups)
        self.known_ids = policy.known_ids  # V of the logits
        self.tp: dist.ProcessGroup = groups.tp
        self.frequencies, self.rotary_scale = policy.frequencies, policy.rotary_scale
        self.dtype, self.device = policy.config.params_dtype, policy.frequencies.device
        self.window = arch.window
        self.graphed = takes_graphs(policy)
        # With fewer key-value heads than ranks, several ranks share a group and split its queries.
        self.sharing = max(self.tp.size() // arch.kv_heads, 1)
        self.groups = max(arch.kv_heads // self.tp.size(), 1)
        self.queries = arch.heads // arch.kv_heads // self.sharing  # of each group, on this rank
        self.scale = arch.head_dim**-0.5
        self.norm = rms_norm if arch.norm == "rms" else layer_norm
        self.activation = {"swiglu": swiglu, "relu2": squared_relu}[arch.activation]
        weights = {name: parameter for _, parameter, name in named_parameters(policy)}
        numbers = sorted(layer.layer_number - 1 for layer in policy.decoder.layers)
        self.layers = [self.layer(weights, f"model.layers.{number}.") for number in numbers]
        self.embedding = weights.get(
            "model.embed_tokens.weight"
        )  # the first stage's, and tied the last one's
        head = weights.get("lm_head.weight", self.embedding)
        self.head = None if self.stages.after else pack(head)
        self.final_norm = None if self.stages.after else self.norm_weights(weights, "model.norm")
        # of each layer the keys and values, [2, slots, groups, capacity, d]
        empty = (2, slots, self.groups, 0, arch.head_dim)
        self.cache = [torch.zeros(empty, dtype=self.dtype, device=self.device) for _ in self.layers]
        self.rows = torch.arange(slots, device=self.device)

    @property
    def on_gpu(self) -> bool:
        """True if the kernels are those of align/kernels/decode_attention.py."""
        return self.device.type == "cuda"

    def layer(self, weights: dict[str, nn.Parameter], prefix: str) -> Layer:
        """The weights of the layer whose names begin with `prefix`."""
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qk_norm = None
        if self.arch.qk_norm:
            q, k = weights[f"{attention}q_norm.weight"], weights[f"{attention}k_norm.weight"]
            qk_norm = torch.stack([q] * self.queries + [k])
        return Layer(
            input_norm=self.norm_weights(weights, f"{prefix}input_layernorm"),
            qkv=pack(weights[f"{attention}*_proj.weight"]),
            qkv_bias=weights.get(f"{attention}*_proj.bias"),
            qk_norm=qk_norm,
            out=pack(weights[f"{attention}o_proj.weight"]),
            out_bias=weights.get(f"{attention}o_proj.bias"),
            mlp_norm=self.norm_weights(weights, f"{prefix}post_attention_layernorm"),
            gate_up=pack(weights[f"{mlp}*_proj.weight"]),
            gate_up_bias=weights.get(f"{mlp}*_proj.bias"),
            down=pack(weights[f"{mlp}down_proj.weight"]),
            down_bias=weights.get(f"{mlp}down_proj.bias"),
        )

    def norm_weights(self, weights: dict[str, nn.Parameter], name: str) -> tuple[Tensor, ...]:
        """A norm's factor, and its bias if it has one: what `self.norm` takes."""
        weight = weights[f"{name}.weight"]
        if self.arch.norm == "rms":
            return (weight,)
        return weight + 1 if self.arch.norm == "layer_1p" else weight, weights[f"{name}.bias"]

    # ---- the two passes --------------------------------------------------------------------------

    def prefill(self, prompts: list[Tensor]) -> list[Prefix]:
        """Read prompts, [n] int64 each on the host, end to end in one pass. Collective over tp and pp."""
        lengths = [len(prompt) for prompt in prompts]
        tokens = torch.cat(prompts).to(self.device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self.device)
        ends = torch.tensor([0, *lengths]).cumsum(0).to(self.device)
        kept = []

        def attention(number: int, qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            qk = turn(qk, cos, sin, 1)
            q, k = qk[:, :, :-1].flatten(1, 2), qk[:, :, -1]
            kept.append(torch.stack([k, v]))
            if uses_flash(q.dtype, q.shape[-1], q.is_cuda):
                bounds = (ends.int(), ends.int(), max(lengths), max(lengths))
                return flash(q, k, v, *bounds, self.scale, self.window).flatten(1)
            parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
            return torch.cat([attend(*part, self.scale, self.window) for part in parts]).flatten(1)

        hidden = self.stages.receive(len(tokens), self) if self.stages.before else self.embed(tokens)
        hidden = self.run_layers(hidden, positions, attention)
        logits = [None] * len(prompts)
        if self.stages.after:
            self.stages.send(hidden)
        else:
            logits = self.logits(hidden[ends[1:] - 1]).unbind(0)
        caches = own_parts(torch.stack(kept), lengths)
        return [Prefix(*parts) for parts in zip(caches, logits, strict=True)]

    def decode(self, tokens: Tensor, positions: Tensor) -> Tensor | None:
        """One more token for each of the slots 0 ... B - 1. Collective over tp and pp.

        There must be room for their keys and values, see `reserve`.

        Args:
            tokens: [B] int64, the newest token of each sequence.
            positions: [B] int64, where it stands in its sequence, from 0.

        Returns:
            [B, V] float32 logits of the tokens after them; None on stages before the last.
        """
        count, mask = len(tokens), None
        if not self.on_gpu:
            places = torch.arange(self.capacity)
            seen = places <= positions[:, None]
            if self.window is not None:
                seen &= places > positions[:, None] - self.window
            mask = torch.zeros(count, 1, 1, self.capacity, dtype=self.dtype)
            mask = mask.masked_fill_(~seen[:, None, None], float("-inf"))

        def attention(number: int, qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            cache = self.cache[number][:, :count]
            if self.on_gpu:
                from align.kernels import decode_attention  # Triton, which CPU machines lack

                q = decode_attention.append(qk, v, cos, sin, cache, positions)
                return decode_attention.attend(q, cache, positions, self.scale, self.window).flatten(1)
            qk = turn(qk, cos, sin, 1)
            keys, values = cache
            keys[self.rows[:count], :, positions] = qk[:, :, -1]
            values[self.rows[:count], :, positions] = v
            return attend_to_cache(qk[:, :, :-1], keys, values, mask, self.scale).flatten(1)

        hidden = self.stages.receive(count, self) if self.stages.before else self.embed(tokens)
        hidden = self.run_layers(hidden, positions, attention)
        if self.stages.after:
            return self.stages.send(hidden)
        return self.logits(hidden)

    def place(self, prefix: Prefix, slot: int) -> None:
        """Let a slot continue a prompt."""
        n = prefix.cache.shape[3]
        self.reserve(n)
        for layer, part in zip(self.cache, prefix.cache, strict=True):
            layer[:, slot, :, :n] = part

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for layer in self.cache:
            layer[:, target, :, :length] = layer[:, source, :, :length]

    @property
    def capacity(self) -> int:
        """Tokens that each slot has room for."""
        return self.cache[0].shape[3]

    def reserve(self, length: int) -> None:
        """Make room for sequences of `length` tokens; keys and values move for it.

        There is a little more, so that it grows seldom. On a CPU it is no more than that: a matrix product
        reads all of it, because it is slow on a part. What is new is 0: 0 times what lies there may be NaN.
        """
        growth = GROWTH_GPU if self.on_gpu else GROWTH
        more = -(-length // growth) * growth - self.capacity
        if more <= 0:
            return
        for i, layer in enumerate(self.cache):
            self.cache[i] = nn.functional.pad(layer, (0, 0, 0, more))

    # ---- what both are made of -------------------------------------------------------------------

    def embed(self, tokens: Tensor) -> Tensor:
        """[n, H] of tokens [n]; each tensor parallel rank has some rows of the embedding."""
        if self.tp.size() == 1:
            return self.embedding[tokens]
        rows = len(self.embedding)
        index = tokens - self.tp.rank() * rows
        here = (index >= 0) & (index < rows)
        return self.sum(self.embedding[index.clamp(0, rows - 1)] * here[:, None])

    def run_layers(self, x: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """[n, H] through this stage; x's memory may be used."""
        angles = rotation(positions, self.frequencies, self.dtype, self.rotary_scale)
        cos, sin = (part[:, None] for part in angles)
        norm, eps = self.norm, self.arch.norm_eps
        for number, layer in enumerate(self.layers):
            qkv = self.own_heads(linear(norm(x, *layer.input_norm, eps), layer.qkv, layer.qkv_bias))
            qk, v = qkv[:, :, :-1], qkv[:, :, -1]
            if layer.qk_norm is not None:
                qk = rms_norm(qk, layer.qk_norm, eps)
            x = self.add_linear(x, attention(number, qk, v, cos, sin), layer.out, layer.out_bias)
            inner = linear(norm(x, *layer.mlp_norm, eps), layer.gate_up, layer.gate_up_bias)
            x = self.add_linear(x, self.activation(inner), layer.down, layer.down_bias)
        return x

    def add_linear(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x + y weight^T + bias, of a weight whose columns are split over the tensor parallel ranks."""
        if bias is not None:
            x = x + bias
        if x.is_cuda and self.tp.size() == 1:
            return x.addmm_(y, weight.t())  # one kernel, and one rounding
        return x + self.sum(linear(y, weight))

    def own_heads(self, qkv: Tensor) -> Tensor:
        """[n, rows] of the product -> [n, groups, queries + 2, d], this rank's heads, key and value last."""
        n, d = len(qkv), self.arch.head_dim
        if self.sharing == 1:
            return qkv.view(n, self.groups, self.queries + 2, d)
        # Ranks that share a group hold equal pieces of its rows, wherever queries, key and value lie in them.
        parts = [torch.empty_like(qkv) for _ in range(self.tp.size())]
        dist.all_gather(parts, qkv, group=self.tp)
        group, part = divmod(self.tp.rank(), self.sharing)
        whole = torch.cat(parts, -1).view(n, self.arch.kv_heads, -1, d)[:, group : group + 1]
        mine = whole[:, :, part * self.queries : (part + 1) * self.queries]
        return torch.cat([mine, whole[:, :, -2:]], 2)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V] float32 of last hidden states [n, H], the same on every tensor parallel rank."""
        z = linear(self.norm(hidden, *self.final_norm, self.arch.norm_eps), self.head)
        if self.tp.size() > 1:
            parts = [torch.empty_like(z) for _ in range(self.tp.size())]
            dist.all_gather(parts, z, group=self.tp)
            z = torch.cat(parts, -1)
        return z[:, : self.known_ids].float()

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the tensor parallel ranks, in place."""
        if self.tp.size() > 1:
            dist.all_reduce(x, group=self.tp)
        return x


def own_parts(x: Tensor, lengths: list[int]) -> list[Tensor]:
    """Keys and values [layers, 2, T, groups, d] of several prompts -> [layers, 2, groups, n, d] of each.

    In memory of its own: a view would keep all that was computed for the prompts of its pass for as long as
    one of them waits.
    """
    parts = x.transpose(2, 3).split(lengths, 3)
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def takes_graphs(policy: Policy) -> bool:
    """Can a decode step be a CUDA graph? Not where ranks exchange what is in it, nor with --deterministic,
    whose kernels have not been tried in one."""
    groups = policy.pg_collection
    alone = groups.tp.size() == groups.pp.size() == 1
    return policy.frequencies.is_cuda and alone and not torch.are_deterministic_algorithms_enabled()


class Stages:
    """The pipeline stages of one copy of the model, and what they tell each other."""

    def __init__(self, groups: ProcessGroupCollection):
        self.group: dist.ProcessGroup = groups.pp
        self.before, self.after = self.group.rank() > 0, self.group.rank() < self.group.size() - 1

    def receive(self, count: int, model: InferenceModel) -> Tensor:
        """Hidden states [count, H] from the stage before."""
        hidden = torch.empty(count, model.arch.hidden_size, dtype=model.dtype, device=model.device)
        dist.recv(hidden, dist.get_global_rank(self.group, self.group.rank() - 1), group=self.group)
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Hidden states to the stage after."""
        target = dist.get_global_rank(self.group, self.group.rank() + 1)
        dist.send(hidden.contiguous(), target, group=self.group)

    def from_last(self, tensor: Tensor) -> Tensor:
        """The last stage's tensor on every stage, in place."""
        if self.group.size() > 1:
            dist.broadcast(tensor, dist.get_global_rank(self.group, self.group.size() - 1), group=self.group)
        return tensor
