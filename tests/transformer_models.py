"""Writers of tiny random pipelines of the families with a transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.anima import write_anima
from tests.flux2_klein import write_flux2_klein, write_flux2_klein_9b
from tests.z_image import write_z_image

WRITERS: dict[str, Callable[[Path], Path]] = {
    "z-image": write_z_image,
    "flux2-klein": write_flux2_klein,
    "flux2-klein-9b": write_flux2_klein_9b,
    "anima": write_anima,
}
