"""Links to Markdown files of the repository that are no pages, such as tables of results: they become downloads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sphinx import addnodes
from sphinx.transforms import SphinxTransform


class RepositoryFiles(SphinxTransform):
    """MyST takes every existing ``.md`` for a page, and a page that is not there for plain text."""

    default_priority = 10

    def apply(self, **kwargs: Any) -> None:
        """Replaces such references before Sphinx collects the files to download."""
        folder = Path(self.env.doc2path(self.env.docname)).parent
        for node in list(self.document.findall(addnodes.pending_xref)):
            path = Path(self.env.srcdir) / f"{node.get('reftarget')}.md"
            if node.get("reftype") != "myst" or node["reftarget"] in self.env.found_docs or not path.is_file():
                continue
            target = os.path.relpath(path, folder)
            link = addnodes.download_reference(
                "", "", *node.children, reftarget=target, refdoc=self.env.docname, refexplicit=True
            )
            node.replace_self(link)


def setup(app: Any) -> dict[str, bool]:
    """Registers the transform."""
    app.add_transform(RepositoryFiles)
    return {"parallel_read_safe": True}
