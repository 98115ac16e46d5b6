"""Decoder-only pre-norm transformer with explicit multi-head or grouped-query attention.

Shapes: B batch, T tokens, E d_model, H query heads, G key-value heads, D d_head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from foreshock.models.attention import DotProduct
from foreshock.models.backend import BACKENDS, resolve_backend
from foreshock.models.batch import inputs_and_targets
from foreshock.models.dropout import dropout_at, dropped
from foreshock.models.mlp import KINDS, MLP
from foreshock.models.moe import MoE, MoEConfig, Routing, auxiliary_loss
from foreshock.models.numerics import HEALTHY, AttentionNumerics, LayerNumerics, at_least_fp32
from foreshock.models.precision import as_autocast, in_own_precision, outside_autocast
from foreshock.models.tiles import Tiles, pinned_tiles

CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "positions": ("learned", "rope"),
    "mlp": KINDS,
    "backend": BACKENDS,
}
MOST = {"n_layers": 1024} | dict.fromkeys(("d_model", "d_ff", "context_length", "vocab_size"), 2**20)
"""The largest sizes: a model that no machine holds must be refused before it is built, on the meta device too."""

PARAMETER_GROUPS = ("embedding", "attention", "mlp", "router", "norm")
"""Parts of the model whose learning rate a fault may change by itself; experts belong to ``mlp``."""

QUERY = "attention.q.weight"
RESIDUAL_OUTPUTS = ("attention.o.weight", "mlp.output.weight", "mlp.shared.output.weight")


def parameter_group(name: str) -> str:
    """The member of ``PARAMETER_GROUPS`` that a named parameter belongs to (``head`` is an embedding)."""
    for group, part in (("router", ".mlp.router."), ("attention", ".attention."), ("mlp", ".mlp."), ("norm", "norm.")):
        if part in name:
            return group
    return "embedding"


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and variant of a model. Every field is a key of ``conf/model/*.yaml``.

    n_kv_heads: key-value heads, each read by n_heads / n_kv_heads neighbouring query heads (arXiv:2305.13245), or None
    for n_heads; window: how many keys a query sees, its own the last, or None for all before it;
    vocab_size: tokens, or None to take the data's; d_ff: hidden width of the MLP, or of each expert;
    moe: router and experts in place of every MLP, or None for a dense model;
    rope_base: base of the rotary frequencies, used when positions is ``rope``;
    init_std: of every matrix; residual outputs are scaled by 1/sqrt(2 n_layers) (GPT-2);
    query_init_std: of W_Q, or None for init_std; 0 gives every key the same weight at the start;
    backend: see ``models.backend``; tiles: of the Triton kernels, or None for those pinned to the head dim;
    deterministic: False lets those kernels add dQ up with atomics, which is faster and never twice the same;
    dropout: the share of elements that training drops (``models.dropout``), 0 for none.
    """

    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    context_length: int
    n_kv_heads: int | None = None
    window: int | None = None
    vocab_size: int | None = None
    norm: str = "layernorm"
    positions: str = "learned"
    rope_base: float = 10000.0
    mlp: str = "gelu"
    tie_embeddings: bool = True
    qk_norm: bool = False
    init_std: float = 0.02
    query_init_std: float | None = None
    backend: str = "reference"
    tiles: Tiles | None = None
    deterministic: bool = True
    moe: MoEConfig | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for field in ("d_model", "n_layers", "n_heads", "d_ff", "context_length"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)} is not allowed: at least 1")
        for field, default in (("n_kv_heads", "for n_heads"), ("window", "for every earlier key")):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)} is not allowed: at least 1, or null {default}")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise ValueError(f"model.vocab_size={self.vocab_size} is not allowed: at least 2, or null for the data's")
        if self.query_init_std is not None and not 0 <= self.query_init_std < math.inf:
            raise ValueError(
                f"model.query_init_std={self.query_init_std} is not allowed: from 0, or null for model.init_std"
            )
        for field, most in MOST.items():
            if (getattr(self, field) or 0) > most:
                raise ValueError(f"model.{field}={getattr(self, field)} is not allowed: at most {most}")
        if not 0 < self.init_std < math.inf:
            raise ValueError(f"model.init_std={self.init_std} is not allowed: above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} is not allowed: 0 to below 1")
        if not 1 < self.rope_base < math.inf:
            raise ValueError(f"model.rope_base={self.rope_base} is not allowed: above 1")
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"model.{field}={getattr(self, field)!r} is not allowed: one of {', '.join(allowed)}")
        if self.d_model % self.n_heads:
            raise ValueError(f"model.d_model={self.d_model} is not divisible by model.n_heads={self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"model.n_heads={self.n_heads} is not divisible by model.n_kv_heads={self.n_kv_heads}")
        for field in ("d_model", "d_ff") if self.moe else ():
            if getattr(self, field) % 8:  # rows of 16 bytes, in BF16 too, which the grouped product needs
                raise ValueError(f"model.{field}={getattr(self, field)} is not allowed with experts: a multiple of 8")
        if self.positions == "rope" and self.d_head % 2:
            raise ValueError(f"model.positions='rope' needs an even d_head, got {self.d_head}")

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def on(self, device: torch.device) -> TransformerConfig:
        """The same with what the device decides filled in: the backend, and its tiles if it has any.

        Raises ValueError where the backend cannot run there, or is told what only another one can do.
        """
        backend = resolve_backend(self.backend, device, self.d_model, self.n_heads)
        if backend == "triton":
            tiles = self.tiles or pinned_tiles(self.d_head, self.deterministic)
            if tiles.deterministic != self.deterministic:
                raise ValueError(
                    f"model.deterministic={self.deterministic} does not fit model.tiles.query_gradient="
                    f"{tiles.query_gradient}: false goes with null, and null with false"
                )
            return replace(self, backend=backend, tiles=tiles)
        for field, usual in (("tiles", None), ("deterministic", True)):
            if getattr(self, field) != usual:
                value = "" if field == "tiles" else f"={getattr(self, field)}"
                raise ValueError(
                    f"model.{field}{value} is not allowed with model.backend={backend!r}: it goes with 'triton' alone"
                )
        return replace(self, backend=backend)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang & Sennrich, arXiv:1910.07467) whose gradient meets that of the residual stream in one piece.

    PyTorch composes it of operations that use x twice. The view adds these up first, whether or not a tap looks, so
    that looking does not change the order of a sum.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view_as(x))


def _norm(config: TransformerConfig, width: int) -> nn.Module:
    return nn.LayerNorm(width) if config.norm == "layernorm" else RMSNorm(width, eps=1e-6)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al., arXiv:2104.09864), halves rotated as in GPT-NeoX."""

    def __init__(self, d_head: int, context_length: int, base: float) -> None:
        super().__init__()
        self.d_head, self.context_length, self.base = d_head, context_length, base
        self.cos: Tensor
        self.sin: Tensor
        cos_TD, sin_TD = self.tables()
        self.register_buffer("cos", cos_TD, persistent=False)
        self.register_buffer("sin", sin_TD, persistent=False)

    def tables(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cosine and sine of position x frequency, (T, D) each in FP32, of angles that were computed in ``dtype``."""
        frequency = self.base ** (-torch.arange(0, self.d_head, 2, dtype=torch.float32) / self.d_head)
        positions = torch.arange(self.context_length, dtype=torch.float32)
        angle_TD = torch.outer(positions.to(dtype), frequency.to(dtype)).float().repeat(1, 2)
        return angle_TD.cos(), angle_TD.sin()

    def forward(self, x_BHTD: Tensor) -> Tensor:
        T = x_BHTD.shape[-2]
        first, second = x_BHTD.chunk(2, dim=-1)
        return x_BHTD * self.cos[:T] + torch.cat((-second, first), dim=-1) * self.sin[:T]


class Attention(nn.Module):
    """Self-attention in three parts, ``project``, ``attend``, ``merge``; ``models.compiled`` leaves the second alone.

    q, k, v, o are bias-free ``nn.Linear`` layers, q and o of (E, E), k and v of (G x D, E).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        E, D = config.d_model, config.d_head
        kv_width = config.kv_heads * D
        self.d_head = D
        self.q, self.k, self.v, self.o = (nn.Linear(E, width, bias=False) for width in (E, kv_width, kv_width, E))
        self.q_norm: nn.Module | None
        self.k_norm: nn.Module | None
        self.q_norm, self.k_norm = (_norm(config, D), _norm(config, D)) if config.qk_norm else (None, None)
        self.dot_product = DotProduct(config.backend, config.window, config.tiles)
        self.rotary = Rotary(D, config.context_length, config.rope_base) if config.positions == "rope" else None
        self.nonfinite: Tensor
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64))

    def _heads(self, x_BTE: Tensor, norm: nn.Module | None = None, rotary: Rotary | None = None) -> Tensor:
        x_BHTD = x_BTE.unflatten(-1, (-1, self.d_head)).transpose(-3, -2)
        x_BHTD = norm(at_least_fp32(x_BHTD)) if norm is not None else x_BHTD
        return rotary(x_BHTD) if rotary is not None else x_BHTD

    def attend(self, q: Tensor, k: Tensor, v: Tensor, numerics: LayerNumerics, nonfinite: Tensor) -> Tensor:
        """The dot product, a kernel of its own: under autocast it receives BF16 and nothing inside it is cast."""
        q, k, v = as_autocast(q, k, v)
        with outside_autocast(q):
            return self.dot_product(q, k, v, numerics, nonfinite)

    def project(self, x_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, D), k and v (B, G, T, D), as they enter the dot product."""
        return (
            self._heads(self.q(x_BTE), self.q_norm, self.rotary),
            self._heads(self.k(x_BTE), self.k_norm, self.rotary),
            self._heads(self.v(x_BTE)),
        )

    def merge(self, o_BHTD: Tensor) -> Tensor:
        return self.o(o_BHTD.transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    """layer: its index."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = _norm(config, config.d_model), Attention(config)
        widths = config.d_model, config.d_ff, config.mlp
        self.mlp_norm = _norm(config, config.d_model)
        self.mlp = MLP(*widths) if config.moe is None else MoE(*widths, config.moe)
        self.attention_dropout = dropout_at(config.dropout, 2 * layer + 1)
        self.mlp_dropout = dropout_at(config.dropout, 2 * layer + 2)

    def before_attention(self, x_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project(self.attention_norm(x_BTE))

    def after_attention(self, x_BTE: Tensor, o_BHTD: Tensor) -> tuple[Tensor, Routing | None]:
        x_BTE = x_BTE + dropped(self.attention.merge(o_BHTD), self.attention_dropout)
        y_BTE, routing = self.mlp(self.mlp_norm(x_BTE)), None
        if isinstance(self.mlp, MoE):
            y_BTE, routing = y_BTE
        return x_BTE + dropped(y_BTE, self.mlp_dropout), routing

    def forward(self, x_BTE: Tensor, numerics: LayerNumerics) -> tuple[Tensor, Routing | None]:
        q, k, v = self.before_attention(x_BTE)
        return self.after_attention(x_BTE, self.attention.attend(q, k, v, numerics, self.attention.nonfinite))


class Transformer(nn.Module):
    """Maps tokens (B, T + 1) to what training minimises; ``loss``, its first term, is the mean next-token NLL in nats.

    Build it under ``torch.device("meta")`` to count a model that does not fit. precision: ``fp32``, or ``bf16`` for
    autocast (``models.precision``); the weights are FP32 either way.
    """

    def __init__(self, config: TransformerConfig, precision: str = "fp32") -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size=null: the data's vocabulary was not filled in")
        if config.backend == "auto" or (config.backend == "triton" and config.tiles is None):
            raise ValueError(f"model.backend={config.backend!r}: the device was not filled in, by TransformerConfig.on")
        self.config, self.precision = config, precision
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.context_length, config.d_model) if learned else None
        self.dropout = dropout_at(config.dropout, 0)
        # PyTorch's stub forgets what a ModuleList holds
        self.blocks: Sequence[Block] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))  # type: ignore[assignment]
        self.final_norm = _norm(config, config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.tokens.weight

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> Transformer:
        """Draw every matrix from N(0, init_std^2), residual outputs from N(0, init_std^2 / 2 n_layers).

        W_Q is drawn from N(0, query_init_std^2) where that is given; all other weights stay as they are without it.
        """
        std, query_std = self.config.init_std, self.config.query_init_std
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue  # norms keep their ones and zeros
            residual = name.endswith(RESIDUAL_OUTPUTS)
            scale = 1.0 / math.sqrt(2 * self.config.n_layers) if residual else 1.0
            own = query_std if query_std is not None and name.endswith(QUERY) else std * scale
            parameter.normal_(0.0, own, generator=generator)
        return self

    @in_own_precision
    def _run(self, tokens_BT: Tensor, numerics: AttentionNumerics) -> tuple[Tensor, tuple[Routing, ...]]:
        x_BTE = self.tokens(tokens_BT)
        if self.positions is not None:
            x_BTE = x_BTE + self.positions.weight[..., : tokens_BT.shape[-1], :].unsqueeze(-3)
        x_BTE, routings = dropped(x_BTE, self.dropout), []
        for index, block in enumerate(self.blocks):
            x_BTE, routing = block(x_BTE, numerics.layer(index))
            routings.append(routing)
        return self.head(self.final_norm(x_BTE)), tuple(r for r in routings if r is not None)

    def mean_nll(self, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """Mean over tokens of -ln softmax(logits)[target], in nats, taken in FP32. 0-dim."""
        return F.cross_entropy(at_least_fp32(logits_NV), targets_N)

    def logits(self, tokens_BT: Tensor, numerics: AttentionNumerics = HEALTHY) -> Tensor:
        """Of the next token at every position, (B, T, V), from tokens (B, T)."""
        return self._run(tokens_BT, numerics)[0]

    def forward(
        self, tokens_BT1: Tensor, numerics: AttentionNumerics = HEALTHY, balance_scale: float = 1.0
    ) -> tuple[Tensor, Tensor, tuple[Routing, ...]]:
        """What training minimises, in two terms, and what the routers did: NLL, auxiliary loss, routings.

        The first is ``loss``; the second, in the same unit, the routers' losses with their coefficients, the
        load-balance term times ``balance_scale``; routings: one a layer, none for a dense model. tokens: (B, T + 1), or
        inputs and targets apart (``models.batch``).
        """
        inputs_BT, targets_BT = inputs_and_targets(tokens_BT1)
        logits_BTV, routings = self._run(inputs_BT, numerics)
        nll = self.mean_nll(logits_BTV.flatten(0, 1), targets_BT.flatten())
        # experts alone have routings
        auxiliary = auxiliary_loss(routings, self.config.moe, balance_scale) if routings else torch.zeros_like(nll)  # type: ignore[arg-type]
        return nll, auxiliary, routings

    def loss(self, tokens_BT1: Tensor, numerics: AttentionNumerics = HEALTHY) -> Tensor:
        """Mean cross-entropy in nats per token of predicting token t+1 from tokens up to t.

        tokens_BT1: integer, (B, T + 1). Returns a 0-dim FP32 tensor; NaN and Inf propagate.
        """
        return self(tokens_BT1, numerics)[0]

    def update_balance(self, routings: Sequence[Routing], scale: float) -> None:
        """Let every router with a balancing bias follow the loads that it saw; nothing for the others."""
        for block, routing in zip(self.blocks, routings, strict=False):
            block.mlp.update_balance(routing, scale)  # type: ignore[operator]  # experts alone have routings


@lru_cache(maxsize=8)
def skeleton(config: TransformerConfig) -> Transformer:
    """The model's modules and parameters without memory, for names and shapes; an open vocabulary has 2^16 tokens."""
    with torch.device("meta"):
        return Transformer(replace(config, vocab_size=config.vocab_size or 2**16))
