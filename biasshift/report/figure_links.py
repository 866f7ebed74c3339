"""Links to the figures that lie beside the runs."""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from biasshift.report.html import escaped

FORMATS = (".png", ".svg", ".pdf")
MAX_FIGURES = 30


def figure_links(folders: Sequence[str | os.PathLike[str]], page: Path) -> str:
    """Returns links to the files ``figure_*`` in these folders; without any the text is empty.

    Links are relative. A figure that lies outside of the page's folder is named without one: the
    way there would tell how somebody's machine is arranged.

    Args:
        folders: What was given as runs; folders below are not looked into.
        page: The file that the links will stand in.
    """
    files = {
        path.resolve(): path
        for folder in folders
        for path in sorted(Path(folder).glob("figure_*"))
        if path.suffix.lower() in FORMATS and path.is_file() and not path.is_symlink()
    }
    stems: dict[Path, list[Path]] = {}
    for path in files:
        stems.setdefault(path.with_suffix(""), []).append(path)
    shown = [_links(stem, stems[stem], page) for stem in list(stems)[:MAX_FIGURES]]
    if not shown:
        return ""
    more = f"; {len(stems) - MAX_FIGURES} more" if len(stems) > MAX_FIGURES else ""
    return f'<p class="faint">Figures: {"; ".join(shown)}{more}.</p>'


def _links(stem: Path, files: Sequence[Path], page: Path) -> str:
    top = page.parent.resolve()
    links = [
        f'<a href="./{quote(path.relative_to(top).as_posix())}">{kind}</a>'
        if path.is_relative_to(top)
        else kind
        for path in files
        for kind in [path.suffix[1:].upper()]
    ]
    return f"{escaped(stem.name.replace('_', ' '), 60)} ({', '.join(links)})"
