"""Small data, and segmenters of every family in a tiny configuration, made of transformers' own classes."""

from pathlib import Path

import transformers
from samples import draw, requests

from diffumask_fast.dataset.run import open_run
from diffumask_fast.prompts.vocabulary import Vocabulary

STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}


def dataset(folder: Path, num: int = 7, classes: str = "dog,car", change=lambda sample: sample, **keywords) -> Path:
    """Write a dataset of noise; every third row is rejected, unless `change` says otherwise."""
    with open_run(folder, requests(num, classes), {}, {}, 4, vocabulary=Vocabulary.parse(classes)) as run:
        for index in run.missing_shards():
            run.write(index, [change(draw(request, **keywords)) for request in run.requests_of(index)])
    return folder


def tiny_model(family: str, folder: Path, labels: int = 5) -> Path:
    """Write an untrained model, small enough for a test."""
    if family == "segformer":
        config = transformers.SegformerConfig(
            hidden_sizes=[16, 16, 32, 32], num_attention_heads=[1, 1, 2, 2], depths=[1] * 4, decoder_hidden_size=16,
            num_labels=labels,
        )  # fmt: skip
        model = transformers.SegformerForSemanticSegmentation(config)
    elif family == "upernet":
        backbone = transformers.ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1] * 4, layer_type="basic", **STAGES
        )
        config = transformers.UperNetConfig(
            backbone_config=backbone, hidden_size=16, auxiliary_in_channels=32, auxiliary_channels=16, num_labels=labels
        )
        model = transformers.UperNetForSemanticSegmentation(config)
    elif family == "mask2former":
        backbone = transformers.SwinConfig(
            image_size=32, embed_dim=16, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, **STAGES
        )
        config = transformers.Mask2FormerConfig(
            backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2,
            encoder_layers=1, decoder_layers=2, encoder_feedforward_dim=32, dim_feedforward=32, num_queries=8,
            train_num_points=64, num_labels=labels,
        )  # fmt: skip
        model = transformers.Mask2FormerForUniversalSegmentation(config)
    else:
        config = transformers.EomtConfig(
            hidden_size=32, num_hidden_layers=2, num_blocks=1, num_attention_heads=2, image_size=64, num_queries=8,
            mlp_ratio=2, train_num_points=64, num_labels=labels,
        )  # fmt: skip
        model = transformers.EomtForUniversalSegmentation(config)
    model.save_pretrained(folder)
    return folder
