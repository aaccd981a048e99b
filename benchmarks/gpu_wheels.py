"""Wheels for `gpu.py` on a machine without network, and whether they can travel.

    python benchmarks/gpu_wheels.py            # make gpu-wheels

That machine has Python 3.12, torch 2.11, transformers 5.17, accelerate and peft, and
none of what axolotl needs beside them. `build/gpu-wheels` gets the wheels; together
with the files that git tracks they must stay below a limit. wandb and flash-attn are
too large: `stand_ins` has what is needed of them.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "build" / "gpu-wheels"
MIB = 2**20
LIMIT = 60 * MIB
BIGGEST = 3  # that are named where there is too much
# axolotl 0.21 and, without what it imports only for other recipes, its needs
NEEDED = """
    axolotl==0.21.0 axolotl-contribs-mit==0.0.6 axolotl-contribs-lgpl==0.0.7
    trl==1.14.1 liger-kernel==0.8.4 bitsandbytes==0.50.2
    datasets==5.0.1 dill==0.4.1 multiprocess==0.70.19 evaluate==0.4.1
    pydantic==2.13.5 pydantic-core==2.46.5 annotated-types==0.8.0
    typing-inspection==0.4.5
    posthog==6.7.11 backoff==2.2.1 distro==1.9.0
    fire==0.7.1 termcolor==3.3.0 fastcore==2.2.41 addict==2.4.0
    python-dotenv==1.0.1
""".split()


def collect(folder: Path) -> None:
    """Fills a folder with the wheels, and with this package's own.

    Raises:
        RuntimeError: If this is not the Python that the wheels are for.
    """
    found = f"{platform.system()} {platform.machine()} {platform.python_version()}"
    if not found.startswith("Linux x86_64 3.12."):
        raise RuntimeError(f"wheels are for Linux x86_64 3.12, and this is {found}")
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as copy:
        # not in place: what setuptools leaves in build/ would get into later wheels
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        shutil.copytree(ROOT / "axolotl_edpo", Path(copy, "axolotl_edpo"))
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
        subprocess.run([*command, "-w", str(folder), *NEEDED, copy], check=True)


def tracked(root: Path) -> list[Path]:
    """The files of a working tree that git tracks."""
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True)
    paths = (root / name for name in listed.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]


def check_size(paths: Iterable[Path], limit: int = LIMIT) -> int:
    """Bytes of files that travel together.

    Raises:
        ValueError: If they are more than the limit; names the biggest.
    """
    sizes = {path: path.stat().st_size for path in paths}
    if (total := sum(sizes.values())) <= limit:
        return total
    biggest = sorted(sizes, key=lambda path: -sizes[path])[:BIGGEST]
    named = (f"{path.name} {sizes[path] / MIB:.1f} MiB" for path in biggest)
    raise ValueError(
        f"{total / MIB:.1f} MiB of wheels and tracked files are more than "
        f"{limit / MIB:.1f} MiB; the biggest: {', '.join(named)}"
    )


def main() -> None:
    """Collects, and says how much there is."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0]).parse_args()
    try:
        collect(WHEELS)
        wheels = sorted(WHEELS.glob("*.whl"))
        total = check_size([*wheels, *tracked(ROOT)])
    except (RuntimeError, ValueError) as error:
        sys.exit(f"gpu-wheels: {error}")
    own = sum(path.stat().st_size for path in wheels)
    print(
        f"{len(wheels)} wheels, {own / MIB:.1f} MiB, in {WHEELS.relative_to(ROOT)}; "
        f"with the tracked files {total / MIB:.1f} of {LIMIT / MIB:.0f} MiB"
    )


if __name__ == "__main__":
    main()
