"""What a finished dataset shows to people: a sheet of samples and its card."""

from diffumask_fast.dataset.card import write_card
from diffumask_fast.dataset.licence import licence_of
from diffumask_fast.dataset.preview import write_preview
from diffumask_fast.dataset.storage import Place
from diffumask_fast.options import MAX_PIXELS


def finish(folder: Place, origin: Place | None, *, max_pixels: int = MAX_PIXELS, tag: str = "") -> None:
    """Write `preview.png` and `README.md` into a dataset.

    Args:
        folder: the dataset.
        origin: the folder of the model that drew it, or of the dataset that it is made of, whose card has the licence;
            None where there is none.
        max_pixels: of a picture that is decoded.
        tag: as for `temporary_path`.

    Raises:
        DiffuMaskError: the dataset cannot be read, or a file not be written.
    """
    write_preview(folder, max_pixels=max_pixels, tag=tag)
    write_card(folder, licence_of(origin), tag)
