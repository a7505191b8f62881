"Models of transformers, for the tests that compare ours with them."

import json
from pathlib import Path

import torch


@torch.no_grad()
def shaken(model):
    "The model in eval mode, its biases and norms no longer those of a fresh one."
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def save(model, folder, **kwargs):
    model.save_pretrained(folder, **kwargs)
    return Path(folder)


def edit(folder, **changes):
    "Change fields of the config.json in `folder`."
    path = Path(folder, 'config.json')
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def ids(model, B=3, T=None, seed=1):
    "Random ids (B, T), as many as the model can read if T is not given."
    T = T or model.config.max_position_embeddings  # GPT-2's n_positions has this name, too
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (B, T), generator=draws)


@torch.no_grad()
def assert_same(ours, theirs, T=None):
    "The same logits, and the same loss, within 1e-4."
    x = ids(theirs, T=T)
    torch.testing.assert_close(ours(x)[0], theirs(x).logits, rtol=1e-4, atol=1e-4)
    if x.size(1) > 1:
        loss = theirs(x, labels=x).loss
        torch.testing.assert_close(ours(x[:, :-1], x[:, 1:])[1], loss, rtol=1e-4, atol=1e-4)
