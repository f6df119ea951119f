"""generation/embedding.py: vectors of captions by the text encoder that a pipeline has."""

import numpy as np
import pytest
import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.embedding import compares_texts, embed
from diffumask_fast.pipeline import DiffuMaskPipeline

TEXTS = ["a dog on the grass", "a photo of the red cat and the potted plant on the sofa", "a dog", "a dog on the grass"]


def loaded(folder):
    return DiffuMaskPipeline.from_pretrained(str(folder), device="cpu")


@torch.no_grad()
def alone(encoder, tokenizer, text):
    """The output for a text that is padded as diffusers does it."""
    return encoder(tokenizer([text], padding="max_length", max_length=77, return_tensors="pt")["input_ids"])


def assert_directions(vectors, expected):
    expected = torch.nn.functional.normalize(torch.cat(expected).float(), dim=1).numpy()
    np.testing.assert_allclose(vectors.astype(np.float32), expected, atol=2e-3)
    assert np.abs(expected[0] - expected[1]).max() > 0.05  # other texts have other vectors


def test_clip_without_a_projection_gives_the_state_at_its_end_token(tiny_folder):
    pipe = loaded(tiny_folder)
    vectors = embed(pipe, TEXTS)
    assert vectors.dtype == np.float16 and vectors.shape == (4, 32) and compares_texts(pipe)
    assert_directions(vectors, [alone(pipe.pipe.text_encoder, pipe.pipe.tokenizer, t).pooler_output for t in TEXTS])
    assert embed(pipe, []).shape[0] == 0


def test_of_two_encoders_the_one_with_a_projection_is_taken(tiny_sdxl):
    pipe = DiffuMaskPipeline.from_pipe(tiny_sdxl)
    vectors = embed(pipe, TEXTS)
    assert compares_texts(pipe)
    assert_directions(vectors, [alone(tiny_sdxl.text_encoder_2, tiny_sdxl.tokenizer_2, t).text_embeds for t in TEXTS])


def test_vectors_that_are_no_numbers_are_refused(tiny_folder):
    pipe = loaded(tiny_folder)
    next(pipe.pipe.text_encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(DiffuMaskError, match="vectors that are no numbers: say `dtype=fp32`"):
        embed(pipe, TEXTS)


def test_an_exported_encoder_gives_the_same(tiny_folder, static_engine):
    pipe = DiffuMaskPipeline.from_pretrained(str(tiny_folder), engine="onnx", engine_path=static_engine, device="cpu")
    assert compares_texts(pipe)
    vectors, expected = embed(pipe, TEXTS), embed(loaded(tiny_folder), TEXTS)
    np.testing.assert_allclose(vectors.astype(np.float32), expected.astype(np.float32), atol=2e-3)


def test_an_encoder_without_layers_gives_the_mean_of_its_words(mini_pipe):
    vectors = embed(mini_pipe, ["a dog", "a dog on the street", "a cat in a room"])
    states = alone(mini_pipe.pipe.text_encoder, mini_pipe.pipe.tokenizer, "a dog").last_hidden_state[0, 1:3]
    expected = torch.nn.functional.normalize(states.mean(0), dim=0)
    np.testing.assert_allclose(vectors[0].astype(np.float32), expected.numpy(), atol=2e-3)
    assert not compares_texts(mini_pipe)
    near, far = (float(vectors[0].astype(np.float32) @ vectors[i].astype(np.float32)) for i in (1, 2))
    assert near > far


@pytest.fixture(scope="module")
def mini_pipe():
    return loaded("mini")
