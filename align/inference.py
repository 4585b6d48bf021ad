"""The policy's forward pass a token at a time, on the weights that it trains, with keys and values kept.

`InferenceModel` computes what the training modules compute, without what only training needs, which is most
of the time of a step with few tokens. Whether the two agree is what align/audit.py looks at in every run.

Sequences being decoded lie in slots 0, 1, 2, ..., each with its own position; nothing is padded.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from align.attention import attend, attend_to_cache
from align.huggingface import named_parameters
from align.layers import rms_norm, rotation, turn
from align.matmul import linear, pack
from align.model import Policy

GROWTH = 32  # tokens by which the room for keys and values grows


@dataclass(frozen=True)
class Prefix:
    """A prompt that has been read: what sequences that continue it start from."""

    keys: list[Tensor]  # for each layer [groups, n, d], rotated
    values: list[Tensor]
    logits: Tensor | None  # [V] float32, of the token after it; on the last stage only


@dataclass(frozen=True)
class Layer:
    """This rank's weights of one layer."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # [queries of a group + 1, d], the last row for the key
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class InferenceModel:
    """A policy's shard as it is now, and the keys and values of sequences in `slots` places."""

    def __init__(self, policy: Policy, slots: int):
        """`policy` may be training's own, or one in another layout: its process groups are what counts.

        On a CPU matrices are copied as `matmul.pack` does, so an update of the weights needs a new object.
        """
        arch, groups = policy.arch, policy.pg_collection
        self.arch, self.config, self.stages = arch, policy.config, Stages(groups)
        self.tp: dist.ProcessGroup = groups.tp
        self.frequencies = policy.frequencies
        self.dtype, self.device = policy.config.params_dtype, policy.frequencies.device
        self.window = arch.window
        # With fewer key-value heads than ranks, several ranks share a group and split its queries.
        self.sharing = max(self.tp.size() // arch.kv_heads, 1)
        self.groups = max(arch.kv_heads // self.tp.size(), 1)
        self.queries = arch.heads // arch.kv_heads // self.sharing  # of each group, on this rank
        self.scale = arch.head_dim**-0.5
        weights = {name: parameter for _, parameter, name in named_parameters(policy)}
        numbers = sorted(layer.layer_number - 1 for layer in policy.decoder.layers)
        self.layers = [self.layer(weights, f"model.layers.{number}.") for number in numbers]
        self.embedding = weights.get(
            "model.embed_tokens.weight"
        )  # the first stage's, and tied the last one's
        head = weights.get("lm_head.weight", self.embedding)
        self.head = None if self.stages.after else pack(head)
        self.final_norm = weights.get("model.norm.weight")
        empty = (slots, self.groups, 0, arch.head_dim)
        self.keys, self.values = (
            [torch.zeros(empty, dtype=self.dtype, device=self.device) for _ in self.layers] for _ in "kv"
        )

    def layer(self, weights: dict[str, nn.Parameter], prefix: str) -> Layer:
        """The weights of the layer whose names begin with `prefix`."""
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qk_norm = None
        if self.arch.qk_norm:
            q, k = weights[f"{attention}q_norm.weight"], weights[f"{attention}k_norm.weight"]
            qk_norm = torch.stack([q] * self.queries + [k])
        return Layer(
            input_norm=weights[f"{prefix}input_layernorm.weight"],
            qkv=pack(weights[f"{attention}*_proj.weight"]),
            qkv_bias=weights.get(f"{attention}*_proj.bias"),
            qk_norm=qk_norm,
            out=pack(weights[f"{attention}o_proj.weight"]),
            mlp_norm=weights[f"{prefix}post_attention_layernorm.weight"],
            gate_up=pack(weights[f"{mlp}*_proj.weight"]),
            down=pack(weights[f"{mlp}down_proj.weight"]),
        )

    # ---- the two passes --------------------------------------------------------------------------

    def prefill(self, prompts: list[Tensor]) -> list[Prefix]:
        """Read prompts, [n] int64 each, end to end in one pass. Collective over tp and pp."""
        lengths = [len(prompt) for prompt in prompts]
        tokens = torch.cat(prompts)
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths])
        keys, values = [], []

        def attention(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys.append(k)
            values.append(v)
            parts = zip(q.flatten(1, 2).split(lengths), k.split(lengths), v.split(lengths), strict=True)
            return torch.cat([attend(*part, self.scale, self.window) for part in parts]).flatten(1)

        hidden = self.stages.receive(len(tokens), self) if self.stages.before else self.embed(tokens)
        hidden = self.run_layers(hidden, positions, attention)
        logits = [None] * len(prompts)
        if self.stages.after:
            self.stages.send(hidden)
        else:
            ends = torch.tensor(lengths, device=self.device).cumsum(0) - 1
            logits = self.logits(hidden[ends]).unbind(0)
        k, v = (zip(*(own_parts(x, lengths) for x in kept), strict=True) for kept in (keys, values))
        return [Prefix(*parts) for parts in zip(k, v, logits, strict=True)]

    def decode(self, tokens: Tensor, positions: Tensor) -> Tensor | None:
        """One more token for each of the slots 0 ... B - 1. Collective over tp and pp.

        Args:
            tokens: [B] int64, the newest token of each sequence.
            positions: [B] int64 on the host, where it stands in its sequence, from 0.

        Returns:
            [B, V] float32 logits of the tokens after them; None on stages before the last.
        """
        count = len(positions)
        self.reserve(int(positions.max()) + 1)
        places = torch.arange(self.capacity)
        seen = places <= positions[:, None]
        if self.window is not None:
            seen &= places > positions[:, None] - self.window
        mask = torch.zeros(count, 1, 1, self.capacity, dtype=self.dtype)
        mask = mask.masked_fill_(~seen[:, None, None], float("-inf")).to(self.device)
        rows, positions = torch.arange(count, device=self.device), positions.to(self.device)

        def attention(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[number][:count], self.values[number][:count]
            keys[rows, :, positions] = k
            values[rows, :, positions] = v
            return attend_to_cache(q, keys, values, mask, self.scale).flatten(1)

        hidden = self.stages.receive(count, self) if self.stages.before else self.embed(tokens)
        hidden = self.run_layers(hidden, positions, attention)
        if self.stages.after:
            return self.stages.send(hidden)
        return self.logits(hidden)

    def place(self, prefix: Prefix, slot: int) -> None:
        """Let a slot continue a prompt."""
        n = prefix.keys[0].shape[1]
        self.reserve(n)
        for kept, parts in ((self.keys, prefix.keys), (self.values, prefix.values)):
            for layer, part in zip(kept, parts, strict=True):
                layer[slot, :, :n] = part

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for layer in (*self.keys, *self.values):
            layer[target, :, :length] = layer[source, :, :length]

    @property
    def capacity(self) -> int:
        """Tokens that each slot has room for."""
        return self.keys[0].shape[2]

    def reserve(self, length: int) -> None:
        """Make room for sequences of `length` tokens.

        There is a little more, so that it grows seldom, and no more than that: a matrix product reads all of
        it, because it is slow on a part. What is new is 0: 0 times what happens to lie there may be NaN.
        """
        more = -(-length // GROWTH) * GROWTH - self.capacity
        if more <= 0:
            return
        for kept in (self.keys, self.values):
            for i, layer in enumerate(kept):
                kept[i] = nn.functional.pad(layer, (0, 0, 0, more))

    # ---- what both are made of -------------------------------------------------------------------

    def embed(self, tokens: Tensor) -> Tensor:
        """[n, H] of tokens [n]; each tensor parallel rank has some rows of the embedding."""
        if self.tp.size() == 1:
            return self.embedding[tokens]
        rows = len(self.embedding)
        index = tokens - self.tp.rank() * rows
        here = (index >= 0) & (index < rows)
        return self.sum(self.embedding[index.clamp(0, rows - 1)] * here[:, None])

    def run_layers(self, x: Tensor, positions: Tensor, attention) -> Tensor:  # noqa: ANN001
        """[n, H] through this stage; `attention(layer, q, k, v)` gives the heads' outputs [n, heads * d]."""
        cos, sin = (part[:, None] for part in rotation(positions, self.frequencies, self.dtype))
        eps = self.arch.norm_eps
        for number, layer in enumerate(self.layers):
            qkv = self.own_heads(linear(rms_norm(x, layer.input_norm, eps), layer.qkv, layer.qkv_bias))
            qk, v = qkv[:, :, :-1], qkv[:, :, -1]
            if layer.qk_norm is not None:
                qk = rms_norm(qk, layer.qk_norm, eps)
            qk = turn(qk, cos, sin, 1)
            out = attention(number, qk[:, :, :-1], qk[:, :, -1], v)
            x = x + self.sum(linear(out, layer.out))
            gate, up = linear(rms_norm(x, layer.mlp_norm, eps), layer.gate_up).chunk(2, -1)
            x = x + self.sum(linear(nn.functional.silu(gate).mul_(up), layer.down))
        return x

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
        z = linear(rms_norm(hidden, self.final_norm, self.arch.norm_eps), self.head)
        if self.tp.size() > 1:
            parts = [torch.empty_like(z) for _ in range(self.tp.size())]
            dist.all_gather(parts, z, group=self.tp)
            z = torch.cat(parts, -1)
        return z[:, : self.arch.vocab_size].float()

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the tensor parallel ranks, in place."""
        if self.tp.size() > 1:
            dist.all_reduce(x, group=self.tp)
        return x


def own_parts(x: Tensor, lengths: list[int]) -> list[Tensor]:
    """Keys or values [T, groups, d] of several prompts -> [groups, n, d] of each, in memory of its own.

    A view would keep all that was computed for the prompts of its pass for as long as one of them waits.
    """
    return [part.transpose(0, 1).clone(memory_format=torch.contiguous_format) for part in x.split(lengths)]


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
