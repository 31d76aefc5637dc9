"""Makes links of names in docstrings, which write `code` as Markdown does and needn't say what is a link."""

from importlib import import_module
from typing import Final

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole


MODULES: Final = (
    "inference_session",
    "inference_session.engine",
    "inference_session.exceptions",
    "inference_session.testing",
)

ENTRIES: Final = (property, classmethod)
"""What has an entry of its own in the reference, besides functions."""

ARGUMENTS: Final = {"id", "pending"}
"""Names of arguments that are those of members, too, and mean the arguments."""


def targets() -> dict[str, str]:
    """Return the full names of all that is public, by each of the names that it goes by in docstrings."""
    found: dict[str, str] = {}
    for module in MODULES:
        for name in import_module(module).__all__:
            public: type[object] = getattr(import_module(module), name)
            names = [name]
            for member, value in getattr(public, "__dict__", {}).items():
                if member[0] != "_" and (isinstance(value, ENTRIES) or callable(value)):
                    names.append(f"{name}.{member}")
            found |= {short: f"{module}.{short}" for short in names}
    return found | {full: full for full in found.values()}


class Name(SphinxRole):
    """Code, and a link if it names something public, be it a member of the class that is described."""

    targets: Final = targets()

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the node that stands for the text."""
        code = nodes.literal(self.rawtext, self.text)
        described = self.env.ref_context.get("py:class")
        name = self.text.removesuffix("()")
        target = self.targets.get(f"{described}.{name}") or self.targets.get(name)
        if target is None or name in ARGUMENTS:
            return [code], []
        link = pending_xref("", code, refdomain="py", reftype="obj", reftarget=target)
        link["refdoc"], link["refwarn"] = self.env.docname, True
        return [link], []


def setup(app: Sphinx) -> None:
    """Give the role its name."""
    app.add_role("name", Name())
