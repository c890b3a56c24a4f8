"""For mkdocs: files of the repository beside docs/ that pages link to (`../examples/mpi.py`) become files of the site."""

import re
from pathlib import Path

from mkdocs.structure.files import File

LINK = re.compile(r"\]\(\.\./([^)\s#]+)")
FOLDER = "repository"


def on_files(files, config):
    """Add what the pages link to outside of docs/."""
    pages = [file.content_string for file in files.documentation_pages()]
    for target in sorted({target for text in pages for target in LINK.findall(text)}):
        path = Path(config.config_file_path).parent / target
        files.append(File.generated(config, f"{FOLDER}/{target}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Let links to it follow."""
    return markdown if page.file.src_uri.startswith(FOLDER) else LINK.sub(rf"]({FOLDER}/\1", markdown)
