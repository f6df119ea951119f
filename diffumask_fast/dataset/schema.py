"""The columns of a shard, and a row made of a result."""

import io
import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.request import Request

SCHEMA_VERSION = 1
PNG_LEVEL = 6

_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_FIELDS = [
    ("key", pa.string()),
    ("image", _PICTURE),
    ("mask", _PICTURE),
    ("classes", pa.list_(pa.string())),
    ("class_ids", pa.list_(pa.int32())),
    ("prompt", pa.string()),
    ("negative_prompt", pa.string()),
    ("seed", pa.int64()),
    ("quality", pa.list_(pa.float32())),
    ("maps", pa.list_(pa.uint8())),
    ("map_sizes", pa.list_(pa.list_(pa.int32()))),
    ("accepted", pa.bool_()),
    ("reason", pa.string()),
]


def _datasets_features() -> dict:
    """Return the columns as the `datasets` library notes them, so that it hands out pictures instead of bytes."""
    features: dict[str, object] = {}
    for name, kind in _FIELDS:
        if kind == _PICTURE:
            features[name] = {"_type": "Image"}
            continue
        depth = 0
        while pa.types.is_list(kind):
            kind, depth = kind.value_type, depth + 1
        note: object = {"dtype": "float32" if kind == pa.float32() else str(kind), "_type": "Value"}
        for _ in range(depth):
            note = {"feature": note, "_type": "Sequence"}
        features[name] = note
    return features


SCHEMA = pa.schema(
    _FIELDS,
    metadata={
        "schema_version": str(SCHEMA_VERSION),
        "huggingface": json.dumps({"info": {"features": _datasets_features()}}),
    },
)
