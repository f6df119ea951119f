"""engines/decoder.py: the compiled decoder of a VAE."""

import pytest
import torch
from conftest import make_vae, relative
from torch._dynamo.utils import counters

from diffumask_fast.engines import decoder as module
from diffumask_fast.engines.decoder import CompiledDecoder


@torch.no_grad()
def test_a_smaller_batch_is_decoded_by_the_same_code():
    vae = make_vae().eval()
    latents = torch.randn(3, 4, 8, 8)
    truth = vae.decode(latents).sample
    counters.clear()
    with CompiledDecoder(vae.decoder, 8).in_place():
        for rows in (3, 3, 2, 1):
            assert relative(vae.decode(latents[:rows]).sample, truth[:rows]) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_the_decoder_is_its_own_outside_and_after_an_exception():
    vae = make_vae().eval()
    compiled = CompiledDecoder(vae.decoder, 8)
    assert "forward" not in vars(vae.decoder)
    with pytest.raises(KeyboardInterrupt), compiled.in_place():
        assert vae.decoder.forward is compiled
        raise KeyboardInterrupt
    assert "forward" not in vars(vae.decoder)


@torch.no_grad()
def test_pieces_and_an_image_beside_the_latents(monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    rows, latents = [], torch.randn(3, 4, 2, 2)
    monkeypatch.setattr(
        torch, "compile", lambda forward, **_: lambda *given: rows.append(len(given[1])) or forward(*given)
    )
    decoder = make_vae().decoder
    truth = decoder(latents)
    assert relative(CompiledDecoder(decoder, 8)(latents), truth) < 1e-5 and rows == [1, 1, 1]
    decoder, seen = make_vae().decoder, []
    monkeypatch.setattr(decoder, "forward", lambda *given: seen.append([len(x) for x in given]))
    CompiledDecoder(decoder, 8)(latents, latents, latents)
    assert seen == [[3, 3, 3]] and rows == [1, 1, 1]
