"""The training step of open_lm in eager PyTorch, written here to be fast; for `train_step.py`.

Run by an interpreter that has PyTorch, on a problem and by the commands that `train_step.py` gives
it: this file is the only one that imports PyTorch, and it imports nothing of this program.
"""

# pyright: reportMissingImports=false

import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

EPSILON = 1e-5


class Norm(nn.Module):
    """LayerNorm with a gain and no bias."""

    def __init__(self, gain: Any):
        super().__init__()
        self.gain = nn.Parameter(gain)

    def forward(self, x: Any) -> Any:
        """Normalises `x`."""
        return functional.layer_norm(x, self.gain.shape, self.gain, None, EPSILON)


class Block(nn.Module):
    """Pre-norm attention with qk-norm over the whole vectors, and SwiGLU."""

    def __init__(self, heads: int, weights: dict[str, Any]):
        super().__init__()
        self.heads = heads
        self.attention_norm = Norm(weights["attention_norm/gain"])
        self.query_norm = Norm(weights["attention/query_norm/gain"])
        self.key_norm = Norm(weights["attention/key_norm/gain"])
        self.feed_forward_norm = Norm(weights["feed_forward_norm/gain"])
        self.qkv = linear(weights["attention/qkv"])
        self.out = linear(weights["attention/out"])
        self.gate_up = linear(weights["feed_forward/gate_up"])
        self.down = linear(weights["feed_forward/down"])

    def forward(self, x: Any, cosine: Any, sine: Any) -> Any:
        """Passes `x` through the layer."""
        batch, length, width = x.shape
        query, key, value = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in (query, key, value)
        )
        mixed = functional.scaled_dot_product_attention(
            rotate(query, cosine, sine), rotate(key, cosine, sine), value, is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


class Decoder(nn.Module):
    """Token ids to logits."""

    def __init__(self, settings: dict[str, Any], weights: dict[str, Any]):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(weights["embedding"], freeze=False)
        layers = (
            {name[7:]: value[i] for name, value in weights.items() if name.startswith("blocks/")}
            for i in range(settings["layers"])
        )
        self.blocks = nn.ModuleList(Block(settings["heads"], layer) for layer in layers)
        self.norm = Norm(weights["norm/gain"])
        self.output = linear(weights["output"])
        half = settings["width"] // settings["heads"] // 2
        frequencies = settings["rope_base"] ** (-torch.arange(half) / half)
        angles = torch.outer(torch.arange(settings["sequence_length"]), frequencies).repeat(1, 2)
        self.cosine, self.sine = angles.cos(), angles.sin()

    def forward(self, tokens: Any) -> Any:
        """Logits of the token that follows each position."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        return self.output(self.norm(x))


def linear(weight: Any) -> Any:
    """A layer without bias from a weight whose first axis is the input's."""
    flat = weight.reshape(len(weight), -1).T.contiguous()
    layer = nn.Linear(*reversed(flat.shape), bias=False)
    layer.weight.data = flat
    return layer


def rotate(x: Any, cosine: Any, sine: Any) -> Any:
    """Rotary positions, GPT-NeoX's way."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def main() -> None:
    """Answers `train_step.py`: losses and gradient norms of the first steps, then times."""
    with np.load(sys.argv[1]) as arrays:
        settings = json.loads(str(arrays["settings"]))
        weights = {
            name: torch.from_numpy(arrays[name])
            for name in arrays.files
            if name not in ("settings", "rows")
        }
        rows = torch.from_numpy(arrays["rows"]).long()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = Decoder(settings["model"], weights)
    hyper = settings["hyperparameters"]
    adam = torch.optim.AdamW(
        model.parameters(),
        lr=hyper["learning_rate"],
        betas=(hyper["beta1"], hyper["beta2"]),
        eps=hyper["epsilon"],
        weight_decay=hyper["weight_decay"],
        fused=True,
    )

    def losses() -> tuple[Any, Any]:
        logits, targets = model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
        loss = functional.cross_entropy(logits, targets)
        z_loss = hyper["z_loss_weight"] * logits.logsumexp(dim=-1).square().mean()
        return loss + z_loss, loss

    forward = torch.compile(losses) if "--compile" in sys.argv else losses

    def step() -> tuple[Any, Any]:
        adam.zero_grad(set_to_none=True)
        total, loss = forward()
        total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), hyper["gradient_clip_norm"])
        adam.step()
        return loss, norm

    first = [[float(value.detach()) for value in step()] for _ in range(settings["first_steps"])]
    print(json.dumps({"first": first, "version": f"torch {torch.__version__}"}), flush=True)
    for line in sys.stdin:
        begin = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            step()
        end = time.perf_counter(), time.process_time()
        print(json.dumps({"seconds": end[0] - begin[0], "cpu": end[1] - begin[1]}), flush=True)


if __name__ == "__main__":
    main()
