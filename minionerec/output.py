"""Writing files atomically, and so that a full disk ends in one line.

Only the standard library is imported.
"""

import errno
import logging
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from minionerec.errors import RunError

# No room (on the disk, in a quota, below a limit on files), no permission, too long a name, a broken device.
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
CANNOT_WRITE |= {errno.ENAMETOOLONG, errno.EIO}


def hide_noise() -> None:
    """Hides warnings of four packages that a user can do nothing about. Bitsandbytes lacks an optional kernel of a hub,
    which it says when it is imported, and names its types in every 8-bit matmul; PEFT reads a deprecated property while
    it wraps a model; TRL calls deprecated methods around generation, DeepSpeed deprecated collectives."""
    for module in ("backends.cpu.ops", "autograd._functions"):
        logging.getLogger(f"bitsandbytes.{module}").setLevel(logging.ERROR)
    # Checkpoints saved within a second of each other; the Trainer then orders them by their numbers, as is right.
    logging.getLogger("transformers.trainer_utils").addFilter(_not_of_times)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)  # SID rows are tied by PEFT
    warnings.filterwarnings("ignore", "`gradient_checkpointing_(en|dis)able` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def _not_of_times(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("mtime may not")


def why_not_written(error: BaseException) -> str | None:
    """In one line, why a file could not be written; None for an error of another kind.

    The libraries have errors of their own: tokenizers raises `Exception`, safetensors SafetensorError, both with the
    number of the system's error in their text; torch.save raises RuntimeError, in one of two texts, without a reason.
    """
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return text if error.errno in CANNOT_WRITE else None
    by_torch = ("iostream error", "inline_container")
    if isinstance(error, RuntimeError) and any(part in text for part in by_torch) and "StreamReader" not in text:
        return "torch.save failed; is the disk full?"
    if type(error) is Exception or type(error).__name__ == "SafetensorError":
        number = re.search(r"\(os error (\d+)\)", text)
        return text if number and int(number[1]) in CANNOT_WRITE else None
    return None


@contextmanager
def writing(what: str, then: str = "") -> Iterator[None]:
    """Turns the errors of Python and of libraries for a file that cannot be written into RunError, which names `what`
    was written and ends with `then`."""
    try:
        yield
    except Exception as error:
        why = why_not_written(error) or (" ".join(str(error).split()) if isinstance(error, OSError) else None)
        if why is None:
            raise
        raise RunError(f"{what} cannot be written: {why}{then}") from None


@contextmanager
def whole_file(path: str) -> Iterator[str]:
    """Yields where to write a file, which gets the name `path` when it is complete, and is removed if it fails."""
    partial = f"{path}.{uuid.uuid4().hex}.partial"  # containers on one folder may have the same process ids
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.remove(partial)
        raise


@contextmanager
def whole_folder(path: str, writes: bool = True) -> Iterator[str]:
    """As `whole_file`, for a folder, which replaces one of that name. `writes`: whether this process of several makes
    the folder; the others only learn where it is."""
    partial = f"{path.rstrip(os.sep)}.partial"
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        if writes:
            shutil.rmtree(path, ignore_errors=True)
            os.replace(partial, path)
    except Exception:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
        raise
