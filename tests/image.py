"""`make image`: build the image without an engine, on a base of Debian's packages, and run a round in it.

    python -m tests.image FOLDER [--base IMAGE]

Needs root, Debian's `buildah` and `debootstrap`, its archive, the package index, and 30 GB. Steps run in a chroot,
which a machine without cgroups of its own allows as well.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from tests.wheel import HOUSE, RECIPE, run

PACKAGES = "python3,python3-venv,ca-certificates"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
"""This machine's, which the base gets: whoever builds behind a proxy of their own has its certificate there."""
CHROOT = ("--isolation=chroot", "--network=host")
ROUND = """\
set -eu
python -m curate.jobs.drawn_pool pool --rows 96 --shards 2
curate --version
curate check recipe.toml --no-measure
curate round recipe.toml
curate report root --to report.html
test -s report.html
test "$(id -u)" != 0
"""


def buildah(*arguments: str | Path) -> str:
    """Output of a command of buildah's, in the repository."""
    return run(["buildah", *arguments], HOUSE)


def make_base(folder: Path) -> str:
    """An image of Debian's packages; its name."""
    root = folder / "debian"
    run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", root], folder)
    shutil.copy(CERTIFICATES, root / str(CERTIFICATES).lstrip("/"))
    container = buildah("from", "scratch").strip()
    buildah("add", container, root, "/")
    # pip and uv bring authorities of their own; those of the machine are the ones that count.
    trust = f"SSL_CERT_FILE={CERTIFICATES}", f"PIP_CERT={CERTIFICATES}"
    buildah("config", *(f"--env={one}" for one in trust), container)
    buildah("commit", "--rm", container, "localhost/curate-base")
    shutil.rmtree(root)
    return "localhost/curate-base"


def use(folder: Path) -> None:
    """A round in a container, as the image's own user."""
    (folder / "recipe.toml").write_text(RECIPE)
    shutil.copy(HOUSE / "jobs/recipes/demo-clip.json", folder)
    container = buildah("from", "localhost/curate").strip()
    try:
        for name in ("recipe.toml", "demo-clip.json"):
            buildah("copy", "--chown", "curate", container, folder / name, "/home/curate/")
        print(buildah("run", *CHROOT, "--env=OMP_NUM_THREADS=1", container, "--", "sh", "-c", ROUND))
    finally:
        buildah("rm", container)


def main() -> None:
    """Build, use, say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", help="an image that is there already, in place of Debian's packages")
    asked = parser.parse_args()
    if os.geteuid():
        parser.error("expected root, which debootstrap and buildah need here")
    folder = asked.folder.resolve()
    folder.mkdir(parents=True)
    begun = time.monotonic()
    base = asked.base or make_base(folder)
    made = time.monotonic()
    buildah("bud", *CHROOT, "--layers", f"--build-arg=BASE={base}", "--tag=localhost/curate", ".")
    built = time.monotonic()
    use(folder)
    sizes = {one["names"][0]: one["size"] for one in json.loads(buildah("images", "--json")) if one.get("names")}
    print(f"base {made - begun:.0f} s, image {built - made:.0f} s, a round {time.monotonic() - built:.0f} s; {sizes}")


if __name__ == "__main__":
    main()
