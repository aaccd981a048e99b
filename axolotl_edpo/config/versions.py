"""Which releases of axolotl and TRL this package has been tested with.

The plugin leans on seams that are not public interfaces, so another release may train
something else without an error. It stops instead.
"""

from collections.abc import Mapping
from importlib import metadata

from packaging.specifiers import SpecifierSet

# The releases whose seams tests/test_upstream.py pins.
TESTED = {"axolotl": ">=0.19,<0.22", "trl": ">=1.9,<1.15"}


def check_versions(tested: Mapping[str, str] = TESTED) -> None:
    """Refuses releases that no test of this package has run with.

    axolotl goes on after an ImportError of a plugin, so this is no ImportError.

    Args:
        tested: Distribution -> range.

    Raises:
        RuntimeError: Names what is installed and what is needed.
    """
    own = metadata.version("axolotl-edpo")
    for name, wanted in tested.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "not installed"
        if found == "not installed" or not SpecifierSet(wanted).contains(
            found, prereleases=True
        ):
            raise RuntimeError(
                f"axolotl-edpo {own} works with {name} {wanted}, here it is {found}: "
                f'run `pip install "{name}{wanted}"`'
            )
