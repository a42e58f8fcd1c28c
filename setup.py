"""What pyproject.toml cannot say: when the package is installed, or its wheel is made, Sphinx builds the manual pages from docs/.

They go to share/man below the prefix, where man(1) looks for /usr, /usr/local and every prefix that is in PATH. They are not
committed: what is built differs with each version of Sphinx, and would be old after each change of docs/. A wheel has them in it,
so that whoever installs one needs no Sphinx.
"""

import tempfile
from distutils.command.install_data import install_data  # setuptools brings it along where Python has none
from pathlib import Path

from setuptools import Distribution, setup

ROOT = Path(__file__).parent
PAGES = "share/man/man{section}"


class InstallData(install_data):
    """install_data, with the pages built first."""

    def run(self) -> None:
        """Build and copy."""
        from sphinx.cmd.build import main as sphinx  # noqa: PLC0415 - nothing else of the build needs it

        with tempfile.TemporaryDirectory() as place:
            if sphinx(["-q", "-E", "-d", f"{place}/doctrees", "-b", "man", str(ROOT / "docs"), f"{place}/man"]):
                raise SystemExit("the manual pages cannot be built; see above")
            pages = sorted(Path(place, "man").glob("*.[1-9]"))
            self.data_files = [(PAGES.format(section=page.suffix[1:]), [str(page)]) for page in pages]
            super().run()


class WithData(Distribution):
    """A distribution that has data in an editable install, too: setuptools asks for it there by a name that it does not know."""

    has_data = Distribution.has_data_files


setup(distclass=WithData, cmdclass={"install_data": InstallData}, data_files=[(PAGES.format(section=8), [])])
