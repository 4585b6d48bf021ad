"""Prefill and decode with a KV cache, on the training weights.

`InferenceModel` computes the forward pass of the training modules without their overhead, which is most of
the time of a step with few tokens. align/generation/audit.py checks in every run that the two agree.

Sequences are decoded in slots 0, 1, 2, ..., each with its own position; nothing is padded.

On GPUs a step with few tokens is bound by memory bandwidth and by launch times. There attention is
align/kernels/decode_attention.py, and nothing synchronises with the device: align/generation/slots.py
captures a step as a CUDA graph.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from align.kernels.matmul import linear, pack
from align.model import adapter_files
from align.model.attention import attend, attend_to_cache, flash, uses_flash
from align.model.gpt import Policy
from align.model.huggingface_names import named_parameters
from align.model.layers import apply_rotary, layer_norm, rms_norm, rotary_cos_sin, squared_relu, swiglu
from align.model.lora import AdaptedColumn

GROWTH = 32  # tokens by which the KV cache grows
GROWTH_GPU = 256  # each growth costs new CUDA graphs, and unused room is not read
WHOLE = 0.8  # share of a GPU's free memory that the cache may take at once

NO_GPU = "no GPU"
PRODUCTS = {"linear_qkv": "qkv", "linear_proj": "out", "linear_fc1": "gate_up", "linear_fc2": "down"}

# number of the layer; queries and key of each group [n, groups, queries + 1, d]; value [n, groups, d];
# cosines and sines [n, 1, 1, d/2] -> the heads' outputs [n, heads * d]
Attention = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PrefilledPrompt:
    """KV cache and next-token logits of a prompt, from which its responses start."""

    cache: Tensor  # [layers, 2, groups, n, d], rotated keys and values
    logits: Tensor | None  # [V] float32, of the next token; on the last stage only


@dataclass(frozen=True)
class LowRank:
    """This rank's adapter of a matrix product; its output is this rank's rows, or its part of a sum."""

    inner: Tensor
    outer: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.inner) * self.scale, self.outer)


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
    adapters: dict[str, LowRank]  # by name of the matrix above; none for most models


class InferenceModel:
    """A policy's shard with its present weights, and the KV cache of `slots` sequences."""

    def __init__(self, policy: Policy, slots: int, tp_graphs: bool = False):
        """`policy`: training's own, or a copy in another layout, by its process groups.

        `tp_graphs`: see `why_no_graphs`. On a CPU matrices are copied by `matmul.pack`, so an update of the
        weights needs a new object.
        """
        arch, groups = policy.arch, policy.pg_collection
        self.arch, self.config, self.stages = arch, policy.config, Stages(groups)
        self.known_ids = policy.known_ids  # V of the logits
        self.tp: dist.ProcessGroup = groups.tp
        self.frequencies, self.rotary_scale = policy.frequencies, policy.rotary_scale
        self.dtype, self.device = policy.config.params_dtype, policy.frequencies.device
        self.window = arch.window
        self.graphed = why_no_graphs(policy, tp_graphs) is None
        self.addresses = addresses(policy)
        self.computed: list[tuple[Tensor, Callable[[], Tensor]]] = []  # tensors made of weights
        # With fewer key-value heads than ranks, several ranks share a group and split its queries.
        self.sharing = max(self.tp.size() // arch.kv_heads, 1)
        self.groups = max(arch.kv_heads // self.tp.size(), 1)
        self.queries = arch.heads // arch.kv_heads // self.sharing  # of each group, on this rank
        self.scale = arch.head_dim**-0.5
        self.norm: Callable[..., Tensor] = rms_norm if arch.norm == "rms" else layer_norm
        self.activation = {"swiglu": swiglu, "relu2": squared_relu}[arch.activation]
        weights: dict[str, Tensor] = {name: parameter for _, parameter, name in named_parameters(policy)}
        numbers = sorted(layer.layer_number - 1 for layer in policy.decoder.layers)
        adapters = self.low_rank(policy)
        self.layers = [
            self.layer(weights, f"model.layers.{number}.", adapters.get(number, {})) for number in numbers
        ]
        # Tensors of the stages that have them: the first, with tied embeddings also the last; the last.
        self.embedding: Any = weights.get("model.embed_tokens.weight")
        head: Any = weights.get("lm_head.weight", self.embedding)
        self.head: Any = None if self.stages.after else pack(head)
        self.final_norm: Any = None if self.stages.after else self.norm_weights(weights, "model.norm")
        # blocks of layers: keys and values, [layers of a block, 2, slots, groups, capacity, d]
        empty = (1, 2, slots, self.groups, 0, arch.head_dim)
        self.cache = [torch.zeros(empty, dtype=self.dtype, device=self.device) for _ in self.layers]
        self.rows = torch.arange(slots, device=self.device)

    @property
    def on_gpu(self) -> bool:
        """True if attention is align/kernels/decode_attention.py."""
        return self.device.type == "cuda"

    def low_rank(self, policy: Policy) -> dict[int, dict[str, LowRank]]:
        """The adapters of each layer, by its number."""
        layers: dict[int, dict[str, LowRank]] = {}
        for number, module in adapter_files.adapted_modules(policy):
            outer = self.compute(module.spread) if isinstance(module, AdaptedColumn) else module.lora_B
            name = PRODUCTS[module.place.module]
            layers.setdefault(number, {})[name] = LowRank(module.lora_A, outer, module.place.adapters.scale)
        return layers

    def layer(self, weights: dict[str, Tensor], prefix: str, adapters: dict[str, LowRank]) -> Layer:
        """The weights of a layer, by the `prefix` of their names."""
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qk_norm = None
        if self.arch.qk_norm:
            q, k = weights[f"{attention}q_norm.weight"], weights[f"{attention}k_norm.weight"]
            rows = [q] * self.queries + [k]
            qk_norm = self.compute(lambda: torch.stack(rows))
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
            adapters=adapters,
        )

    def norm_weights(self, weights: dict[str, Tensor], name: str) -> tuple[Tensor, ...]:
        """A norm's factor, and its bias if it has one: the arguments of `self.norm`."""
        weight = weights[f"{name}.weight"]
        if self.arch.norm == "rms":
            return (weight,)
        factor = self.compute(lambda: weight + 1) if self.arch.norm == "layer_1p" else weight
        return factor, weights[f"{name}.bias"]

    def compute(self, function: Callable[[], Tensor]) -> Tensor:
        """A tensor made of weights, which `follow` updates."""
        tensor = function()
        self.computed.append((tensor, function))
        return tensor

    def follow(self, policy: Policy) -> bool:
        """Update in place what is made of the weights. False if these have moved: graphs read old ones."""
        if self.addresses != addresses(policy):
            return False
        for tensor, function in self.computed:
            tensor.copy_(function())
        return True

    def prefill(self, prompts: list[Tensor]) -> list[PrefilledPrompt]:
        """Prefill prompts, [n] int64 each on the host, end to end in one pass. Collective over tp and pp."""
        lengths = [len(prompt) for prompt in prompts]
        tokens = torch.cat(prompts).to(self.device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self.device)
        ends = torch.tensor([0, *lengths]).cumsum(0).to(self.device)
        keys_and_values = []

        def attention(number: int, qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            qk = apply_rotary(qk, cos, sin, 1)
            q, k = qk[:, :, :-1].flatten(1, 2), qk[:, :, -1]
            keys_and_values.append(torch.stack([k, v]))
            if uses_flash(q.dtype, q.shape[-1], q.is_cuda):
                bounds = (ends.int(), ends.int(), max(lengths), max(lengths))
                return flash(q, k, v, *bounds, self.scale, self.window).flatten(1)
            parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
            return torch.cat([attend(*part, self.scale, self.window) for part in parts]).flatten(1)

        hidden = self.stages.receive(len(tokens), self) if self.stages.before else self.embed(tokens)
        hidden = self.run_layers(hidden, positions, attention)
        logits: Sequence[Tensor | None] = [None] * len(prompts)
        if self.stages.after:
            self.stages.send(hidden)
        else:
            logits = self.logits(hidden[ends[1:] - 1]).unbind(0)
        caches = split_cache(torch.stack(keys_and_values), lengths)
        return [PrefilledPrompt(*parts) for parts in zip(caches, logits, strict=True)]

    def decode(self, tokens: Tensor, positions: Tensor) -> Tensor | None:
        """Compute the next-token logits of the slots 0 ... B - 1. Collective over tp and pp.

        The KV cache must have room for their tokens, see `reserve`.

        Args:
            tokens: [B] int64, the newest token of each sequence.
            positions: [B] int64, its position in the sequence, from 0.

        Returns:
            [B, V] float32; None on stages before the last.
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
            block, layer = divmod(number, len(self.cache[0]))
            cache = self.cache[block][layer, :, :count]
            if self.on_gpu:
                from align.kernels import decode_attention  # Triton, which CPU machines lack

                q = decode_attention.append(qk, v, cos, sin, cache, positions)
                return decode_attention.attend(q, cache, positions, self.scale, self.window).flatten(1)
            qk = apply_rotary(qk, cos, sin, 1)
            keys, values = cache
            keys[self.rows[:count], :, positions] = qk[:, :, -1]
            values[self.rows[:count], :, positions] = v
            assert mask is not None
            return attend_to_cache(qk[:, :, :-1], keys, values, mask, self.scale).flatten(1)

        hidden = self.stages.receive(count, self) if self.stages.before else self.embed(tokens)
        hidden = self.run_layers(hidden, positions, attention)
        if self.stages.after:
            self.stages.send(hidden)
            return None
        return self.logits(hidden)

    def place(self, prefilled: PrefilledPrompt, slot: int) -> None:
        """Copy a prompt's keys and values to a slot."""
        n = prefilled.cache.shape[3]
        self.reserve(n)
        for block, part in zip(self.cache, prefilled.cache.split(len(self.cache[0])), strict=True):
            block[:, :, slot, :, :n] = part

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the keys and values of the first `length` tokens from one slot to another."""
        for block in self.cache:
            block[:, :, target, :, :length] = block[:, :, source, :, :length]

    @property
    def capacity(self) -> int:
        """Tokens of the KV cache per slot."""
        return self.cache[0].shape[4]

    def reserve(self, length: int) -> None:
        """Grow the KV cache to sequences of `length` tokens, in new memory.

        A multiple of GROWTH, so that it grows seldom. On a CPU the products of attention read all of it,
        since they are slow on a slice. New entries are 0: uninitialised ones may be NaN, also times 0.
        """
        growth = GROWTH_GPU if self.on_gpu else GROWTH
        more = -(-length // growth) * growth - self.capacity
        if more <= 0:
            return
        for i, block in enumerate(self.cache):
            self.cache[i] = nn.functional.pad(block, (0, 0, 0, more))

    def reserve_whole(self, length: int) -> None:
        """Allocate a GPU's KV cache for sequences of `length` tokens, as one block, if memory allows.

        Then it never grows, and a prompt is copied to its slot by one kernel. Collective over tp.
        """
        capacity = -(-length // GROWTH_GPU) * GROWTH_GPU
        shape = (len(self.layers), *self.cache[0].shape[1:4], capacity, self.arch.head_dim)
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free = torch.tensor(torch.cuda.mem_get_info()[0] + cached, device=self.device)
        if self.tp.size() > 1:  # ranks of a copy capture alike
            dist.all_reduce(free, dist.ReduceOp.MIN, group=self.tp)
        if math.prod(shape) * self.dtype.itemsize <= WHOLE * free.item():
            self.cache = [torch.zeros(shape, dtype=self.dtype, device=self.device)]

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens [n] as [n, H]; each tensor parallel rank has some rows of the embedding."""
        if self.tp.size() == 1:
            return self.embedding[tokens]
        rows = len(self.embedding)
        index = tokens - self.tp.rank() * rows
        owned = (index >= 0) & (index < rows)
        return self.sum(self.embedding[index.clamp(0, rows - 1)] * owned[:, None])

    def run_layers(self, x: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Apply this stage's layers to x [n, H], perhaps in place."""
        angles = rotary_cos_sin(positions, self.frequencies, self.dtype, self.rotary_scale)
        cos, sin = (part[:, None] for part in angles)
        norm, eps = self.norm, self.arch.norm_eps
        for number, layer in enumerate(self.layers):
            inner = norm(x, *layer.input_norm, eps)
            qkv = self.own_heads(adapted(linear(inner, layer.qkv, layer.qkv_bias), inner, layer, "qkv"))
            qk, v = qkv[:, :, :-1], qkv[:, :, -1]
            if layer.qk_norm is not None:
                qk = rms_norm(qk, layer.qk_norm, eps)
            x = self.add_linear(x, attention(number, qk, v, cos, sin), layer, "out")
            inner = norm(x, *layer.mlp_norm, eps)
            inner = adapted(linear(inner, layer.gate_up, layer.gate_up_bias), inner, layer, "gate_up")
            x = self.add_linear(x, self.activation(inner), layer, "down")
        return x

    def add_linear(self, x: Tensor, y: Tensor, layer: Layer, name: str) -> Tensor:
        """x + y weight^T + bias, for "out" or "down", whose columns are split over tensor parallel ranks."""
        weight, bias = getattr(layer, name), getattr(layer, f"{name}_bias")
        if bias is not None:
            x = x + bias
        if x.is_cuda and self.tp.size() == 1:
            return adapted(x.addmm_(y, weight.t()), y, layer, name)  # one kernel, and one rounding
        return x + self.sum(adapted(linear(y, weight), y, layer, name))

    def own_heads(self, qkv: Tensor) -> Tensor:
        """Split a product [n, rows] by this rank's heads, [n, groups, queries + 2, d], key and value last."""
        n, d = len(qkv), self.arch.head_dim
        if self.sharing == 1:
            return qkv.view(n, self.groups, self.queries + 2, d)
        # Ranks that share a group hold equal pieces of its rows, cut across queries, key and value.
        parts = [torch.empty_like(qkv) for _ in range(self.tp.size())]
        dist.all_gather(parts, qkv, group=self.tp)
        group, part = divmod(self.tp.rank(), self.sharing)
        whole = torch.cat(parts, -1).view(n, self.arch.kv_heads, -1, d)[:, group : group + 1]
        queries = whole[:, :, part * self.queries : (part + 1) * self.queries]
        return torch.cat([queries, whole[:, :, -2:]], 2)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] float32 of last hidden states [n, H], equal on every tensor parallel rank."""
        z = linear(self.norm(hidden, *self.final_norm, self.arch.norm_eps), self.head)
        if self.tp.size() > 1:
            parts = [torch.empty_like(z) for _ in range(self.tp.size())]
            dist.all_gather(parts, z, group=self.tp)
            z = torch.cat(parts, -1)
        return z[:, : self.known_ids].float()

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the tensor parallel ranks, in place."""
        if self.tp.size() > 1:
            dist.all_reduce(x, group=self.tp)
        return x


def adapted(output: Tensor, x: Tensor, layer: Layer, name: str) -> Tensor:
    """The output of a matrix product of x, with its adapter's if it has one."""
    adapter = layer.adapters.get(name)
    return output if adapter is None else output + adapter(x)


def split_cache(x: Tensor, lengths: list[int]) -> list[Tensor]:
    """Split keys and values [layers, 2, T, groups, d] into [layers, 2, groups, n, d] of each prompt.

    As copies: a view would keep the memory of all prompts of the pass.
    """
    parts = x.transpose(2, 3).split(lengths, 3)
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def why_no_graphs(policy: Policy, tp_graphs: bool) -> str | None:
    """Reason why decode steps are not captured as CUDA graphs; None if they are.

    `tp_graphs`: capture the collectives of tensor parallel ranks as well (--rollout-tp-graphs).
    """
    tp, pp = policy.pg_collection.tp.size(), policy.pg_collection.pp.size()
    if not policy.frequencies.is_cuda:
        return NO_GPU
    if torch.are_deterministic_algorithms_enabled():
        return "--deterministic"  # its kernels have not been tried in one
    if pp > 1:
        return f"pp {pp}"
    return f"tp {tp} without --rollout-tp-graphs" if tp > 1 and not tp_graphs else None


def addresses(policy: Policy) -> list[int]:
    """Addresses of the weights, which CUDA graphs read."""
    return [parameter.data_ptr() for parameter in policy.parameters()]


class Stages:
    """The pipeline stages of one copy of the model, and their communication."""

    def __init__(self, groups: ProcessGroupCollection):
        self.group: dist.ProcessGroup = groups.pp
        self.before, self.after = self.group.rank() > 0, self.group.rank() < self.group.size() - 1

    def receive(self, count: int, model: InferenceModel) -> Tensor:
        """Receive hidden states [count, H] from the previous stage."""
        hidden = torch.empty(count, model.arch.hidden_size, dtype=model.dtype, device=model.device)
        dist.recv(hidden, dist.get_global_rank(self.group, self.group.rank() - 1), group=self.group)
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Send hidden states to the next stage."""
        target = dist.get_global_rank(self.group, self.group.rank() + 1)
        dist.send(hidden.contiguous(), target, group=self.group)

    def from_last(self, tensor: Tensor) -> Tensor:
        """Broadcast the last stage's tensor to every stage, in place."""
        if self.group.size() > 1:
            dist.broadcast(tensor, dist.get_global_rank(self.group, self.group.size() - 1), group=self.group)
        return tensor
