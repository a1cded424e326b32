"""Parts of a build that pyproject.toml cannot state: the sample subjects, and the package page."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
_CAPTIONED = re.compile(r"^!\[[^\]]*\]\([^)]+\)\n\n\*[^*]+\*\n", re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def package_page(readme: str, repository: str | None) -> str:
    """README.md for a page elsewhere, where links to files of the repository lead nowhere.

    Args:
        readme: Its text.
        repository: Address of the repository, whose files the links are pointed at; None takes
            images out and leaves of other links their text.
    """

    def replace(link: re.Match[str]) -> str:
        image, text, path = link.groups()
        if repository is None:
            return "" if image else text
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/HEAD/{path})"

    shown = readme if repository else _CAPTIONED.sub("", readme)
    return re.sub(r"\n{3,}", "\n\n", _LINK.sub(replace, shown))


def repository_url() -> str | None:
    """``Repository`` of ``[project.urls]``, where the project has a public address."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository = "(.+?)/?"$', project, flags=re.MULTILINE)
    return found[1] if found else None


if __name__ == "__main__":
    # Two builds have one digest: a wheel gives its files this time, the first of a .zip.
    os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")
    # The samples lie at the top, where people find them, and are a part of the package. An editable
    # install finds them there: without a folder of another name it is a path file, which type
    # checkers read; else setuptools writes an import hook, which they do not.
    samples = {} if "editable_wheel" in sys.argv else {"dora_diffusion.samples": "samples"}
    setup(
        packages=[*find_packages(include=["dora_diffusion*"]), *samples],
        package_dir={"": ".", **samples},
        package_data={
            "dora_diffusion": [
                "py.typed",
                "*.pyi",
                "config/*.pyi",
                "config/*.json",
                "evaluation/*.html",
                "evaluation/*.yaml",
                "export/*.pyi",
                "export/**/*.yaml",
                "models/embedded/**/*",
                "toy/weights/*",
                "toy/*.yaml",
                "studio/app/*.css",
                "studio/app/*.html",
                "studio/app/*.js",
                "studio/app/*.json",
                "models/released/*",
                "sampling/*.html",
                "formats/**/*.json",
            ],
            "dora_diffusion.samples": ["**/*"],
        },
        exclude_package_data={"": ["*.pyc"]},
        long_description=package_page(
            (ROOT / "README.md").read_text(encoding="utf-8"), repository_url()
        ),
        long_description_content_type="text/markdown",
    )
