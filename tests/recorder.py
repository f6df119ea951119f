"""An independent store of all probabilities: the plain processor, which also keeps an explicit fp32 softmax."""

from contextlib import contextmanager

import torch
from diffusers.models.attention_processor import AttnProcessor2_0


class Recorder(AttnProcessor2_0):
    """Keep [rows, H, N, T] of each layer and call; the images stay those of the plain processor."""

    def __init__(self):
        super().__init__()
        self.cross, self.own = [], []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k = (x.float().unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_q(hidden_states), attn.to_k(context)))
        probs = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        (self.own if encoder_hidden_states is None else self.cross).append(probs.detach())
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    def maps(self, select, rows):
        """Average kept cross-attention over heads, layers and calls: a list of [Bc, K, N], the finest level first."""
        pixels = sorted({p.shape[2] for p in self.cross}, reverse=True)
        out = []
        for num in pixels:
            means = torch.stack([p[rows].mean(1) for p in self.cross if p.shape[2] == num]).mean(0)
            out.append((means @ select).transpose(1, 2))
        return out

    def propagate(self, prior, rows):
        """Apply each layer's self-attention to a prior [Bc, M, N] of its level, and average."""
        seen = [p[rows].mean(1) for p in self.own if p.shape[2] == prior.shape[-1]]
        return torch.stack([prior @ p.transpose(1, 2) for p in seen]).mean(0)


@contextmanager
def recording(unet):
    kept, recorder = unet.attn_processors, Recorder()
    unet.set_attn_processor(recorder)
    try:
        yield recorder
    finally:
        unet.set_attn_processor(kept)
