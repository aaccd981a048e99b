"""The releases of axolotl and TRL with which this package has been tested.

The plugin uses parts of them that are not public. With another release it might train
something else without an error. So it refuses other releases.
"""

from collections.abc import Mapping
from importlib import metadata

from packaging.specifiers import SpecifierSet

# The releases whose private names tests/test_upstream.py pins.
TESTED = {"axolotl": ">=0.19,<0.22", "trl": ">=1.9,<1.15"}


def check_versions(tested: Mapping[str, str] = TESTED) -> None:
    """Refuses untested releases.

    Args:
        tested: Distribution -> range of versions.

    Raises:
        RuntimeError: Names the installed and the supported version. Not an ImportError,
            as axolotl would ignore that and continue without the plugin.
    """
    version = metadata.version("axolotl-edpo")
    for name, wanted in tested.items():
        installed = _installed(name)
        if installed is None or not SpecifierSet(wanted).contains(
            installed, prereleases=True
        ):
            raise RuntimeError(
                f"axolotl-edpo {version} works with {name} {wanted}, here it is "
                f"{installed or 'not installed'}: "
                f'run `pip install "{name}{wanted}"`'
            )


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
