"""A hash of the kernels' sources: part of the key of everything that is compiled and cached."""

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent
PATTERNS = ("*.py", "*.cpp", "*.h", "tuned.json")


def source_hash(folder: Path = FOLDER) -> str:
    """Return 16 hexadecimal digits that change with the source of any kernel and with the launch configurations.

    Args:
        folder: of the sources.

    Example:
        >>> len(source_hash())
        16
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in PATTERNS for path in folder.glob(pattern)):
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]
