"""The numbers that public datasets' own annotations give to the classes of the vocabularies of the same names."""

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.vocabulary import Vocabulary

PUBLIC = ("voc", "coco", "cityscapes", "ade20k")
CITYSCAPES_LABELS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # by train id
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # category ids of which no annotation was published
COCO_LAST = {  # of COCO's supercategories: the last category id
    "person": 1, "vehicle": 9, "outdoor": 15, "animal": 25, "accessory": 33, "sports": 43, "kitchen": 51, "food": 61,
    "furniture": 70, "electronic": 77, "appliance": 82, "indoor": 90,
}  # fmt: skip


def public_ids(name: str) -> tuple[int, ...]:
    """Return the numbers of a vocabulary's classes, in its order: category ids, or Cityscapes' label ids.

    Args:
        name: one of `PUBLIC`.

    Raises:
        DiffuMaskError: it is another one.

    Example:
        >>> public_ids("coco")[-2:], public_ids("cityscapes")[0]
        ((89, 90), 7)
    """
    if name not in PUBLIC:
        raise DiffuMaskError(f"{name!r} is no public dataset: name one of {', '.join(PUBLIC)}")
    if name == "coco":
        return tuple(number for number in range(1, max(COCO_LAST.values()) + 1) if number not in COCO_GAPS)
    return CITYSCAPES_LABELS if name == "cityscapes" else Vocabulary.shipped(name).ids


def supercategory(number: int) -> str:
    """Return the supercategory of one of COCO's category ids."""
    return next(name for name, last in COCO_LAST.items() if number <= last)
