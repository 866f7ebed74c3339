"""Files of a data set that are not there: downloaded elsewhere, then moved into place, so that nothing is ever half there."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


def obtain(
    name: str, folder: Path, files: Sequence[str], fetch: Callable[[Path], Path], download: bool, layout: str, extra: Sequence[str] = ()
) -> None:
    """Make sure that `files` are in `folder`, or say in one sentence why they are not.

    Args:
        fetch: downloads into the folder it is given, checks what came, and returns the folder with the files.
        layout: what the folder named with `--data` has to hold.
        extra: files that are put in place too when others are downloaded, but may be missing.

    Raises:
        FileNotFoundError: files are missing, and downloading them was not allowed or failed.
    """
    missing = [file for file in files if not (folder / file).exists()]
    if not missing:
        return
    absent = f"{name} is not complete in '{folder}' (missing: {', '.join(missing)})"
    remedy = f"name the folder that holds {layout} with --data or $BIASSHIFT_DATA"
    if not download:
        raise FileNotFoundError(f"{absent}, and downloading is off: {remedy}, or allow the download.")
    try:
        _download(folder, [*missing, *(file for file in extra if not (folder / file).exists())], fetch)
    except (OSError, RuntimeError) as error:  # RuntimeError: torchvision tried every mirror, or what came is damaged
        reason = getattr(error, "strerror", None) or "no server answered"
        raise FileNotFoundError(f"{absent}, and it cannot be downloaded ({reason}): {remedy}, or try again with a network.") from error


def _download(folder: Path, files: Sequence[str], fetch: Callable[[Path], Path]) -> None:
    with tempfile.TemporaryDirectory() as elsewhere:
        fetched = fetch(Path(elsewhere))
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            part = folder / f"{file}.part"
            shutil.copyfile(fetched / file, part)
            part.replace(folder / file)
