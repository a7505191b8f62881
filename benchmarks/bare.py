"""A GPT without calls of modules, for writing text: in a small model much of a token's time is
Python, which looks for hooks and names.

    # ms per token of 6 layers 192 wide, batch 1, with modules and without
    python benchmarks/bare.py [--rounds 9]

`BareGPT(model)` looks everything up once, and computes the same numbers. What is skipped must not
be missed: people hang hooks on modules, put a layer of their own in the place of one, or replace a
`forward`. So whatever is not as chapters 01 and 02 define it is called as before.
"""

from functools import partial
from types import SimpleNamespace

import torch
from common import OURS, alternate, main, ratios
from torch import nn
from torch.nn import functional as F

from mingpt_nb.attention import CausalSelfAttention, attend
from mingpt_nb.model import ACTIVATIONS, GPT, MLP, Block


def bare(m, product=F.linear):
    """The module `m`, in eval mode, as a function that calls no module. With hooks, or of another
    class, it comes back as it is."""
    kind = type(m)
    if not untouched(m):
        return m
    if kind is nn.Linear:
        return partial(product, weight=m.weight, bias=m.bias)
    if kind is nn.LayerNorm:
        return partial(
            F.layer_norm,
            normalized_shape=m.normalized_shape,
            weight=m.weight,
            bias=m.bias,
            eps=m.eps,
        )
    if (
        kind is Block
        and type(m.attn) is CausalSelfAttention
        and type(m.mlp) is MLP
        and untouched(m.attn)
        and untouched(m.mlp)
    ):
        return bare_block(m, product)
    return m.forward if kind in ACTIVATIONS.values() else m


FORWARDS = {
    kind: kind.forward
    for kind in (nn.Linear, nn.LayerNorm, Block, CausalSelfAttention, MLP, *ACTIVATIONS.values())
}


def untouched(m):
    """Whether `m` is of a class named here, with the `forward` that its class had at first, and no
    hooks."""
    own_forward = 'forward' in vars(m) or FORWARDS.get(type(m)) is not type(m).forward
    return not own_forward and not m._forward_hooks and not m._forward_pre_hooks


def bare_block(block, product):
    """The block on one screen. torch maps rows (B * T, C) faster than rows of rows, so the batch is
    unfolded for attention only."""
    a, m = block.attn, block.mlp
    parts = block.ln_1, a.c_attn, a.c_proj, block.ln_2, m.c_fc, m.act, m.c_proj
    norm_1, c_attn, c_proj, norm_2, fc, act, proj = (bare(part, product) for part in parts)
    C, nh = a.n_embd, a.n_head

    def forward(x, cache=None):
        B, T, _ = x.shape
        x = x.reshape(B * T, C)
        q, k, v = c_attn(norm_1(x)).view(B, T, 3 * nh, C // nh).transpose(1, 2).chunk(3, dim=1)
        if cache is not None:
            k, v = cache.append(k, v)  # each (B, nh, S, hs), in the cache's dtype
        y = attend(q.to(k.dtype), k, v).to(x.dtype)
        x = x + c_proj(y.transpose(1, 2).reshape(B * T, C))
        x = x + proj(act(fc(norm_2(x))))
        return x.view(B, T, C)

    return forward


class BareGPT:
    """What generation needs of a GPT, with functions in the place of modules. A model whose three
    methods are not these is used as it is."""

    embed, hidden, next_logits = GPT.embed, GPT.hidden, GPT.next_logits

    def __new__(cls, model, product=F.linear):  # in eval mode
        for name in 'embed', 'hidden', 'next_logits':
            if name in vars(model) or getattr(type(model), name) is not getattr(cls, name):
                return model
        self, t = super().__new__(cls), model.transformer
        self.transformer = SimpleNamespace(
            wte=t.wte,
            wpe=SimpleNamespace(weight=t.wpe.weight),
            h=[bare(block, product) for block in t.h],
            ln_f=bare(t.ln_f),
        )
        self.lm_head, self.training = bare(model.lm_head, product), False
        self.config, self.block_size = model.config, model.block_size
        return self


def write(model, caches, prompt, new):
    "`new` tokens after `prompt`, the best each time; `model` is a GPT or a BareGPT."
    ids = prompt
    for cache in caches:
        cache.length = 0
    for _ in range(new):
        ids = torch.cat((ids, model.next_logits(ids, caches).argmax(-1, keepdim=True)), dim=1)
    return ids


def rows(args):
    config, new = GPT.get_default_config(), 4 if args.tiny else args.new
    config.merge_from_dict(
        dict(model_type='gpt-nano' if args.tiny else 'gpt-mini', vocab_size=65, block_size=256)
    )
    torch.manual_seed(0)
    model = GPT(config).eval()
    prompt = torch.randint(65, (1, 16))
    with torch.inference_mode():
        caches = model.new_caches(1, 16 + new)
        jobs = {
            name: lambda m=m: write(m, caches, prompt, new)
            for name, m in {OURS: model, 'no modules': BareGPT(model)}.items()
        }
        same = (jobs[OURS]() == jobs['no modules']()).float().mean().item()
        yield from ratios(
            'small float32, batch 1',
            alternate(jobs, args.rounds),
            per=new * 1e-3,
            unit='ms/token',
            same_tokens=same,
        )


if __name__ == '__main__':
    main(__doc__, rows, rounds=9, new=(32, 'tokens to generate'))
