"""A small GPT in the style of nanoGPT, trained on the standard library's sources, watched by two lines.

python examples/nanogpt_style.py [steps]
"""

import argparse
import inspect
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

import foreshock


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.n_head, self.dropout = heads, dropout
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.drop = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        return self.drop(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.ln_2, self.mlp = nn.LayerNorm(width), MLP(width, dropout)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary=128, context=64, width=64, layers=2, heads=4, dropout=0.0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight
        self.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, (nn.Linear, nn.Embedding)) else None)

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe.weight[: idx.shape[1]]
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main(steps: int) -> None:
    torch.manual_seed(0)
    text = torch.tensor([ord(c) % 128 for c in inspect.getsource(argparse)])
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = foreshock.attach(model, optimizer)
    for step in range(1, steps + 1):
        rows = torch.stack([text[i : i + 65] for i in torch.randint(len(text) - 65, (8,)).tolist()])
        _, loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimizer.step()
        readings = watch.step(loss)
        optimizer.zero_grad()
        laws = [float(x.max()) for name, x in readings.items() if name.endswith("residual.over_noise")]
        if laws:
            said = f"loss {loss.item():.3f}, {len(readings)} readings, laws up to {max(laws):.2f} of 4.26"
            print(f"step {step}: {said}")
    watch.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
