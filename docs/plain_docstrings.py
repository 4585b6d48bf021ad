"""Docstrings are plain text with shapes such as [P][G], which Markdown would take for links (mkdocs.yml)."""

import griffe


class PlainDocstrings(griffe.Extension):
    """Escape what Markdown would read otherwise."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for each module, class, function and attribute that is found in the sources."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("][", "]\\[")
