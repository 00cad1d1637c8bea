"""What a photograph's file says besides its pixels: EXIF, XMP, resolution, its colours."""

import contextlib
import struct
from dataclasses import dataclass, field
from typing import BinaryIO

from PIL import Image

ORIENTATION, EXIF_IFD, INTEROP_IFD = 0x0112, 0x8769, 0xA005  # EXIF tags
COLOUR_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP")  # of PNG
MOST_BYTES = 65_000  # of EXIF or XMP that fit into a JPEG file
# Adobe RGB (1998): primaries adapted to D50, as ICC profiles have them, white, gamma of 563 / 256
ADOBE = {
    b"rXYZ": (0.60974, 0.31111, 0.01947),
    b"gXYZ": (0.20528, 0.62567, 0.06087),
    b"bXYZ": (0.14919, 0.06322, 0.74457),
    b"wtpt": (0.95045, 1.0, 1.08905),
}


@dataclass
class Tags:
    """What stays of it wherever the format of the new file can hold it."""

    exif: bytes = b""  # with the orientation reset, without thumbnail
    xmp: bytes = b""
    dpi: tuple | None = None
    png_chunks: dict = field(default_factory=dict)  # of COLOUR_CHUNKS

    def for_pillow(self) -> dict:
        """Arguments of Image.save for files that are no PNG; it passes over those of others."""
        found = {"exif": self.exif, "xmp": self.xmp, "dpi": self.dpi}
        return {name: value for name, value in found.items() if value}


def read_tags(image: Image.Image, file: BinaryIO) -> Tags:
    """Of an image opened by Pillow; what is damaged is left out. TIFF's own tags are no EXIF."""
    tags = Tags()
    with contextlib.suppress(Exception):  # every kind of damage has its own
        dpi = tuple(float(n) for n in image.info["dpi"])
        tags.dpi = dpi if len(dpi) == 2 and all(1 <= n <= 1e5 for n in dpi) else None
    with contextlib.suppress(Exception):
        xmp = image.info["xmp"]
        xmp = xmp if isinstance(xmp, bytes) else xmp.encode()
        tags.xmp = xmp if len(xmp) <= MOST_BYTES else b""
    with contextlib.suppress(Exception):
        exif = image.getexif()
        if image.format != "TIFF" and len(exif):
            if ORIENTATION in exif:
                exif[ORIENTATION] = 1
            content = exif.tobytes()
            tags.exif = content if len(content) <= MOST_BYTES else b""
    if image.format == "PNG":
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            content = file.read(int.from_bytes(head[:4], "big"))
            if head[4:] in COLOUR_CHUNKS:
                tags.png_chunks[head[4:]] = content
            file.read(4)
    return tags


def is_adobe_rgb(image: Image.Image) -> bool:
    """Whether EXIF alone says so, as cameras do: an uncalibrated colour space, and option R03."""
    with contextlib.suppress(Exception):
        exif = image.getexif()
        space = exif.get_ifd(EXIF_IFD).get(0xA001)
        return space == 2 or (space == 65535 and exif.get_ifd(INTEROP_IFD).get(1) == "R03")
    return False


def adobe_rgb_profile() -> bytes:
    """An ICC profile of version 2 of these colours, for files whose EXIF is not asked for them."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * v) for v in values))

    name = b"compatible with Adobe RGB (1998)\0"
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, 563)  # a gamma, in 256ths
    entries = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78)}
    entries |= {b"cprt": b"text\0\0\0\0none\0"} | {n: xyz(v) for n, v in ADOBE.items()}
    entries |= {n: curve for n in (b"rTRC", b"gTRC", b"bTRC")}
    place, table, content = 132 + 12 * len(entries), b"", b""
    for tag, data in entries.items():
        table += tag + struct.pack(">II", place + len(content), len(data))
        content += data + bytes(-len(data) % 4)
    head = struct.pack(">I4x", place + len(content)) + b"\2\x10\0\0mntrRGB XYZ " + bytes(12)
    head += b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)  # D50
    return head + bytes(128 - len(head)) + struct.pack(">I", len(entries)) + table + content
